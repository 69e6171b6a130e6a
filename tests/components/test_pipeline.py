"""DVC and Kubeflow run the same pipeline: same programs, flags, parameters and dependencies."""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, all_tasks, environment, executor_input, make_repository
from ruamel.yaml import YAML

from components.closure import closure, fingerprints
from components.summary import missing
from runtime.errors import WrongParameters
from runtime.store.storage import locate, resolve
from vgg.params import STAGES, load, section_model

yaml = YAML(typ="safe", pure=True)
DVC = yaml.load(ROOT / "dvc.yaml")["stages"]


def parser(stage: str) -> argparse.ArgumentParser:
    return importlib.import_module(f"components.{stage}.__main__").parser()


def arguments_in_dvc(stage: str) -> list[str]:
    command = DVC[stage]["cmd"].split()
    assert command[:3] == ["python", "-m", f"components.{stage}"]
    return command[3:]


def arguments_in_kubeflow(package: list[dict[str, Any]], stage: str) -> list[str]:
    """The component's arguments, with placeholders replaced as Kubeflow does: all numbers become floats."""
    container = package[0]["deploymentSpec"]["executors"][f"exec-{stage}"]["container"]
    assert container["command"][:3] == ["python", "-m", "components.step"]
    assert container["command"][-1] == f"components.{stage}"
    section = load(str(ROOT / "params.yaml"), stage, section_model(stage)).model_dump()
    floats = json.dumps(json.loads(json.dumps(section), parse_int=float))
    placeholders = {"{{$.inputs.parameters['params']}}": floats, "{{$}}": executor_input("/tmp/out.json")}
    return [placeholders.get(word, word) for word in container["args"]]


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_and_kubeflow_pass_the_same_flags_and_parameters(stage: str, package: list[dict[str, Any]]) -> None:
    variants = [arguments_in_dvc(stage), arguments_in_kubeflow(package, stage)]
    flags = [[word for word in arguments if word.startswith("--")] for arguments in variants]
    assert [f for f in flags[0] if f != "--dvc-metrics"] == [f for f in flags[1] if f != "--executor-input"]
    assert flags[1][-1] == "--executor-input"
    assert flags[0][0] == "--params"
    parsed = [vars(parser(stage).parse_args(arguments)) for arguments in variants]
    loaded = [
        load(str(ROOT / p["params"]) if p["params"] == "params.yaml" else p["params"], stage, section_model(stage))
        for p in parsed
    ]
    assert loaded[0] == loaded[1]


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_depends_on_the_whole_section_and_the_science_closure(stage: str) -> None:
    assert DVC[stage]["params"] == [stage]
    assert [dep for dep in DVC[stage]["deps"] if dep.endswith(".py")] == closure(stage)


def test_stages_have_the_same_dependencies(package: list[dict[str, Any]]) -> None:
    """A stage reads what earlier stages write, in dvc.yaml and in the tasks; the gate is an additional task."""
    tasks = all_tasks(package)
    written_by: dict[str, str] = {}
    for stage in STAGES:
        reads = {written_by[dep] for dep in DVC[stage]["deps"] if dep in written_by}
        waits = set(tasks[stage].get("dependentTasks", []))
        if stage == "register":  # inside the condition
            waits = set(tasks["condition-2"]["dependentTasks"]) - {"gate"}
        assert waits == reads
        outputs = [*DVC[stage]["outs"], *DVC[stage].get("metrics", [])]
        written_by |= {(next(iter(out)) if isinstance(out, dict) else out): stage for out in outputs}


def test_a_change_of_evaluation_does_not_retrain() -> None:
    trains = set(closure("train"))
    for stage in ("evaluate", "register"):
        own = {"vgg/network/dense.py", "vgg/evaluation/evaluate.py", "vgg/params/evaluate.py"}
        assert own <= set(closure(stage))
        assert not own & trains
    assert "vgg/sharding/pack.py" not in trains
    assert not {"vgg/training/loop.py", "vgg/training/run.py", "vgg/training/schedule.py", "vgg/data/stream.py"} & set(
        closure("evaluate")
    )


