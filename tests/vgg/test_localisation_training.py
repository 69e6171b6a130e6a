"""Localisation trains with the loop of classification: targets, loss, frozen layers, resume, ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ALONE, NUM_TRAIN, NUM_VAL, task, train_params
from trainings import Points, StopAt, files, run

from runtime.distributed import Group
from runtime.errors import Preempted, Refused
from runtime.shards.batches import ROW, Crops, as_crops
from runtime.shards.loader import Loader
from runtime.shards.shardset import ShardSet
from vgg.data.stream import training_batches
from vgg.localisation import boxes as geometry
from vgg.localisation.instances import Instances
from vgg.localisation.objective import Localisation, from_unit, in_unit
from vgg.network.model import VGG, Architecture
from vgg.network.trained import Trained
from vgg.params.localise import LocaliseParams
from vgg.training.loop import losses, train
from vgg.training.run import start
from vgg.training.task import Task, describe

LOCALISE = {
    "pixel_origin": 0, "on_box_mismatch": "fail", "regression": "per_class", "trainable": "all",
    "min_visible": 0.5, "dropout": 0.5, "instances": "drawn",
    "train_scale": 36, "flip": True, "epochs": 2, "batch_size": 8, "learning_rate": 0.01,
    "schedule": {"rule": "steps", "warmup_epochs": 0, "drop_factor": 10, "drop_epochs": [1]}, "seed": 3,
    "test_scales": [36], "match": "centre_iou", "merge_threshold": 0.7, "fuse": [], "classify": [],
    "blacklist": None,
}  # fmt: skip


def params(**changes: Any) -> LocaliseParams:
    return LocaliseParams.model_validate({**LOCALISE, **changes})


def made_up(shards: ShardSet, name: str, without: int = 3) -> Instances:
    """One or two boxes for every image but each `without`-th."""
    rows, random = shards.split(name).rows, np.random.default_rng(1)
    counts = np.array([0 if i % without == without - 1 else 1 + i % 2 for i in range(len(rows))])
    sides = np.repeat(np.stack([rows["width"], rows["height"]], -1), counts, 0)
    corners = np.sort(random.integers(0, sides[:, None] + 1, (len(sides), 2, 2)), 1).astype(np.float64)
    boxes = np.concatenate([corners[:, 0], np.maximum(corners[:, 1], corners[:, 0] + 4)], 1)
    return Instances(np.concatenate([[0], np.cumsum(counts)]), boxes)


def objective(shards: ShardSet, **changes: Any) -> Localisation:
    instances = {name: made_up(shards, name) for name in ("train", "val")}
    return Localisation(params(**changes), instances, "d" * 32)


@pytest.fixture
def classifier(narrow: None, shards: ShardSet, tmp_path: Path) -> Trained:
    run(shards, tmp_path / "classifier", epochs=1, batch_norm=True)
    return Trained.open(tmp_path / "classifier")


def localisation(shards: ShardSet, directory: Path, classifier: Trained, **changes: Any) -> Task:
    made = objective(shards, **changes)
    wanted = made.params.of_training(classifier.manifest["network"], classifier.manifest["run"]["train"])
    return Task(
        params=wanted, shards=shards, directory=directory, code={"loop.py": "1"}, initial=classifier, objective=made
    )


def crops_of(boxes: list[list[float]], labels: list[int]) -> Crops:
    rows = np.zeros(len(labels), ROW)
    rows["label"], rows["box"] = labels, boxes
    return as_crops(torch.zeros(0), rows)


def test_only_the_true_classs_box_gets_a_gradient(shards: ShardSet) -> None:
    outputs = torch.zeros(2, 12, requires_grad=True)
    target = [[0.1, 0.0, 0.5, 0.25], [0.0, 0.0, 1.0, 1.0]]
    measured = objective(shards).measure(outputs, crops_of(target, [2, 0]))
    assert measured.loss.item() == pytest.approx((0.1**2 + 0.5**2 + 0.25**2 + 2) / 2)
    measured.loss.backward()
    assert outputs.grad is not None
    changed = outputs.grad.view(2, 3, 4).ne(0).any(2)
    assert changed.tolist() == [[False, False, True], [True, False, False]]
    assert torch.equal(outputs.grad[1, :4], -torch.tensor(target[1]))
    # a crop that does not show enough of its box has no target
    outputs.grad = None
    hidden = objective(shards).measure(outputs, crops_of([[float("nan")] * 4, target[1]], [2, 0]))
    hidden.loss.backward()
    assert (int(hidden.num_images), hidden.loss.item()) == (1, 1.0)
    assert not outputs.grad[0].any() and outputs.grad.isfinite().all()


def test_right_boxes_are_counted(shards: ShardSet) -> None:
    found = torch.tensor([[0.0, 0, 1, 1], [0.0, 0, 1, 1], [0.5, 0, 0.2, 1], [0.0, 0, -1, 1]])
    target = [[0.0, 0, 1, 1], [0.0, 0, 1, 0.5], [0.0, 0, 1, 1], [0.0, 0, 1, 1]]
    measured = objective(shards, regression="single").measure(found, crops_of(target, [0, 1, 2, 0]))
    right, overlap = measured.right.tolist()
    assert right == 2  # IoU 1 and exactly 0.5; a box of negative width is none
    assert overlap == pytest.approx(1 + 0.5 + 0.1 / 1.1)


def test_per_class_with_one_class_is_single(shards: ShardSet) -> None:
    outputs, target = torch.randn(5, 4), torch.rand(5, 4).tolist()
    crops = crops_of(target, [0] * 5)
    one, other = (objective(shards, regression=kind).measure(outputs, crops) for kind in ("single", "per_class"))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("outputs", "expected"), [(4000, 150_648_544), (4, 134_276_932)])
def test_numbers_of_parameters(outputs: int, expected: int) -> None:
    with torch.device("meta"):
        model = VGG(Architecture("D", False, 4096, outputs, 224))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_targets_are_where_the_boxes_are(shards: ShardSet) -> None:
    """The crop's pixels inside of the box are those of the source inside of the box; NaN where too little is seen."""
    made = objective(shards, min_visible=0.5)
    split, wanted = made.split(shards, "train"), train_params(train_scale=36)
    instances, numbers = made.instances["train"], np.arange(len(split))
    epochs = np.zeros(len(split), np.int64)
    make = made.training_crops(split, wanted, lambda jpegs, windows, into: {})
    rows = make((numbers, epochs), np.zeros((len(split), 32, 32, 3), np.uint8))
    assert len(split) == NUM_TRAIN - NUM_TRAIN // 3
    hidden = 0
    for number, row in zip(numbers, rows, strict=True):
        window = make.crops.windows(numbers[number : number + 1], epochs[:1], 32)[0]  # type: ignore[attr-defined]
        seen = geometry.visible(geometry.to_crop(instances.of(number), window, 32), 32)
        if np.isnan(row["box"]).any():
            hidden += 1
            assert seen.min() < 0.5
            continue
        box = from_unit(row["box"][None].astype(np.float64), 32)
        box = geometry.flip(box, 32) if row["flip"] else box
        source = geometry.from_crop(box, window, 32)
        assert np.abs(source - instances.of(number)).max(1).min() < 1e-4
    assert 0 < hidden < len(split)
    assert rows["flip"].any() and not rows["flip"].all()


