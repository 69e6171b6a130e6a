"""The localise stage as a program: annotations in, boxes out, twice the same, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NUM_TRAIN, NUM_VAL, program
from trainings import run

from runtime.shards.shardset import ShardSet
from vgg.localisation import devkit, metric
from vgg.localisation.boxset import BoxSet
from vgg.sharding.scenes import voc_xml

LOCALISE: dict[str, Any] = {
    "pixel_origin": 0, "on_box_mismatch": "fail", "regression": "per_class", "trainable": "fc",
    "min_visible": 0.5, "instances": "drawn",
    "train_scale": 36, "flip": True, "epochs": 1, "batch_size": 8, "learning_rate": 0.01,
    "schedule": {"rule": "steps", "warmup_epochs": 0, "drop_factor": 10, "drop_epochs": []}, "seed": 3,
    "test_scales": [36, 64], "match": "centre_iou", "merge_threshold": 0.7, "fuse": [], "classify": [],
    "blacklist": None,
}  # fmt: skip


def flags(t: Path) -> list[object]:
    return [
        "--params", t / "params.yaml", "--images", t / "images", "--shards", t / "shards", "--checkpoint", t / "model",
        "--boxes", t / "boxes", "--localiser", t / "localiser", "--localisations", t / "localisations",
        "--curves", t / "m/localise.csv", "--metrics", t / "m/localise.json", "--dvc-metrics", t / "m/dvc.json",
    ]  # fmt: skip


def annotate(images: Path, shards: ShardSet) -> None:
    """One box for every image, beside it: the middle of it."""
    for split in ("train", "val"):
        rows = shards.split(split).rows
        for number in range(len(rows)):
            wnid, _, stem = shards.split(split).key(number).partition("_")
            width, height = int(rows["width"][number]), int(rows["height"][number])
            box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
            path = images / "annotations" / split / wnid / f"{stem}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(voc_xml(f"{stem}.jpg", width, height, [(wnid, box)]))


@pytest.fixture
def project(images: Path, shards: ShardSet, params_file: Path, tmp_path: Path) -> Path:
    parameters = json.loads(params_file.read_text())
    params_file.write_text(json.dumps({**parameters, "localise": LOCALISE}))
    run(shards, tmp_path / "model", epochs=1)
    annotate(images, shards)
    return tmp_path


def test_from_annotations_to_boxes(project: Path, shards: ShardSet) -> None:
    blacklist(project, "2\n5\n")
    done = program("localise", *flags(project), cwd=project)
    assert done.returncode == 0, done.stderr
    assert "class given (Table 8)" in done.stderr and "mean box (nothing learnt)" in done.stderr
    metrics = json.loads((project / "m/localise.json").read_text())
    boxes = BoxSet.open(project / "boxes", shards)
    assert [int(boxes.split(name).has_box.sum()) for name in ("train", "val")] == [NUM_TRAIN, NUM_VAL]
    counted = [metrics["classification"]["num_images"]]
    counted += [found["num_images"] for kind in ("localisation", "class_given") for found in metrics[kind].values()]
    assert counted == [NUM_VAL] + 7 * [NUM_VAL - 2]  # the devkit's two denominators
    assert metrics["floors"]["mean_box"] == 0.0  # they are all in the middle
    assert metrics["top5_localisation_error"] <= metrics["top1_localisation_error"]
    assert metrics["top5_classification_error"] == 0.0  # there are three classes
    # the official format scores as the metrics say
    split = shards.split("val")
    keys = [split.key(number) for number in range(len(split))]
    guesses, found = devkit.read_predictions(project / "localisations/val.pred.det.txt", keys, [1, 2, 3])
    true = boxes.split("val")
    right = metric.judge(split.rows["label"].astype(np.int64), guesses, metric.best_ious(true.first, true.boxes, found))
    errors = metric.summary(metric.counts(right, np.isin(np.argsort(np.argsort(keys)), (1, 4))))["localisation"]
    assert errors == metrics["localisation"]["merged"]
    assert json.loads((project / "m/dvc.json").read_text()).keys() == {
        "top5_localisation_error", "class_given_error", "centre_crop_error", "mean_iou",
    }  # fmt: skip
    for picture in ("boxes.png", "overlaps.png"):
        assert (project / "localisations" / picture).read_bytes().startswith(b"\x89PNG")
    assert len((project / "m/localise.csv").read_text().splitlines()) == 2


@pytest.mark.faults
def test_again_nothing_is_trained_and_a_partner_must_be_a_localiser(project: Path) -> None:
    done = program("localise", *flags(project), cwd=project)
    assert done.returncode == 0, done.stderr
    first = (project / "m/localise.json").read_bytes()
    done = program("localise", *flags(project), cwd=project)
    assert done.returncode == 0, done.stderr
    assert "images a step" not in done.stderr
    assert (project / "m/localise.json").read_bytes() == first
    next((project / "images/annotations/val").rglob("*.xml")).unlink()  # not believed to be as before
    changed = program("localise", *flags(project), cwd=project)
    assert (changed.returncode, "without a box of its class" in changed.stderr) == (65, True), changed.stderr
    annotate(project / "images", ShardSet(project / "shards"))
    edit(project, '"fuse": []', f'"fuse": ["{project}/localiser"]')  # with itself nothing moves but the scores
    done = program("localise", *flags(project), cwd=project)
    assert done.returncode == 0, done.stderr
    fused = json.loads((project / "m/localise.json").read_text())
    assert fused["class_given"]["centre_crop"] == json.loads(first)["class_given"]["centre_crop"]
    edit(project, f'"fuse": ["{project}/localiser"]', f'"fuse": ["{project}/model"]')
    done = program("localise", *flags(project), cwd=project)
    assert (done.returncode, "no localiser of the classes" in done.stderr) == (78, True), done.stderr


def edit(project: Path, old: str, new: str) -> None:
    path = project / "params.yaml"
    path.write_text(path.read_text().replace(old, new))


def blacklist(project: Path, numbers: str | None) -> None:
    """Name a file of blacklisted images; numbers: its content, None: there is no file."""
    edit(project, '"blacklist": null', f'"blacklist": "{project}/blacklist.txt"')
    if numbers is not None:
        (project / "blacklist.txt").write_text(numbers)


@pytest.mark.parametrize(
    ("break_it", "code", "said"),
    [
        (lambda p: next((p / "images/annotations/val").rglob("*.xml")).unlink(), 65, "without a box of its class"),
        (lambda p: edit(p, '"fc"', '"FC"'), 64, "localise.trainable"),
        (lambda p: edit(p, '"localise"', '"localize"'), 64, "localize: unknown section"),
        (lambda p: edit(p, '"train_scale": 36', '"train_scale": 31'), 64, "localise.train_scale"),
        (lambda p: blacklist(p, "1\n14\n"), 65, "'14' is no image; expected different numbers from 1 to 13"),
        (lambda p: blacklist(p, None), 64, "blacklist.txt: No such file"),
    ],
    ids=["no box", "parameter", "section", "scale", "blacklist", "no blacklist"],
)
def test_what_does_not_fit_is_named(break_it: Any, code: int, said: str, project: Path) -> None:
    break_it(project)
    done = program("localise", *flags(project), cwd=project)
    assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr
    assert not (project / "m/localise.json").exists()
