"""Pods and commands that Kubeflow's own code makes of the package (tests/kubeflow/render.sh; version 2.17.0).

Of the package with the step localise these are that step and register, which gets its outputs.
"""

import copy
import importlib
import json
import re
from pathlib import Path
from typing import Any

import kfplauncher
import kfprules
import pytest
import yaml
from conftest import ROOT
from test_package import CACHED, EXECUTORS, Package, executors

from security.pods import restricted

PODS, LOCALISED_PODS, COMMANDS, LOCALISED_COMMANDS = (
    json.loads((ROOT / "tests/kubeflow" / f"{name}.json").read_text())
    for name in ("pods", "localise-pods", "commands", "localise-commands")
)
STEPS = [*((name, False) for name in EXECUTORS), *((name, True) for name in LOCALISED_PODS)]
every_step = pytest.mark.parametrize(("name", "localised"), STEPS, ids=lambda value: str(value))


@pytest.fixture(scope="session")
def localised_package(localised_package_file: Path) -> Package:
    return list(yaml.load_all(localised_package_file.read_text(), yaml.CSafeLoader))


@pytest.fixture
def of(localised: bool, package: Package, localised_package: Package) -> Package:
    """The package that a step is of."""
    return localised_package if localised else package


def test_every_step_is_rendered(package: Package) -> None:
    assert set(PODS) == set(COMMANDS) == set(executors(package))
    assert set(LOCALISED_PODS) == set(LOCALISED_COMMANDS) == {"localise", "register"}


@every_step
def test_the_pod_passes_pod_security_restricted(name: str, localised: bool) -> None:
    pod = (LOCALISED_PODS if localised else PODS)[name]
    assert not restricted(pod)
    assert pod["containers"][0]["securityContext"]["runAsUser"] == 65532


@every_step
def test_the_pod_is_of_this_package(name: str, localised: bool, of: Package) -> None:
    """It is rendered by render.sh; fails if the package has changed since: run it again."""
    container, platform = executors(of)[name]
    pod = (LOCALISED_PODS if localised else PODS)[name]
    main = pod["containers"][0]
    ours = [word for word in (*container["command"], *container["args"]) if "{{" not in word]
    assert [word for word in main["args"] if word in ours] == ours
    named = [*(e["name"] for e in container["env"]), *(e["name"] for e in platform["fieldPathAsEnv"])]
    named += [pair["envVar"] for e in (*platform["secretAsEnv"], *platform["configMapAsEnv"]) for pair in e["keyToEnv"]]
    assert {variable["name"] for variable in main["env"]} == {*named, "KFP_POD_NAME", "KFP_POD_UID"}
    paths = {m["mountPath"] for m in (*platform["emptyDirMounts"], *platform["pvcMount"])}
    assert paths <= {mount["mountPath"] for mount in main["volumeMounts"]}


def test_the_pods_have_the_resources_of_the_run_arguments() -> None:
    """In a run on two nodes with eight GPUs each, the supervising step has no GPU."""
    train, evaluate, localise = PODS["train"], PODS["evaluate"], LOCALISED_PODS["localise"]
    resources = train["containers"][0]["resources"]
    assert resources["limits"] == {"cpu": "2", "memory": "8Gi", "nvidia.com/gpu": "0"}
    assert resources["requests"] == {"cpu": "100m", "memory": "2Gi"}
    requests = {name: pod["containers"][0]["resources"]["requests"] for name, pod in PODS.items()}
    assert requests["report"] == {"cpu": "100m", "memory": "512Mi"}  # fits beside a step that fills its node
    assert requests["gate"] == {"cpu": "100m", "memory": "1Gi"}
    assert requests["register"] == {"cpu": "100m", "memory": "2Gi"}
    for name in ("shard", "evaluate"):  # requests equal limits
        assert requests[name].items() <= PODS[name]["containers"][0]["resources"]["limits"].items()
    assert evaluate["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert localise["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    words = train["containers"][0]["args"]
    assert words[words.index("--nodes") + 1 : words.index("--nodes") + 4] == ["2", "--gpus", "8"]
    for pod in (train, evaluate, localise):
        assert pod["nodeSelector"] == {"pool": "gpu"}
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    for pod in (*PODS.values(), *LOCALISED_PODS.values()):
        assert re.fullmatch(r"registry\.example/vgg-\w+@sha256:0{64}", pod["containers"][0]["image"])


def test_a_result_in_the_cache_is_of_this_store() -> None:
    """Kubeflow's cache goes by the input values of a step, which are in what its driver hands to the launcher."""
    rendered = {**{name: COMMANDS[name] for name in CACHED}, "localise": LOCALISED_COMMANDS["localise"]}
    for name, step in rendered.items():
        inputs = step["executor_input"]["inputs"]["parameterValues"]
        assert (inputs["claim"], inputs["addresses"]) == ("vgg-store", "vgg-addresses"), name


def words(package: Package, name: str) -> list[str]:
    container, _ = executors(package)[name]
    return [*container["command"], *container["args"]]


def comparable(command: list[str]) -> list[Any]:
    """JSON by its content: Go and Python differ in spaces and order."""
    return [json.loads(word) if word.startswith("{") else word for word in command]


@every_step
def test_the_launcher_leaves_no_placeholder(name: str, localised: bool, of: Package) -> None:
    """Neither its own code in the rendered commands, nor the fake, which gives the same commands for this package."""
    rendered = (LOCALISED_COMMANDS if localised else COMMANDS)[name]
    resolved = [word.replace("pipelinechannel--", "") for word in words(of, name)]  # the driver resolves those
    command = kfplauncher.command(resolved, rendered["executor_input"])
    assert comparable(command) == comparable(rendered["command"])
    assert not [word for word in command if "{{" in word]


@pytest.mark.parametrize(("name", "localised"), [step for step in STEPS if step[0] != "gate"])  # a Python component
def test_the_program_accepts_the_launchers_command(name: str, localised: bool) -> None:
    """Its outputs go where the launcher collects them."""
    rendered, modules = (LOCALISED_COMMANDS if localised else COMMANDS)[name], []
    parsed = importlib.import_module("components.step").parser().parse_args(rendered["command"][3:])
    while module := getattr(parsed, "module", None):  # each starts the next one
        parsed = importlib.import_module(f"{module}.__main__").parser().parse_args(parsed.arguments)
        modules.append(module)
    assert modules == ["components.trainjob"] * (name in ("train", "localise")) + [f"components.{name}"]
    assert parsed.executor_output == rendered["executor_input"]["outputs"]["outputFile"]


def test_a_placeholder_of_kfp_local_alone_is_noticed(package: Package) -> None:
    """A cluster's launcher leaves it unresolved, and the programs would write to a file with that name."""
    broken = copy.deepcopy(package)
    broken[0]["deploymentSpec"]["executors"]["exec-shard"]["container"]["args"][-1] = "{{$.outputs.output_file}}"
    assert kfplauncher.unknown(words(broken, "shard")) == ["{{$.outputs.output_file}}"]
    with pytest.raises(kfprules.Wrong, match=r"does not know \{\{\$.outputs.output_file\}\}"):
        kfprules.package("\n---\n".join(map(json.dumps, broken)).encode())
    assert kfprules.package("\n---\n".join(map(json.dumps, package)).encode())
