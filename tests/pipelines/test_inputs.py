"""The run arguments: declared once, and the same in the pipeline, in Kubeflow, in --help, in the docs, on its page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, environment

from pipelines import arguments, submit
from pipelines.definition import inputs
from pipelines.definition import package as packages
from pipelines.definition.inputs import INPUTS
from pipelines.definition.package import Package

KINDS = {int: "NUMBER_INTEGER", str: "STRING", dict: "STRUCT", list: "LIST"}


def test_the_compiled_pipeline_has_these_inputs_with_their_descriptions(package: list[dict[str, Any]]) -> None:
    found = package[0]["root"]["inputDefinitions"]["parameters"]
    assert found.keys() == INPUTS.keys()
    for name, one in INPUTS.items():
        assert found[name]["description"] == one.help and found[name]["parameterType"] == KINDS[one.kind], name
        if not name.endswith("_image"):
            assert found[name].get("defaultValue") == one.default, name
        else:
            assert found[name]["defaultValue"].startswith("localhost/")


def test_the_steps_are_those_of_the_pipeline(package: list[dict[str, Any]]) -> None:
    executors = {name.removeprefix("exec-") for name in package[0]["deploymentSpec"]["executors"]}
    assert set(packages.STEPS) == executors | {"localise"}  # which comes with its section


def test_help_and_docs_list_every_run_argument() -> None:
    help_text = submit.parser().format_help()
    for one in inputs.settable():
        assert f" {one.name} ({inputs.WORDS[one.kind]}, " in help_text and one.help in help_text, one.name
    assert inputs.table() in (ROOT / "docs/cluster.md").read_text()  # print(inputs.table()) gives it


def test_the_arguments_for_the_page_are_those_of_a_submission(
    package_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line is an argument and its value."""
    recipe, text = str(ROOT / "recipes/imagenet-a-256.yaml"), package_file.read_text()
    compiled = Package(text, *yaml.load_all(text, yaml.CSafeLoader))
    monkeypatch.setattr(submit, "compiled", lambda _localised: compiled)
    submit.main(["--arguments", recipe, "-C", "gpus=8", "-C", "train_cpu=64"])
    first, *lines, last = capsys.readouterr().out.splitlines()
    found: dict[str, Any] = {}
    for line in lines:
        found |= json.loads("{" + line.removesuffix(",") + "}")
    assert found == json.loads("\n".join([first, *lines, last]))
    assert found == arguments.gather(compiled, recipe, [], ["gpus=8", "train_cpu=64"])
    assert (found["gpus"], found["step_gpus"], found["step_cpu"]) == (8, "8", "64")  # no contradiction on the page


def test_the_step_refuses_fewer_gpus_than_the_run_argument() -> None:
    """gpus typed into Kubeflow's page, and step_gpus left; no machine has 99."""
    command = [sys.executable, "-m", "components.trainjob", "--nodes", "1", "--gpus", "99", "--cpu", "2"]
    command += ["--memory", "4Gi", "components.train", "--help"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(KFP_POD_NAME="a-pod"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 64 and "Set the run argument step_gpus to 99, as gpus" in done.stderr
