#!/usr/bin/env bash
# Have Kubeflow Pipelines' own code judge the package, and keep the pods it makes of it:
#   tests/kubeflow/render.sh CHECKOUT      a git checkout of kubeflow/pipelines at 2.17.0 (020857a43a); needs Go 1.26
# Writes tests/kubeflow/pods.json, which tests/test_package.py holds against Pod Security and against the package.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$1" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch" "$checkout/backend/src/v2/driver/render_vgg_test.go"' EXIT
(cd "$here/../.." && python -m pipelines.submit --compile "$scratch/package.yaml")
cp "$here/render_test.go" "$checkout/backend/src/v2/driver/render_vgg_test.go"
(cd "$checkout" && VGG_PACKAGE=$scratch/package.yaml VGG_ARGUMENTS=$here/arguments.json VGG_OUT=$scratch/pods.json \
    go test ./backend/src/v2/driver/ -run TestRenderVGG -count=1)
# the launcher's own words hold the whole component; what matters is ours
python - "$scratch/pods.json" "$here/pods.json" <<'PYTHON'
import json, sys
pods = json.load(open(sys.argv[1]))
for pod in pods.values():
    for container in pod["containers"]:
        container["command"] = container["command"][:1]
with open(sys.argv[2], "w") as file:
    json.dump(pods, file, indent=1, sort_keys=True)
    file.write("\n")
PYTHON
