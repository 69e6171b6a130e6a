"""The step localise of the Kubeflow pipeline: there with its section, hardened like the others, absent without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kfprules
import pytest
import test_package
from conftest import ROOT, all_tasks
from kfpworld import World, package, read, world  # noqa: F401
from ruamel.yaml import YAML
from stepcommand import command_of
from test_submit import Frame

from components.images import reference
from components.localise.__main__ import parser as localise_parser
from components.register.__main__ import parser as register_parser
from components.trainjob.__main__ import parser as trainjob_parser
from pipelines import optional, submit
from pipelines.arguments import gather
from pipelines.definition.inputs import INPUTS, LOCALISE
from pipelines.definition.package import Package, version_name
from runtime.errors import WrongParameters
from vgg.params import STAGES

SCENES = str(ROOT / "recipes/digit-scenes.yaml")
EXECUTORS = (*STAGES, "gate", "report", "localise")


@pytest.fixture(scope="module")
def boxed(localised_package_file: Path) -> Package:
    return read(localised_package_file)


@pytest.fixture
def documents(boxed: Package, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """As the checks of test_package.py take it."""
    monkeypatch.setattr(test_package, "EXECUTORS", EXECUTORS)
    return [json.loads(json.dumps(document)) for document in (boxed.spec, boxed.platform)]


def test_without_the_section_nothing_of_it_is_there(package: Package, boxed: Package) -> None:
    assert "locali" not in package.text
    assert version_name(boxed).startswith(version_name(package).partition("-dirty")[0] + "-localise")
    for part in (lambda p: p.spec["deploymentSpec"]["executors"], lambda p: p.spec["components"], _platform):
        before, after = part(package), part(boxed)
        same = {name for name in before if before[name] == after[name]}
        for name in ("shard", "train", "evaluate", "gate", "report"):  # register has two more flags
            assert {f"exec-{name}", f"comp-{name}"} & before.keys() <= same, name
    assert _platform(package)["exec-register"] == _platform(boxed)["exec-register"]


def _platform(package: Package) -> dict[str, Any]:
    found: dict[str, Any] = package.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return found


def test_the_step_is_hardened_like_the_others(documents: list[dict[str, Any]]) -> None:
    test_package.test_every_executor_is_hardened(documents)
    test_package.test_secrets_and_addresses_go_by_name_and_only_as_environment(documents)
    test_package.test_every_run_argument_reaches_the_tasks_that_use_it(documents)
    test_package.test_retries_are_left_to_the_exit_codes(documents)
    test_package.test_the_package_contains_no_hyperparameter(documents)
    found = test_package.executors(documents)
    (container, platform), (train, of_train) = found["localise"], found["train"]
    inputs = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert inputs["localise"]["parameterType"] == "STRUCT" and "defaultValue" not in inputs["localise"]
    assert inputs["localise_image"]["defaultValue"] == reference("localise") != reference("train")
    assert inputs["localise_gpus"]["parameterType"] == "STRING"  # from a number the driver makes no GPU request
    accelerator = container["resources"]["accelerator"]
    assert "localise_gpus" in accelerator["resourceCount"]
    assert accelerator["resourceType"] == train["resources"]["accelerator"]["resourceType"]
    ignored = {"podMetadata"}
    assert {k: v for k, v in platform.items() if k not in ignored} == {
        k: v for k, v in of_train.items() if k not in ignored
    }  # security context, mounts, node pool, secrets, deadline


def test_its_run_arguments_are_declared_like_the_others(boxed: Package) -> None:
    assert boxed.inputs.keys() == INPUTS.keys() | LOCALISE.keys()
    for name, one in LOCALISE.items():
        assert boxed.inputs[name]["description"] == one.help, name
        assert boxed.inputs[name].get("defaultValue", one.default) in (one.default, reference("localise")), name


def test_it_stands_after_train_and_register_waits_for_it(documents: list[dict[str, Any]]) -> None:
    tasks = all_tasks(documents)
    assert set(tasks["localise"]["dependentTasks"]) == {"shard", "train"}
    assert "localise" not in tasks["gate"]["dependentTasks"]
    assert "localise" in tasks["condition-2"]["dependentTasks"]
    assert tasks["localise"]["cachingOptions"] == {"enableCache": True}
    given = tasks["localise"]["inputs"]["parameters"]
    for name in ("images", "images_version"):  # the annotations lie where the images do
        assert given[name] == tasks["shard"]["inputs"]["parameters"][name]


def test_dvc_and_kubeflow_pass_the_same_flags(documents: list[dict[str, Any]]) -> None:
    dvc = optional.with_stages((ROOT / "dvc.yaml").read_text(), ["localise"])
    stages = YAML(typ="safe", pure=True).load(dvc)["stages"]
    for name, parser in (("localise", localise_parser), ("register", register_parser)):
        words = stages[name]["cmd"].split()[3:]
        container, _ = test_package.executors(documents)[name]
        ours, theirs = ([word for word in each if word.startswith("--")] for each in (words, container["args"]))
        assert [flag for flag in ours if flag != "--dvc-metrics"] == theirs[:-1]
        assert parser().parse_args(words)
    assert {"models/localiser", "data/localisations"} <= set(stages["register"]["deps"])


def test_the_server_takes_it_and_the_program_its_command(boxed: Package, tmp_path: Path) -> None:
    kfprules.package(boxed.text.encode())
    given = {
        "params": {"seed": 1.0}, "images": "/store/imagenet", "images_version": "1", "shards": "store:shards/a#1.dir",
        "checkpoint": "store:checkpoints/a#1.dir", "image": "x", "gpus": "8", "cpu": "16", "memory": "64Gi",
    }  # fmt: skip
    command = command_of(boxed, "localise", given, tmp_path / "out")
    job = trainjob_parser().parse_args(command[command.index("components.trainjob") + 1 :])
    assert (job.nodes, job.gpus, job.module) == (1, 8, "components.localise")
    parsed = localise_parser().parse_args(job.arguments)
    assert (parsed.images, parsed.boxes) == ("/store/imagenet", "store:boxes/{key}")
    assert parsed.executor_output == f"{tmp_path}/out/localise-output.json"


def test_resources_are_those_of_training(boxed: Package) -> None:
    def resources(*settings: str) -> list[str]:
        found = gather(boxed, SCENES, [], list(settings))
        return [found[f"localise_{name}"] for name in ("gpus", "cpu", "memory")]

    assert resources("gpus=8", "train_cpu=32", "nodes=2") == ["8", "32", "64Gi"]
    assert resources("gpus=0") == ["0", "16", "64Gi"]
    assert resources("gpus=8", "localise_gpus=4") == ["4", "16", "64Gi"]


def test_submitting_a_file_with_the_section_starts_a_run_with_the_step(
    world: World,
    boxed: Package,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submit, "compiled", lambda localised=False: boxed if localised else world.package)
    world.kfp.frames = [Frame("RUNNING")]
    world.submit("--no-image-check", "--params", SCENES)
    world.submit("--no-image-check", "--params", SCENES, "-S", "localise=null")
    world.submit("--no-image-check")
    given = [run["runtime_config"]["parameters"] for run in world.kfp.runs]
    assert ["localise" in each for each in given] == [True, False, False]
    assert given[0]["localise"]["train_scale"] == 72
    assert [boxed.is_spec(version["pipeline_spec"]) for version in world.kfp.versions] == [True, False]


def test_a_mistyped_file_is_no_reason_to_leave_the_step_out(tmp_path: Path) -> None:
    with pytest.raises(WrongParameters, match=r"digit-scene\.yaml: cannot be read"):
        submit.main(["--compile", str(tmp_path / "package.yaml"), "--params", "recipes/digit-scene.yaml"])
    assert list(tmp_path.iterdir()) == []