def test_the_largest_box_of_every_image() -> None:
    boxes = np.array([[0.0, 0, 2, 2], [0, 0, 3, 3], [5, 5, 8, 8], [1, 1, 2, 2]])
    largest = Instances(np.array([0, 3, 3, 4]), boxes).largest()
    assert (largest.first.tolist(), largest.boxes.tolist()) == ([0, 1, 1, 2], [boxes[1].tolist(), boxes[3].tolist()])


def test_units_round_trip() -> None:
    boxes = np.array([[0.0, 0.0, 224.0, 224.0], [-30.0, 10.5, 100.0, 300.0]])
    assert in_unit(boxes, 224)[0].tolist() == [0, 0, 1, 1]
    assert np.allclose(from_unit(in_unit(boxes, 224), 224), boxes)


@pytest.mark.parametrize("trainable", ["first_last", "fc", "all"])
def test_frozen_layers_keep_their_bits_and_resume_ends_with_the_same_bytes(
    trainable: str, shards: ShardSet, classifier: Trained, tmp_path: Path
) -> None:
    straight = localisation(shards, tmp_path / "straight", classifier, trainable=trainable)
    train(straight, ALONE, Points(), StopAt(None))
    for stop_at in (1, 2, 1):
        with pytest.raises(Preempted, match="the state is saved"):
            stopped = localisation(shards, tmp_path / "stopped", classifier, trainable=trainable)
            train(stopped, ALONE, Points(), StopAt(stop_at))
    train(localisation(shards, tmp_path / "stopped", classifier, trainable=trainable), ALONE, Points(), StopAt(None))
    assert files(tmp_path / "stopped") == files(tmp_path / "straight")
    trained = Trained.open(tmp_path / "straight")
    before, after = classifier.step.weights(), trained.step.weights()
    same = {name for name in before if name in after and torch.equal(before[name], after[name])}
    features = {name for name in before if name.startswith("features.")}
    if trainable == "all":
        assert not {name for name in same if name.endswith(".weight")}
    else:
        assert same >= features  # running statistics of batch norm, too
        assert ("classifier.3.weight" in same) == (trainable == "first_last")
        assert "classifier.0.weight" not in same
        assert not any(name.startswith("features.") for name in trained.step.momentum())
    assert after["classifier.6.weight"].shape == (12, 16)
    assert [*trained.step.state["history"][-1]] == [
        "epoch", "step", "learning_rate", "train_loss", "train_box_error", "val_loss", "val_box_error",
        "val_box_distance",
    ]  # fmt: skip


