"""Parameters: every mistake named at once, both roads equal, and the shipped files are valid."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, TRAIN, program

from vgg.errors import WrongParameters
from vgg.params import STAGES, load, section_model
from vgg.params.train import TrainParams

SHIPPED = [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("stage", STAGES)
def test_shipped_files_are_valid_and_survive_the_kubeflow_road(path: Path, stage: str) -> None:
    model = section_model(stage)
    by_file = load(str(path), stage, model)
    as_kubeflow = json.dumps(by_file.model_dump(), default=str).replace("null", "null")
    floats = json.loads(as_kubeflow, parse_int=float)  # Kubeflow turns 74 into 74.0
    assert load(json.dumps(floats), stage, model) == by_file


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    for old, new in (
        ("batch_size:", "batch_sise:"),
        ("epochs: ", "epochs: 2.5\n  epochs: 1 #"),
        ("weight_decay: 0.0005", "weight_decay: -1"),
        ("momentum: 0.9", "momentum: fast"),
        ("evaluate:", "evalaute:"),
        ("max_top1_error: 0.02", "max_top1_error: 2"),
        ("  samples_per_shard: 256\n", ""),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(WrongParameters) as caught:
        load(str(path), "train", TrainParams)
    message = str(caught.value)
    for expected in (
        "batch_sise: unknown key; did you mean 'batch_size'?",
        "train.batch_size: is missing",
        "train.epochs: stands twice",
        "train.epochs: should be a valid integer, not 2.5",
        "train.weight_decay: should be greater than or equal to 0, not -1",
        "train.momentum: should be a valid number, not 'fast'",
        "evalaute: unknown section; did you mean 'evaluate'?",
        "section 'evaluate' is missing",
        "register.gate.max_top1_error: should be less than or equal to 1, not 2",
        "shard.samples_per_shard: is missing",
    ):
        assert expected in message, message
    line = text.splitlines().index("  weight_decay: -1") + 1
    assert f"{path}:{line}: train.weight_decay" in message


@pytest.mark.parametrize("stage", STAGES)
def test_mutants_of_the_default_file_are_refused(stage: str, tmp_path: Path) -> None:
    """Every leaf in turn: removed, renamed, of another type, absurd.  None passes, none is a traceback."""
    section = load(str(ROOT / "params.yaml"), stage, section_model(stage)).model_dump()
    for key, value in section.items():
        others = {k: v for k, v in section.items() if k != key}
        mutants = [others, {**others, key + "x": value}, {**section, key: {"a": [None]}}, {**section, key: None}]
        if not isinstance(value, bool):
            mutants.append({**section, key: True})
        if isinstance(value, int | float):
            mutants += [{**section, key: -1e9}, {**section, key: str(value)}]
        for mutant in mutants:
            with pytest.raises(WrongParameters):
                load(json.dumps(mutant), stage, section_model(stage))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_scale": [64, 32]}, "Smin 64 is above Smax 32"),
        ({"train_scale": 32, "input_size": 64}, "32 is below input_size 64"),
        ({"input_size": 33}, "multiple of 32"),
        ({"schedule": {**TRAIN["schedule"], "drop_epochs": [3, 2]}}, "must rise"),
        ({"schedule": {"rule": "plateau"}}, "patience"),
    ],
)
def test_parameters_that_contradict_each_other(changes: dict, said: str) -> None:
    with pytest.raises(WrongParameters, match=said):
        load(json.dumps({**TRAIN, **changes}), "train", TrainParams)


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text().replace("weight_decay: 0.0005", "weight_decay: 5e-4"))
    assert load(str(path), "train", TrainParams).weight_decay == 0.0005


def test_a_program_refuses_wrong_parameters_at_once_with_64(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("train: {epochs: many}\nshard: 3\n")
    done = program(
        "train",
        *("--params", path),
        *["--shards", "a", "--initial", "b", "--checkpoint", "c", "--curves", "d", "--metrics", "e"],
        cwd=tmp_path,
    )
    assert done.returncode == 64
    assert "section 'evaluate' is missing" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [path]  # nothing was begun


def test_wrong_usage_exits_with_64(tmp_path: Path) -> None:
    assert program("shard", "--bogus", cwd=tmp_path).returncode == 64
