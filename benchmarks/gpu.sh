#!/usr/bin/env bash
# All that needs a GPU: first whether results are right, then how fast they come, last one table for RESULTS.md.
#
#   benchmarks/gpu.sh correct             GPU decoders beside Pillow, a training step beside torchvision's in float64
#   benchmarks/gpu.sh repeat              deterministic training, repeated and resumed: the same bytes
#   benchmarks/gpu.sh speed [IMAGES]      training beside torchvision's loop, and from shards of IMAGES; a profile
#   benchmarks/gpu.sh loader IMAGES       decoding: the CPU's cores, the GPU's engines
#   benchmarks/gpu.sh cifar10 TAR...      recipes/cifar10.yaml; exit 75: not finished, the same command goes on
#   benchmarks/gpu.sh cifar10-bn TAR...   the same with batch norm
#   benchmarks/gpu.sh all IMAGES TAR...   these six in turn
#   benchmarks/gpu.sh table               the table of what has been measured so far
#
# Run it from the repository's root.  IMAGES: a tar (also .gz, .xz) or folder of <class>/<image>.jpg; TAR: the same of
# CIFAR-10, {train,test}/<class>/<image>.jpg.  A word takes less than 10 minutes; one that fails does not stop the next.
# PYTHON is the interpreter (python3), RESULTS where figures and logs go (build/gpu), WORK where CIFAR-10 is trained.
#
# The machine needs PyTorch, torchvision, numpy, Pillow, OpenCV, safetensors, scikit-learn, pytest with -timeout and
# -xdist.  Wheels of what it lacks are taken from .whl/ (WHEELS), without a network.  To fetch them for Python 3.12:
#
#   python3 -m pip download -d .whl --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#     $(grep -oE '^(annotated-t|brace|google-cr|nvidia-nv(im|jp)|pydantic(-core)?=|ruam|simplej|typing|webd)[^ ]+' \
#     requirements.lock)
#
# 33 MB; without the two nvidia-* wheels (29 MB) Pillow decodes, 'correct' skips the decoders and 'loader' fails.

set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-.whl} RESULTS=${RESULTS:-build/gpu} WORK=${WORK:-build/cifar10}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset PYTHONDONTWRITEBYTECODE
mkdir -p "$RESULTS"
failed=0

# step NAME SECONDS COMMAND...: what it prints goes to NAME.json, its messages to NAME.log and here, its exit to NAME.rc
step() {
  local name=$1 seconds=$2 rc
  shift 2
  echo "== $name: $*" >&2
  timeout --signal=TERM --kill-after=20 "$seconds" "$@" >"$RESULTS/$name.json" 2> >(tee "$RESULTS/$name.log" >&2)
  rc=$?
  echo "$rc" >"$RESULTS/$name.rc"
  if [ "$rc" -ne 0 ]; then
    tail -n 40 "$RESULTS/$name.json" >&2
    echo "== $name: exit $rc" >&2
    failed=$rc
  fi
}

install_wheels() {
  compgen -G "$WHEELS/*.whl" >/dev/null || return 0
  local site
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl ||
    exit 1
  export PYTHONPATH="$site:$PYTHONPATH"
  # this package 'nvidia' must not hide the one that is installed already
  if [ -d "$site/nvidia" ]; then
    echo '__path__ = __import__("pkgutil").extend_path(__path__, __name__)' >"$site/nvidia/__init__.py"
  fi
}

correct() {
  if "$PYTHON" -c "from nvidia import nvimgcodec" 2>/dev/null; then
    step decoders 150 "$PYTHON" -m pytest tests/test_roi.py -k cuda -n 4 -p no:cacheprovider
  else
    echo "== decoders: nvImageCodec is not installed" >&2
  fi
  step correct 420 "$PYTHON" -m benchmarks.correct step learns --json
}

repeat() {
  step repeat 560 "$PYTHON" -m benchmarks.correct repeated --json
}

speed() {
  step train 560 "$PYTHON" -m benchmarks.train --json --profile "$RESULTS/profile.txt" ${1:+--images "$1"}
}

loader() {
  step loader 400 "$PYTHON" -m benchmarks.loader --json --rounds 3 --images "${1:?which images?}"
}

cifar10() {
  step cifar10 560 "$PYTHON" -m benchmarks.cifar10 "${@:?which tars?}" --work "$WORK" --json
}

cifar10-bn() {
  step cifar10-bn 560 "$PYTHON" -m benchmarks.cifar10 "${@:?which tars?}" --recipe cifar10-bn --work "$WORK" --json
}

what=${1:-}
[ $# -gt 0 ] && shift
case $what in
  correct | repeat | speed | loader | cifar10 | cifar10-bn)
    install_wheels
    "$what" "$@"
    ;;
  all)
    install_wheels
    correct
    repeat
    speed "${1:?which images?}"
    loader "$1"
    shift
    [ $# -eq 0 ] || { cifar10 "$@" && cifar10-bn "$@"; }
    ;;
  table) install_wheels ;;
  *)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 64
    ;;
esac
"$PYTHON" -m benchmarks.table "$RESULTS" || failed=1
exit "$failed"