def test_the_number_of_ranks_changes_no_gradient(narrow: None, shards: ShardSet, classifier: Trained) -> None:
    def gradients(world_size: int) -> list[torch.Tensor]:
        total = []
        for rank in range(world_size):
            group = Group(rank, world_size, 0, 1, torch.device("cpu"))
            wanted = localisation(shards, Path("none"), classifier, trainable="fc")
            ours, split = start(wanted, describe(wanted, group.device), group), wanted.split("train")
            loader = Loader(rank=rank, world_size=world_size)
            crops = next(training_batches(loader, split, wanted.params, range(1), wanted.objective.training_crops))
            losses(ours, crops)[0].backward()
            total.append([p.grad for p in ours.model.parameters() if p.requires_grad])
        return [sum(parts) / world_size for parts in zip(*total, strict=True)]

    for ours, whole in zip(gradients(3), gradients(1), strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-4)


def test_a_network_that_has_learnt_one_image_gives_its_box(narrow: None, shards: ShardSet, tmp_path: Path) -> None:
    """Of all crops of it, in pixels of the source."""
    run(shards, tmp_path / "classifier", epochs=1)
    classifier = Trained.open(tmp_path / "classifier")
    first = np.minimum(np.arange(NUM_VAL + 1), 1)  # only the first image has a box
    one = Instances(first, np.array([[4.0, 6.0, 30.0, 31.0]]))
    late = {"rule": "steps", "warmup_epochs": 5, "drop_factor": 10, "drop_epochs": [150]}
    made = Localisation(
        params(epochs=200, batch_size=1, learning_rate=0.02, flip=False, min_visible=0.0, dropout=0.0, schedule=late),
        {"train": one, "val": one},
        "d",
    )
    record = {**train_params().model_dump(), "colour_shift": 0.0, "checkpoint_steps": 1000}
    only = replace(shards.split("val"), rows=np.asarray(shards.split("val").rows[:1]))
    made._splits = {"train": only, "val": only}
    wanted = made.params.of_training(classifier.manifest["network"], record)
    todo = Task(params=wanted, shards=shards, directory=tmp_path / "one", code={}, initial=classifier, objective=made)
    train(todo, ALONE, Points(), StopAt(None))
    last = Trained.open(tmp_path / "one").step.state["history"][-1]
    assert (last["val_box_error"], last["val_box_distance"] < 0.1) == (0.0, True), last


def test_first_weights_of_another_network_or_class_list_are_refused(
    shards: ShardSet, classifier: Trained, tmp_path: Path
) -> None:
    wanted = localisation(shards, tmp_path / "new", classifier)
    other = replace(wanted, params=wanted.params.model_copy(update={"classifier_width": 8}))
    with pytest.raises(Refused, match="needs the same network; classifier_width"):
        train(other, ALONE, Points(), StopAt(None))
    classifier.manifest["run"]["data"]["classes_sha256"] = "0" * 64
    with pytest.raises(Refused, match="is of other classes"):
        train(wanted, ALONE, Points(), StopAt(None))


def test_validation_counts_every_image_once(shards: ShardSet) -> None:
    made = objective(shards)
    assert len(made.split(shards, "val")) == NUM_VAL - NUM_VAL // 3
    assert task(shards).objective.split(shards, "val") is not made.split(shards, "val")