def test_a_comment_does_not_change_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "vgg", tmp_path / "vgg")
    shutil.copytree(ROOT / "runtime", tmp_path / "runtime")
    shutil.copytree(ROOT / "components", tmp_path / "components")
    monkeypatch.setattr("components.closure.ROOT", tmp_path)
    before = fingerprints("train")
    path = tmp_path / "vgg/training/schedule.py"
    path.write_text(path.read_text() + "\n# a remark\n")
    assert fingerprints("train") == before
    path.write_text(path.read_text() + "\nX = 1\n")
    assert [name for name in before if fingerprints("train")[name] != before[name]] == ["vgg/training/schedule.py"]


@pytest.mark.parametrize("stage", STAGES)
def test_help_is_fast_and_complete(stage: str) -> None:
    import time

    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", f"components.{stage}", "--help"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0
    assert "--executor-input" in done.stdout
    assert time.monotonic() - started < 5  # 0.06 s without heavy imports


def test_paths_and_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VGG_STORE", raising=False)
    with pytest.raises(WrongParameters, match="VGG_STORE is not set"):
        locate("store:shards")
    monkeypatch.setenv("VGG_STORE", str(tmp_path))
    first, second = (Path(resolve("store:shards/{key}", {"a": n})) for n in (1, 2))
    assert first.parent == tmp_path / "shards"
    assert first != second
    assert locate("store:shards/x#" + "0" * 32 + ".dir") == tmp_path / "shards/x"
    assert locate("C# photos") == Path("C# photos")
    with pytest.raises(WrongParameters, match="images are read from a local folder"):
        locate("s3://bucket/shards")


def test_overrides_are_checked_before_anything_is_submitted() -> None:
    from pipelines.submit import sections

    found = sections(str(ROOT / "params.yaml"), ["train.epochs=1", "train.schedule.drop_epochs=[1, 2]"])
    assert found["train"]["epochs"] == 1
    assert found["train"]["schedule"]["drop_epochs"] == [1, 2]
    for wrong in ("train.epoch=1", "train=3=4", "train.epochs", "train.epochs=many", "x.y=1"):
        with pytest.raises(WrongParameters):
            sections(str(ROOT / "params.yaml"), [wrong])


@pytest.mark.faults  # .ci/run has make run
def test_dvc_repro_reruns_only_what_changed(images: Path, params_file: Path, tmp_path: Path) -> None:
    """The real pipeline: run, run again, run after a change of evaluation, run after a new comment in training."""
    repo = make_repository(tmp_path)
    env = environment(PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin", GIT_CONFIG_GLOBAL="/dev/null")

    def call(*command: str) -> str:
        done = subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call("git", "init", "-q")

    def repro() -> list[str]:
        output = call("dvc", "repro")
        return [stage for stage in STAGES if f"Running stage '{stage}'" in output]

    assert repro() == list(STAGES)
    lock = yaml.load(repo / "dvc.lock")["stages"]
    assert lock["shard"]["outs"][0]["md5"] == json.loads((repo / "metrics/shard.json").read_text())["digest"]
    assert repro() == []
    path = repo / "vgg/evaluation/predictions.py"
    path.write_text(path.read_text().replace("TOP = 5", "TOP = 4 + 1"))
    assert repro() == ["evaluate", "register"]
    weights = lock["train"]["outs"][0]["md5"]
    path = repo / "vgg/training/schedule.py"
    path.write_text(path.read_text() + "\n# a remark\n")
    assert repro() == ["train"]  # DVC compares bytes; for the program the code is the same and the network is finished
    assert yaml.load(repo / "dvc.lock")["stages"]["train"]["outs"][0]["md5"] == weights


def test_the_summary_names_a_version_only_if_the_database_has_it(client: Any, tmp_path: Path) -> None:
    """DVC sees metrics/register.json and has nothing to do, whatever happened to the database."""
    model = {"model_name": "tiny", "version": 1}
    assert "To register it there: dvc repro -f -s register" in missing(model)
    client.create_registered_model("tiny")
    client.create_model_version("tiny", str(tmp_path))
    assert missing(model) == ""
