"""Parameters: all mistakes are reported at once, files and JSON give the same, and the shipped files are valid."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REGISTER, ROOT, TRAIN, environment, program

from components.train import plan
from pipelines import arguments
from runtime.errors import WrongParameters
from vgg.params import STAGES, load, section_model
from vgg.params.evaluate import EvaluateParams
from vgg.params.localise import LocaliseParams
from vgg.params.register import RegisterParams
from vgg.params.shard import ShardParams
from vgg.params.train import TrainParams

SHIPPED = [ROOT / "params.yaml", *sorted((ROOT / "recipes").rglob("*.yaml"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("stage", STAGES)
def test_shipped_files_are_valid_as_file_and_from_kubeflow(path: Path, stage: str) -> None:
    model = section_model(stage)
    by_file = load(str(path), stage, model)
    as_kubeflow = json.dumps(by_file.model_dump(), default=str).replace("null", "null")
    floats = json.loads(as_kubeflow, parse_int=float)  # Kubeflow turns 74 into 74.0
    assert load(json.dumps(floats), stage, model) == by_file


def test_the_table_names_permitted_values_and_ends_quietly_in_a_closed_pipe() -> None:
    command = f"{sys.executable} -m vgg.params"
    table = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    for row in (
        "| `train.configuration` | A, A-LRN, B, C, D, E |",
        "| `train.input_size` | an integer ≥ 32, ≤ 1,024, a multiple of 32 |",
        "| `train.dropout` | a number ≥ 0, < 1 |",
        "| `train.train_scale` | an integer ≥ 32, ≤ 4,096 or a list of 2 (an integer ≥ 32, ≤ 4,096) |",
        "| `train.schedule.drop_epochs` | a list of (a number > 0) |",
        "| `train.flip` | true or false |",
    ):
        assert row in table
    closed = subprocess.run(f"{command} | true", shell=True, cwd=ROOT, capture_output=True, timeout=60)
    assert closed.stderr == b""


SCRATCH, LATER = ("glorot", 0.01, 74), ("checkpoint", 0.001, 70)  # initial weights, learning rate, maximum epochs
FROM_A, JITTER = ("shallower", 0.01, 74), ("checkpoint", 0.001, 30)
LOW, HIGH, BOTH = [224, 256, 288], [352, 384, 416], [256, 512]
PAPER = {  # recipe: configuration, S, Q, start, previous recipe, top-1 and top-5 error % (Table 4; for A Table 3)
    "a-256": ("A", 256, [256], SCRATCH, None, 29.6, 10.4),
    "a-lrn-256": ("A-LRN", 256, [256], SCRATCH, None, 29.7, 10.5),
    "b-256": ("B", 256, LOW, FROM_A, "a-256", 28.2, 9.6),
    "c-256": ("C", 256, LOW, FROM_A, "a-256", 27.7, 9.2),
    "c-384": ("C", 384, HIGH, LATER, "c-256", 27.8, 9.2),
    "c-jitter": ("C", BOTH, [256, 384, 512], JITTER, "c-384", 26.3, 8.2),
    "d-256": ("D", 256, LOW, FROM_A, "a-256", 26.6, 8.6),
    "d-384": ("D", 384, HIGH, LATER, "d-256", 26.5, 8.6),
    "d-jitter": ("D", BOTH, [256, 384, 512], JITTER, "d-384", 24.8, 7.5),
    "e-256": ("E", 256, LOW, FROM_A, "a-256", 26.9, 8.7),
    "e-384": ("E", 384, HIGH, LATER, "e-256", 26.7, 8.6),
    "e-jitter": ("E", BOTH, [256, 384, 512], JITTER, "e-384", 24.8, 7.5),
}
TORCHVISION = {  # recipe: batch norm, learning rate, top-1 and top-5 accuracy % of a centre crop (torchvision's vgg.py)
    "d-torchvision": (False, 0.01, 71.592, 90.382),
    "d-bn": (True, 0.1, 73.360, 91.516),
}

LOCALISED = {  # recipe: that of its classification network, Q, claims (appendix A, %)
    "d-localise-256": ("d-256", [256], ("29.5",)),
    "d-localise-384": ("d-384", [352, 384], ("33.1", "34.3", "36.4", "28.2", "27.5", "26.9")),
}


def recipe(name: str) -> tuple[str, TrainParams, EvaluateParams, RegisterParams]:
    """Header and sections of an ImageNet recipe."""
    path = ROOT / f"recipes/imagenet-{name}.yaml"
    models: list[Any] = [TrainParams, EvaluateParams, RegisterParams]
    sections = [load(str(path), stage, model) for stage, model in zip(STAGES[1:], models, strict=True)]
    return path.read_text().split("\nshard:")[0], *sections


def test_every_imagenet_recipe_is_from_the_paper_or_torchvision() -> None:
    found = {path.stem.removeprefix("imagenet-") for path in SHIPPED if path.stem.startswith("imagenet-")}
    assert found == {*PAPER, *TORCHVISION, *LOCALISED}


@pytest.mark.parametrize("name", LOCALISED)
def test_localisation_recipes_have_the_numbers_of_appendix_a(name: str) -> None:
    classifier, test_scales, claims = LOCALISED[name]
    header, *sections = recipe(name)
    assert sections == list(recipe(classifier)[1:])
    localise = load(str(ROOT / f"recipes/imagenet-{name}.yaml"), "localise", LocaliseParams)
    assert all(claim in header for claim in claims)
    assert (localise.regression, localise.trainable, localise.learning_rate) == ("per_class", "all", 0.001)
    assert (localise.train_scale, localise.test_scales) == (sections[0].train_scale, test_scales)  # type: ignore[attr-defined]
    wanted = localise.of_training({**TRAIN, "num_classes": 1000}, None)
    assert (wanted.init, wanted.dropout, wanted.weight_decay, wanted.colour_shift) == ("checkpoint", 0.5, 0.0005, 0.1)


@pytest.mark.parametrize("name", [*PAPER, *TORCHVISION, *LOCALISED])
def test_common_values_of_all_imagenet_recipes(name: str) -> None:
    header, train, evaluate, register = recipe(name)
    assert (train.batch_size, train.momentum, train.dropout) == (256, 0.9, 0.5)
    assert (train.input_size, train.classifier_width, train.flip, train.seed) == (224, 4096, True, 1)
    assert evaluate.weights == "last"
    assert load(str(ROOT / f"recipes/imagenet-{name}.yaml"), "shard", section_model("shard")).source == "ilsvrc2012"  # type: ignore[attr-defined]
    lines = re.findall(r"^#   (\w+) +(.+)", header, re.M)
    words = ["before", "command", "hardware", "time", "expected", "differs"]
    assert [word for word, _ in lines] == (words if train.init in ("shallower", "checkpoint") else words[1:])
    assert dict(lines)["command"] == f"cp recipes/imagenet-{name}.yaml params.yaml && make run"
    assert dict(lines)["time"] == "not measured yet"
    assert max(map(len, header.splitlines())) <= 120
    assert register.gate.max_regression == 0.005


@pytest.mark.parametrize("name", PAPER)
def test_recipes_from_the_paper_have_its_numbers(name: str) -> None:
    configuration, scale, test_scales, start, before, top1, top5 = PAPER[name]
    header, train, evaluate, register = recipe(name)
    assert (train.configuration, train.train_scale, evaluate.test_scales) == (configuration, scale, test_scales)
    assert (train.init, train.learning_rate, train.epochs) == start
    assert f": {top1} / {top5} % top-1 / top-5 error" in header
    assert ("Table 3" if configuration.startswith("A") else "Table 4") in header
    if before:
        assert f"recipes/imagenet-{before}.yaml: cp -r models/vgg/. data/initial/" in header
    assert (train.weight_decay, train.colour_shift, train.crop) == (0.0005, 0.1, "scale")
    assert not train.standardise
    assert not train.batch_norm
    assert (evaluate.flip, evaluate.softmax, evaluate.ceil_pooling) == (True, "after_mean", False)
    unstated = {"warmup_epochs": 0, "patience": 5, "min_improvement": 1e-4}
    assert train.schedule.model_dump() == {"rule": "plateau", "drop_factor": 10, "max_drops": 3, **unstated}
    for gate, expected in ((register.gate.max_top1_error, top1), (register.gate.max_top5_error, top5)):
        assert 0.005 < gate - expected / 100 < 0.0101


def test_each_network_has_one_name_in_the_registry() -> None:
    """Runs at other scales are versions of the same model; other networks have their own."""
    names: dict[str, set[str]] = {}
    for name, row in [*PAPER.items(), *((name, (name,)) for name in TORCHVISION)]:
        names.setdefault(row[0], set()).add(recipe(name)[3].model_name)
    assert all(len(models) == 1 for models in names.values())
    assert len(set.union(*names.values())) == len(names)


@pytest.mark.parametrize("name", TORCHVISION)
def test_recipes_from_torchvision_have_its_numbers(name: str) -> None:
    batch_norm, rate, top1, top5 = TORCHVISION[name]
    header, train, evaluate, register = recipe(name)
    assert (train.configuration, train.batch_norm, train.learning_rate) == ("D", batch_norm, rate)
    assert (train.epochs, train.weight_decay, train.init, train.crop) == (90, 1e-4, "kaiming", "area")
    assert (train.standardise, train.colour_shift, train.train_scale) == (True, 0.0, 256)
    steps = {"rule": "steps", "drop_factor": 10, "drop_epochs": [30, 60]}
    assert train.schedule.model_dump() == {**steps, "warmup_epochs": 1}
    assert (evaluate.test_scales, evaluate.methods) == ([256], ["centre_crop"])  # as the reference evaluates
    joined = re.sub(r"\n#\s+", " ", header)
    assert f"{top1:.3f} / {top5:.3f} % top-1 / top-5 accuracy ({100 - top1:.3f} / {100 - top5:.3f} % error)" in joined
    for gate, accuracy in ((register.gate.max_top1_error, top1), (register.gate.max_top5_error, top5)):
        assert 0.005 < gate - (100 - accuracy) / 100 < 0.0101


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
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
        "train.epochs: duplicate",
        "train.epochs: must be an integer ≥ 1, ≤ 10,000, not 2.5",
        "train.weight_decay: must be a number ≥ 0, < 1, not -1",
        "train.momentum: must be a number ≥ 0, < 1, not 'fast'",
        "evalaute: unknown section; did you mean 'evaluate'?",
        "section 'evaluate' is missing",
        "register.gate.max_top1_error: must be a number ≥ 0, ≤ 1, not 2",
        "shard.samples_per_shard: is missing",
    ):
        assert expected in message, message
    line = text.splitlines().index("  weight_decay: -1") + 1
    assert f"{path}:{line}: train.weight_decay" in message


@pytest.mark.parametrize("stage", STAGES)
def test_mutants_of_the_default_file_are_refused(stage: str, tmp_path: Path) -> None:
    """Every key in turn: removed, renamed, of another type, out of range.  Each raises WrongParameters."""
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
    ("changes", "expected"),
    [
        ({"train_scale": [64, 32]}, "Smin 64 is above Smax 32"),
        ({"train_scale": 32, "input_size": 64}, "32 is below input_size 64"),
        ({"input_size": 33}, "multiple of 32"),
        ({"crop": "area"}, "only the scale of validation: must be one number"),
        ({"schedule": {**TRAIN["schedule"], "drop_epochs": [3, 2]}}, "must be ascending"),
        ({"schedule": {"rule": "plateau"}}, "patience"),
    ],
)
def test_parameters_that_contradict_each_other(changes: dict, expected: str) -> None:
    with pytest.raises(WrongParameters, match=expected):
        load(json.dumps({**TRAIN, **changes}), "train", TrainParams)


def test_mistakes_in_json_are_reported_at_once() -> None:
    """Duplicate keys, invalid values and parameters that contradict each other."""
    section = {**TRAIN, "input_size": 64, "train_scale": [64, 32], "momentum": 2}
    text = json.dumps(section).replace('"flip": true', '"flip": true, "flip": false')
    with pytest.raises(WrongParameters) as caught:
        load(text, "train", TrainParams)
    message = str(caught.value)
    assert message.startswith("--params: 3 invalid parameters:")
    for expected in (
        "--params: flip: duplicate",
        "train.train_scale: Smin 64 is above Smax 32; 32 is below input_size 64",
        "train.momentum: must be a number ≥ 0, < 1, not 2",
    ):
        assert expected in message, message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train_scale": "x"}, "train.train_scale: must be an integer ≥ 32, ≤ 4,096 or a list of 2 (an integer"),
        ({"train_scale": [32, "x"]}, "train.train_scale: must be an integer ≥ 32, ≤ 4,096 or a list of 2 (an integer"),
        ({"micro_batch_size": 0}, "train.micro_batch_size: must be auto or an integer ≥ 1, ≤ 1,048,576, not 0"),
        ({"configuration": "F"}, "train.configuration: must be A, A-LRN, B, C, D, E, not 'F'"),
        ({"flip": "yes"}, "train.flip: must be true or false, not 'yes'"),
        ({"schedule": {**TRAIN["schedule"], "rule": "cosine"}}, "rule must be plateau or steps, not 'cosine'"),
        ({"schedule": {}}, "train.schedule: rule must be plateau or steps"),
        ({"schedule": 3}, "train.schedule: must be keys with values, not 3"),
        ({"schedule": {**TRAIN["schedule"], "drop_epochs": [1, "x"]}}, "train.schedule.drop_epochs: must be a list of"),
        ({"schedule": {**TRAIN["schedule"], "dropepochs": []}}, "did you mean 'drop_epochs'?"),
        ({"init": "kaimin"}, ", not 'kaimin'; did you mean 'kaiming'?"),
        ({"epochs": None}, "train.epochs: must be an integer ≥ 1, ≤ 10,000, not None"),
    ],
)
def test_a_mistake_is_one_line_in_our_own_words(changes: dict, expected: str) -> None:
    with pytest.raises(WrongParameters) as caught:
        load(json.dumps({**TRAIN, **changes}), "train", TrainParams)
    heading, *lines = str(caught.value).splitlines()
    assert heading == "--params: 1 invalid parameter:"
    assert len(lines) == 1
    assert expected in lines[0]
    assert not re.search(r"constrained|literal|\[|Input|tag", lines[0].replace("[32, 'x']", "").replace("[1, 'x']", ""))


def test_text_of_a_form_says_which() -> None:
    with pytest.raises(
        WrongParameters, match=r"register.model_name: must be text of the form \[A-Za-z0-9\].*, not 'a/b:c'"
    ):
        load(json.dumps({**REGISTER, "model_name": "a/b:c"}), "register", RegisterParams)


def test_parameters_of_two_sections_that_contradict_each_other(tmp_path: Path) -> None:
    """Found by every stage, by the plan and before a submission, not by evaluate after a week of training."""
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text()
    path.write_text(text.replace("input_size: 32", "input_size: 64").replace("  - 32\n  - 36\n", "  - 64\n  - 64\n"))
    line = next(n for n, line in enumerate(text.splitlines(), 1) if "test_scales" in line)
    expected = f"{path}:{line}: evaluate.test_scales: 32, 33, 34 below train.input_size, 64"
    for stage in STAGES:
        with pytest.raises(WrongParameters, match=re.escape(expected)):
            load(str(path), stage, section_model(stage))
    with pytest.raises(WrongParameters, match=re.escape(expected)):
        plan.main(["--params", str(path)])
    with pytest.raises(WrongParameters, match=r"evaluate\.test_scales: 32, 33, 34 below train\.input_size, 64"):
        arguments.sections(str(ROOT / "params.yaml"), ["train.input_size=64", "train.train_scale=64"])


def test_parameters_without_effect_are_reported_by_the_first_stage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text()
    path.write_text(text.replace("epochs: 10", "epochs: 8").replace("max_quarantined: 0", "max_quarantined: 3"))
    late = "train.schedule.drop_epochs: 9 without effect: training ends after 8 epochs"
    unused = "shard.max_quarantined: 3 has no effect with on_bad_image: fail"

    def reported(work: Callable[[], object]) -> list[str]:
        caplog.clear()
        work()
        return [record.getMessage() for record in caplog.records]

    assert reported(lambda: load(str(path), "shard", ShardParams)) == [unused, late]
    assert reported(lambda: load(str(path), "train", TrainParams)) == [late]
    assert reported(lambda: load(str(path), "evaluate", EvaluateParams)) == []
    assert reported(lambda: arguments.sections(str(path), [])) == [unused, late]


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
    assert list(tmp_path.iterdir()) == [path]  # nothing was started


@pytest.mark.parametrize("module", ["components.shard", "vgg.params", "vgg.training.trouble"])
def test_wrong_usage_exits_with_64(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", module, "--bogus", "--bogus"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, f"python -m {module}: " in done.stderr) == (64, True), done.stderr
