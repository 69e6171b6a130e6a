#!/usr/bin/env bash
# Process the package with Kubeflow Pipelines' own code and store the results:
#   tests/kubeflow/render.sh CHECKOUT      a git checkout of kubeflow/pipelines at 2.17.0 (020857a43a); needs Go 1.26
# Writes pods.json, the pods of its driver, and commands.json, the commands of its launcher; with the step localise also
# localise-pods.json and localise-commands.json, of that step and of register, which gets its outputs.  The test suite
# compares them with the package.  Runs one step, sharding of the digits, with the launcher's code; as root, because that
# writes outputs to /s3, which is removed afterwards.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$1" && pwd)
scratch=$(mktemp -d)
driver=$checkout/backend/src/v2/driver/render_vgg_test.go launcher=$checkout/backend/src/v2/component/launch_vgg_test.go
outputs=/s3/mlpipeline/v2/artifacts
trap 'rm -rf "$scratch" "$driver" "$launcher" $outputs/shard; rmdir -p --ignore-fail-on-non-empty $outputs' EXIT
cd "$here/../.."
python -m pipelines.submit --compile "$scratch/package.yaml"
python -m pipelines.submit --compile "$scratch/localise.yaml" --params recipes/digit-scenes.yaml
cp "$here/render_test.go" "$driver"
cp "$here/launch_test.go" "$launcher"

# go_test PACKAGE TESTS: with the run arguments in the file $VGG_ARGUMENTS
go_test() { (cd "$checkout" && go test "./backend/src/v2/$1/" -run "^($2)\$" -count=1); }
export VGG_PACKAGE=$scratch/package.yaml VGG_PODS=$scratch/pods.json VGG_LAUNCHES=$scratch/launches.json
export VGG_COMMANDS=$scratch/commands.json

python - "$here/arguments.json" >"$scratch/digits.json" <<'PYTHON'
import json, sys
from pipelines.arguments import sections
print(json.dumps({**json.load(open(sys.argv[1])), **sections("params.yaml", [])}))
PYTHON
VGG_ARGUMENTS=$scratch/digits.json go_test driver TestRenderVGG
VGG_STORE=$scratch/store VGG_JOURNAL=$scratch/journal VGG_CACHE=$scratch/cache PYTHONPATH=$PWD \
    MLFLOW_TRACKING_URI=sqlite:///$scratch/mlflow.db go_test component "TestStepVGG|TestRefusalVGG"

# render PREFIX PACKAGE ARGUMENTS [STEP…]: both files, all steps or these
render() {
    VGG_PACKAGE=$2 VGG_ARGUMENTS=$3 go_test driver TestRenderVGG
    go_test component TestCommandsVGG
    # the launcher's command contains the whole component; keep only its first word
    python - "$VGG_PODS" "$VGG_COMMANDS" "$here/$1" "${@:4}" <<'PYTHON'
import json, sys
for path in sys.argv[1:3]:
    found = json.load(open(path))
    found = {step: found[step] for step in sys.argv[4:] or found}
    if path.endswith("pods.json"):
        for pod in found.values():
            for container in pod["containers"]:
                container["command"] = container["command"][:1]
    with open(f"{sys.argv[3]}{path.rpartition('/')[2]}", "w") as file:
        json.dump(found, file, indent=1, sort_keys=True)
        file.write("\n")
PYTHON
}

render "" "$scratch/package.yaml" "$here/arguments.json"
python - "$here/arguments.json" >"$scratch/localise.json" <<'PYTHON'
import json, sys
given = json.load(open(sys.argv[1]))
print(json.dumps({**given, "localise": {"seed": 1}, "localise_image": given["train_image"]}))
PYTHON
render localise- "$scratch/localise.yaml" "$scratch/localise.json" localise register
