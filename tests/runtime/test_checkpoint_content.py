"""A correct sha256 is not enough: tensors, state and manifests are what their names say."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    ALONE,
    METADATA,
    MOMENTUM,
    NETWORK,
    STATE,
    WEIGHTS,
    cut,
    finished,
    rewrite_manifest,
    rewrite_manifests,
    saved,
    tensors,
    tiny,  # noqa: F401  # a fixture
    with_state,
)
from safetensors.torch import save, save_file

from runtime import checkpoint, manifest
from runtime.checkpoint import FILES, Tensors, step_name
from runtime.errors import Refused
from vgg.network.trained import Trained, shapes_of
from vgg.training.task import Continue, find_run


def rewritten(name: str, content: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    """Replace the tensors of one file."""

    def change(step: Path) -> None:
        weights, momentum = tensors()
        save_file(content(weights if name == FILES[0] else momentum), step / name)

    return change


def resized(step: Path) -> None:
    metadata = json.loads((step / manifest.NAME).read_bytes())
    metadata["files"][0]["size"] = str(metadata["files"][0]["size"])
    body = {name: value for name, value in metadata.items() if name not in ("schema", "files", "sha256")}
    (step / manifest.NAME).write_bytes(manifest.text(manifest.compose(metadata["schema"], body, metadata["files"])))


FIRST = "features.0.weight"


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty weights": (lambda step: (step / WEIGHTS).write_bytes(b""), WEIGHTS),
    "garbage weights": (lambda step: (step / WEIGHTS).write_bytes(random.Random(1).randbytes(999)), WEIGHTS),
    "weights with a tail": (lambda step: (step / WEIGHTS).write_bytes(save(tensors()[0]) + b"tail"), WEIGHTS),
    "momentum instead of weights": (rewritten(WEIGHTS, lambda _: tensors()[1]), WEIGHTS),
    "no weights": (rewritten(WEIGHTS, lambda _: {}), WEIGHTS),
    "a missing weight": (rewritten(WEIGHTS, lambda t: {k: v for k, v in t.items() if k != FIRST}), WEIGHTS),
    "an additional weight": (rewritten(WEIGHTS, lambda t: {**t, "extra": torch.zeros(1)}), WEIGHTS),
    "another shape": (rewritten(WEIGHTS, lambda t: {**t, FIRST: t[FIRST].flatten()}), WEIGHTS),
    "another type": (rewritten(WEIGHTS, lambda t: {**t, FIRST: t[FIRST].half()}), WEIGHTS),
    "a complex type": (rewritten(WEIGHTS, lambda t: {**t, FIRST: t[FIRST].to(torch.complex64)}), WEIGHTS),
    "garbage momentum": (lambda step: (step / MOMENTUM).write_bytes(b"{}" * 50), MOMENTUM),
    "weights instead of momentum": (rewritten(MOMENTUM, lambda _: tensors()[0]), MOMENTUM),
    "half a momentum": (rewritten(MOMENTUM, lambda t: {FIRST: t[FIRST]}), MOMENTUM),
    "state that is not JSON": (lambda step: (step / STATE).write_bytes(b"\xff\xfe{"), STATE),
    "state nested too deeply": (lambda step: (step / STATE).write_text("[" * 100_000), STATE),
    "state that is a list": (with_state(lambda state: [state]), STATE),
    "state of another step": (with_state(lambda state: {**state, "step": 1}), STATE),
    "state that is not finite": (with_state(lambda state: {**state, "best_error": float("nan")}), STATE),
    "network of an unknown configuration": (
        lambda step: rewrite_manifest(step, network={**NETWORK, "configuration": "F"}),
        "manifest.json",
    ),
    "network with a text for a number": (
        lambda step: rewrite_manifest(step, network={**NETWORK, "input_size": "32"}),
        "manifest.json",
    ),
    "empty network": (lambda step: rewrite_manifest(step, network={}), "manifest.json"),
    "manifest without a network": (lambda step: rewrite_manifest(step, network=None), "manifest.json"),
    "manifest without a run": (lambda step: rewrite_manifest(step, run=None), "manifest.json"),
    "manifest with a text for the step": (lambda step: rewrite_manifest(step, step="two"), "manifest.json"),
    "manifest with a text for a size": (resized, "manifest.json"),
    "manifest with fewer files": (lambda step: rewrite_manifest(step, names=[WEIGHTS, MOMENTUM]), "manifest.json"),
    "manifest with a path outside the folder": (
        lambda step: rewrite_manifest(step, names=[*FILES, f"../{step_name(1)}/{STATE}"]),
        "manifest.json",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_correct_sha256_is_not_enough(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In a finished training and as the newest of an unfinished one: the message names the file."""
    change, name = WRONG[kind]
    step = finished(tmp_path / "model") / step_name(2)
    change(step)
    rewrite_manifests(step, names=None) if name != manifest.NAME else rewrite_manifest(step.parent, checkpoint.SCHEMA)
    with pytest.raises(Refused) as refused:
        Trained.open(tmp_path / "model")
    assert str(refused.value).startswith(f"{step / name}: ")
    (tmp_path / "model" / manifest.NAME).unlink()
    found = find_run(tmp_path / "model", METADATA, False, ALONE)
    assert isinstance(found, Continue)
    assert found.step.step == 1
    assert str(step / name) in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, "unknown": 1},
        lambda state: {k: v for k, v in state.items() if k != "best_error"},
        lambda state: {**state, "history": "none"},
        lambda state: {**state, "best_step": "1"},
        lambda state: {**state, "window": {"a": 1}},
    ],
)
def test_an_invalid_state_is_skipped(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = saved(tmp_path, 1), saved(tmp_path, 2)
    with_state(change)(second)
    rewrite_manifest(second)
    found = find_run(tmp_path, METADATA, False, ALONE)
    assert isinstance(found, Continue)
    found = found.step
    assert found.path == first
    assert f"{second / STATE}: not the state of a training" in caplog.text

    whole = finished(tmp_path / "whole")
    with_state(change)(whole / step_name(2))
    rewrite_manifests(whole / step_name(2))
    with pytest.raises(Refused, match="not the state of a training"):
        find_run(whole, METADATA, False, ALONE)


@pytest.mark.parametrize("step", [1, 2])
def test_a_training_with_a_damaged_checkpoint_is_not_finished(step: int, tmp_path: Path) -> None:
    """The best one was not read since it was saved; a new manifest would confirm the damage."""
    for number in (1, 2):
        saved(tmp_path, number)
    cut(0.5)(tmp_path / step_name(step) / WEIGHTS)
    with pytest.raises(Refused, match=f"{step_name(step)}/{WEIGHTS}"):
        checkpoint.finish(tmp_path, 2, 1, METADATA, shapes_of)
    assert not (tmp_path / manifest.NAME).exists()


@pytest.mark.parametrize("step", [1, 2])
def test_a_training_with_an_incomplete_checkpoint_is_not_finished(step: int, tmp_path: Path) -> None:
    for number in (1, 2):
        saved(tmp_path, number)
    (tmp_path / step_name(step) / WEIGHTS).unlink()
    with pytest.raises(Refused, match=f"{step_name(step)}/{WEIGHTS}: missing"):
        checkpoint.finish(tmp_path, 2, 1, METADATA, shapes_of)
    assert not (tmp_path / manifest.NAME).exists()


def test_a_size_that_only_the_manifest_has_is_refused(tmp_path: Path) -> None:
    """With the right sha256: a digest computed elsewhere must not stand for the size."""
    saved(tmp_path, 1)
    path = saved(tmp_path, 2) / manifest.NAME
    metadata = json.loads(path.read_bytes())
    entries = [{**entry, "size": entry["size"] + (entry["path"] == WEIGHTS)} for entry in metadata["files"]]
    body = {name: value for name, value in metadata.items() if name not in ("schema", "files", "sha256")}
    path.write_bytes(manifest.text(manifest.compose(metadata["schema"], body, entries)))
    with pytest.raises(Refused, match=f"{step_name(2)}/{WEIGHTS}: has"):
        checkpoint.finish(tmp_path, 2, 1, METADATA, shapes_of)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"last": "../../elsewhere"}, "last and best are"),
        ({"best": None}, "best: Field required"),
        ({"names": [f"{step_name(2)}/{STATE}"]}, "lists"),
        ({"network": {**NETWORK, "num_classes": 4}}, "'network' differs from"),
        ({"classes": []}, "'classes' differs from"),
    ],
)
def test_a_wrong_finished_manifest_is_refused(body: dict[str, Any], message: str, tmp_path: Path) -> None:
    rewrite_manifest(finished(tmp_path / "model"), checkpoint.SCHEMA, **body)
    with pytest.raises(Refused, match=message) as refused:
        Trained.open(tmp_path / "model")
    assert str(refused.value).startswith(str(tmp_path / "model" / manifest.NAME))


def test_valid_checkpoints_are_opened(tmp_path: Path) -> None:
    """So the refusals above are caused by the changes, not by the tiny checkpoint."""
    trained = Trained.open(finished(tmp_path / "model"))
    rewrite_manifests(trained.step.path)
    again = Trained.open(tmp_path / "model")
    weights, momentum = tensors(seed=2)
    for name, tensor in again.network().state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert again.step.momentum().keys() == momentum.keys()
    (tmp_path / "model" / "README.md").write_text("as in data/initial")
    Trained.open(tmp_path / "model", "best")
    rewritten(MOMENTUM, lambda _: {})(trained.step.path)  # none with plain SGD
    rewrite_manifests(trained.step.path)
    assert Trained.open(tmp_path / "model").step.momentum() == {}
