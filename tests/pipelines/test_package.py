"""The compiled pipeline: every task hardened and cached by content, without secrets and hyperparameters."""

import copy
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, all_tasks, compile_package, environment

from components import images
from components.given import ADDRESSES, CLUSTER, STORE_SECRET, TRACKING_SECRET
from components.images import reference
from vgg.params import STAGES

Package = list[dict[str, Any]]
EXECUTORS = (*STAGES, "gate", "report")


def executors(package: Package) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """(container, platform) of every executor; both documents must have the same executors."""
    containers = package[0]["deploymentSpec"]["executors"]
    platforms = package[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert containers.keys() == platforms.keys()
    return {name.removeprefix("exec-"): (containers[name]["container"], platforms[name]) for name in containers}


def test_it_is_compiled_to_the_same_bytes_every_time(package_file: Path, tmp_path: Path) -> None:
    compile_package(tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == package_file.read_bytes()


def test_every_executor_is_hardened(package: Package) -> None:
    found = executors(package)
    assert set(found) == set(EXECUTORS)
    for name, (container, platform) in found.items():
        assert {"resourceCpuLimit", "resourceMemoryLimit", "resourceCpuRequest"} <= container["resources"].keys(), name
        assert platform["securityContext"] == {"runAsUser": "65532", "runAsGroup": "65532", "runAsNonRoot": True}
        assert int(platform["activeDeadlineSeconds"]) > 0
        mounts = {mount["mountPath"]: mount for mount in platform["emptyDirMounts"]}
        assert mounts["/dev/shm"]["medium"] == "Memory"
        assert mounts["/dev/shm"]["sizeLimit"]
        assert "/tmp" in mounts
        assert [mount["mountPath"] for mount in platform["pvcMount"]] == ["/store"]
        assert platform["podMetadata"]["labels"]["vgg.stage"] == name
        assert platform["imagePullPolicy"] == "IfNotPresent"
        # no other kinds of volumes; Pod Security "restricted" admits these
        assert not {"secretAsVolume", "configMapAsVolume", "genericEphemeralVolume"} & platform.keys()
        assert container["command"]


def test_secrets_and_addresses_go_by_name_and_only_as_environment(package: Package) -> None:
    for name, (container, platform) in executors(package).items():
        keys = {pair["envVar"] for item in platform["secretAsEnv"] for pair in item["keyToEnv"]}
        assert keys == {*STORE_SECRET, *TRACKING_SECRET}, name
        assert all(item["optional"] for item in platform["secretAsEnv"])
        optional = {item["keyToEnv"][0]["envVar"]: item["optional"] for item in platform["configMapAsEnv"]}
        assert optional == ADDRESSES
        for item in (*platform["secretAsEnv"], *platform["configMapAsEnv"]):
            named = item.get("secretNameParameter") or item["configMapNameParameter"]
            assert "componentInputParameter" in named  # the name is a run argument
        literal = {item["name"] for item in container["env"]}
        assert literal == {"HOME", "VGG_CACHE", "VGG_JOURNAL"}


def test_images_are_run_arguments_with_content_tags_as_defaults(package: Package) -> None:
    inputs = package[0]["root"]["inputDefinitions"]["parameters"]
    for stage in STAGES:
        assert inputs[f"{stage}_image"]["defaultValue"] == reference(stage)
        assert re.fullmatch(rf"localhost/vgg-\w+:{stage}-[0-9a-f]{{16}}", reference(stage))
    used = {name: container["image"] for name, (container, _) in executors(package).items()}
    expected = {name: name if name in STAGES else "register" for name in EXECUTORS}
    for name, stage in expected.items():
        assert used[name] == f"{{{{$.inputs.parameters['pipelinechannel--{stage}_image']}}}}"
    assert ":latest" not in json.dumps(package)


def test_only_steps_with_gpus_request_gpus(package: Package) -> None:
    for name, (container, platform) in executors(package).items():
        wants = name in ("train", "evaluate")
        assert ("accelerator" in container["resources"]) == wants, name
        if wants:  # from a number the driver silently makes no GPU request
            argument = re.search(r"--(\w+)'", container["resources"]["accelerator"]["resourceCount"])
            assert argument
            assert package[0]["root"]["inputDefinitions"]["parameters"][argument[1]]["parameterType"] == "STRING"
        assert ("nodeSelector" in platform) == ("tolerations" in platform) == wants


def test_every_run_argument_reaches_the_tasks_that_use_it(package: Package) -> None:
    """Every level passes on what its tasks use; otherwise a driver fails in the middle of a run."""
    spec, platforms = package[0], package[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, component in {**spec["components"], "root": spec["root"]}.items():
        defined = component.get("inputDefinitions", {}).get("parameters", {}).keys()
        for task in component.get("dag", {}).get("tasks", {}).values():
            used = re.findall(r'"componentInputParameter": "([^"]+)"', json.dumps(task))
            executor = spec["components"][task["componentRef"]["name"]].get("executorLabel")
            used += re.findall(r'"componentInputParameter": "([^"]+)"', json.dumps(platforms.get(executor, {})))
            used += re.findall(r"parameters\['([^']+)'\]", json.dumps(spec["components"].get(executor, {})))
            # settings of a task at the root use the argument's own name
            assert {
                parameter.removeprefix("pipelinechannel--") if name == "root" else parameter for parameter in used
            } <= defined


# --- the cluster values: components.given.CLUSTER against the signatures that kfp reads, and what is generated from it

KINDS = {int: "NUMBER_INTEGER", str: "STRING", dict: "STRUCT", list: "LIST"}


def test_the_pipeline_has_every_cluster_value_with_its_type_and_default(package: Package) -> None:
    inputs = package[0]["root"]["inputDefinitions"]["parameters"]
    for value in CLUSTER.values():
        default = reference("train") if value.name == "image" else value.default
        assert inputs[value.argument]["parameterType"] == KINDS[value.kind], value.name
        assert inputs[value.argument]["defaultValue"] == default, value.name


def test_the_training_component_has_every_cluster_value_and_each_comes_from_its_run_argument(package: Package) -> None:
    inputs = package[0]["components"]["comp-train"]["inputDefinitions"]["parameters"]
    own = {"params", "shards", "initial"}
    arguments = all_tasks(package)["train"]["inputs"]["parameters"]
    parameters = {name: source for name, source in inputs.items() if not name.startswith("pipelinechannel--")}
    assert parameters.keys() == own | CLUSTER.keys()
    for value in CLUSTER.values():
        assert inputs[value.name]["parameterType"] == KINDS[value.kind], value.name
        assert arguments[value.name] == {"componentInputParameter": f"pipelinechannel--{value.argument}"}, value.name


def test_the_command_of_training_has_a_flag_for_every_cluster_value(package: Package) -> None:
    command = executors(package)["train"][0]["command"]
    flags = command[command.index("components.trainjob") + 1 : command.index("components.train")]
    expected = [(value.flag, f"{{{{$.inputs.parameters['{value.name}']}}}}") for value in CLUSTER.values()]
    assert list(zip(flags[::2], flags[1::2], strict=True)) == expected


def test_cluster_values_need_no_heavy_import() -> None:
    script = "import sys, components.given; print(*sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    assert not {"kfp", "torch", "mlflow", "numpy", "kubernetes"} & set(done.stdout.split())


def test_help_describes_every_cluster_value() -> None:
    from components.trainjob.__main__ import parser

    flags = parser().format_help()
    for value in CLUSTER.values():
        assert re.search(rf"{value.flag} \w+\s+{re.escape(value.help)}", flags), value.name
    required = [action.dest for action in parser()._actions if action.required and action.option_strings]
    assert required == ["nodes", "gpus", "cpu", "memory"]
    given = ["--nodes", "1", "--gpus", "0", "--cpu", "2", "--memory", "4Gi", "components.train"]
    parsed = vars(parser().parse_args(given))
    assert {name: parsed[name] for name in CLUSTER if name not in required} == {
        "gpu_type": "nvidia.com/gpu", "node_selector": "{}", "tolerations": "[]", "runtime": "vgg-train", "image": "",
        "claim": "", "addresses": "", "store_secret": "", "tracking_secret": "",
    }  # fmt: skip


def test_retries_are_left_to_the_exit_codes(package: Package) -> None:
    """Kubeflow's retries would also repeat a wrong parameter; every program runs under components.step instead."""
    for name, task in all_tasks(package).items():
        assert "retryPolicy" not in task, name
    for name, (container, _) in executors(package).items():
        if name != "gate":  # a Python component
            assert container["command"][:3] == ["python", "-m", "components.step"], name


def test_the_package_contains_no_hyperparameter(package: Package) -> None:
    inputs = package[0]["root"]["inputDefinitions"]["parameters"]
    for stage in STAGES:
        assert inputs[stage].keys() == {"parameterType", "description"}  # no default
    text = json.dumps(package)
    for leaf in ("kaiming", "0.0005", "vgg16-digits", "learning_rate"):
        assert leaf not in text


def test_the_report_always_runs_and_registration_only_after_the_gate(package: Package) -> None:
    tasks = all_tasks(package)
    assert tasks["report"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    condition = tasks["condition-2"]["triggerPolicy"]["condition"]
    assert "gate-Output'] == true" in condition
    inner = package[0]["components"]["comp-condition-2"]["dag"]["tasks"]
    assert set(inner) == {"register"}
    config = package[1]["platforms"]["kubernetes"]["pipelineConfig"]
    assert config["resourceTtlOnCompletion"] > 0
    assert config["activeDeadlineSeconds"] > int(executors(package)["train"][1]["activeDeadlineSeconds"])


# --- caching: what Kubeflow 2.17 hashes of a task (backend/src/v2/cacheutils, driver/cache.go)


def cache_key(package: Package, task: str, arguments: dict[str, Any]) -> str:
    """Fingerprint of a task: input values, types of outputs, command and image, with the arguments inserted."""
    executor, _ = executors(package)[task]
    component = package[0]["components"][f"comp-{task}"]
    text = json.dumps(
        {
            "inputs": {
                name: arguments[name] for name in component["inputDefinitions"]["parameters"] if name in arguments
            },
            "outputs": component["outputDefinitions"],
            "command": [executor.get("command"), executor.get("args")],
            "image": arguments[f"{task}_image"],
        },
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()


ARGUMENTS = {
    "params": {"seed": 1}, "images": "/store/imagenet", "images_version": "1", "shards": "store:shards/a#1.dir",
    "shard_image": "registry/vgg-data@sha256:1", "train_image": "registry/vgg-train@sha256:1",
    "evaluate_image": "registry/vgg-train@sha256:1", "image": "registry/vgg-train@sha256:1",
    "checkpoint": "store:checkpoints/a#1.dir", "addresses": "vgg-addresses", "claim": "vgg-store",
}  # fmt: skip


CACHED = ("shard", "train", "evaluate")


@pytest.mark.parametrize(
    ("task", "change", "hits"),
    [
        ("shard", {}, True),
        ("train", {}, True),
        ("evaluate", {}, True),
        ("shard", {"images_version": "2"}, False),  # changed data
        ("train", {"shards": "store:shards/a#2.dir"}, False),
        ("evaluate", {"checkpoint": "store:checkpoints/a#2.dir"}, False),
        ("train", {"params": {"seed": 2}}, False),
        ("train", {"train_image": "registry/vgg-train@sha256:2"}, False),  # a moved tag, changed code
        ("shard", {"train_image": "registry/vgg-train@sha256:2"}, True),  # image of another step
        *((task, change, False) for task in CACHED for change in ({"claim": "other"}, {"addresses": "other"})),
    ],
)
def test_same_content_hits_and_other_content_misses(
    task: str, change: dict[str, Any], hits: bool, package: Package
) -> None:
    assert (cache_key(package, task, ARGUMENTS) == cache_key(package, task, {**ARGUMENTS, **change})) == hits


def test_steps_that_use_the_registry_are_never_cached(package: Package) -> None:
    tasks = all_tasks(package)
    cached = {name for name in EXECUTORS if tasks[name]["cachingOptions"] == {"enableCache": True}}
    assert cached == set(CACHED)
    for name in ("gate", "register", "report"):
        assert tasks[name]["cachingOptions"] == {}


def test_changed_code_changes_the_image_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for the steps that run it; comments do not count."""
    for name in ("vgg", "runtime", "components", "docker"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))

    monkeypatch.setattr("components.closure.ROOT", tmp_path)
    monkeypatch.setattr("components.images.ROOT", tmp_path)

    def tags() -> dict[str, str]:
        return dict(line.split() for line in images.listing().splitlines())

    known = [tags()]

    def changed(path: str, text: str) -> set[str]:
        with open(tmp_path / path, "a") as file:
            file.write(text)
        known.append(tags())
        return {stage for stage in STAGES if known[-2][stage] != known[-1][stage]}

    assert changed("vgg/evaluation/evaluate.py", "\n# a comment\n") == set()
    assert changed("vgg/evaluation/evaluate.py", "\nX = 1\n") == {"evaluate", "register"}
    assert changed("runtime/ranks/launch.py", "\nX = 1\n") == {"train"}
    assert changed("components/register/version/served.py", "\nX = 1\n") == {"register"}  # loaded by path
    assert changed("runtime/store/storage.py", "\nX = 1\n") == set(STAGES)
    assert changed("docker/serve.lock", "# another\n") == {"register"}
    assert changed("docker/install.sh", "# another\n") == set(STAGES)


def test_a_package_without_a_hardened_task_is_noticed(package: Package) -> None:
    """The checks above fail for a bad package."""
    broken = copy.deepcopy(package)
    del broken[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-train"]["securityContext"]
    with pytest.raises(KeyError):
        test_every_executor_is_hardened(broken)
    broken = copy.deepcopy(package)
    del broken[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-gate"]
    with pytest.raises(AssertionError):
        test_every_executor_is_hardened(broken)
