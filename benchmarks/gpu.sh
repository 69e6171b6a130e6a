#!/usr/bin/env bash
# Runs everything that needs a GPU, in at most 9 minutes 30, and prints a table for RESULTS.md.
#
#   benchmarks/gpu.sh lease IMAGES TAR...              on a GPU; ends with the table
#   benchmarks/gpu.sh lease --rehearse IMAGES TAR...   the same programs, tiny, on a CPU: to try them without a GPU
#   benchmarks/gpu.sh lease --only train --seconds 200 IMAGES TAR...   some of the programs
#
# In this order, every part with its own time limit (benchmarks/lease.py): correctness of decoders and of a training
# step; training images/s; dense evaluation; decoding; repeated and resumed training; recipes/cifar10-bn.yaml for as
# many epochs as fit.  A program that fails or exceeds its limit does not affect the others, and its row says so.  Exit
# 0: all programs succeeded.
#
# Run it from the repository's root.  IMAGES: a tar (also .gz, .xz) or folder of <class>/<image>.jpg; TAR: the same for
# CIFAR-10, {train,test}/<class>/<image>.jpg.  PYTHON is the interpreter (python3), RESULTS the folder for results.json,
# table.md, profile.txt and log.txt (build/gpu), WHEELS a folder of wheels that the machine lacks (.whl).
#
# The machine needs PyTorch, torchvision, numpy, Pillow, OpenCV, safetensors, scikit-learn, PyYAML, pytest with -timeout
# and -xdist; no network.  Download the wheels beforehand, for Python 3.12 (32 MB; without the two nvidia-* wheels
# Pillow decodes, and 'decoders' and 'loader' fail):
#
#   python3 -m pip download -d .whl --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#     $(grep -oE '^(annotated-t|brace|google-cr|nvidia-nv(im|jp)|pydantic(-core)?=|ruam|simplej|typing|webd)[^ ]+' \
#     requirements.lock)
#
# If the machine takes at most 64 MiB, prepare every fifth photograph (11 MB) and CIFAR-10 compressed (19 MB):
#
#   mkdir -p build/lease/images
#   tar -tf IMAGES.tar | awk 'tolower($0) ~ /jpe?g$/ && ++n % 5 == 1' >build/lease/names
#   tar -xf IMAGES.tar -C build/lease/images -T build/lease/names
#   for split in train test; do xz -kc cifar10-$split.tar >build/lease/cifar10-$split.tar.xz; done
#
# Then copy .whl and build/lease there with the repository, set RESULTS to a folder that is copied back, and run:
#
#   RESULTS=$OUT benchmarks/gpu.sh lease build/lease/images build/lease/cifar10-{train,test}.tar.xz

set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-.whl} RESULTS=${RESULTS:-build/gpu}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset PYTHONDONTWRITEBYTECODE

install_wheels() {
  compgen -G "$WHEELS/*.whl" >/dev/null || return 0
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl ||
    exit 1
  export PYTHONPATH="$site:$PYTHONPATH"
  # this package 'nvidia' must not hide the installed one
  if [ -d "$site/nvidia" ]; then
    echo '__path__ = __import__("pkgutil").extend_path(__path__, __name__)' >"$site/nvidia/__init__.py"
  fi
}

if [ "${1:-}" != lease ] || [ $# -lt 3 ]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 64
fi
shift
install_wheels
"$PYTHON" -m benchmarks.lease --results "$RESULTS" --spent "$SECONDS" "$@"
