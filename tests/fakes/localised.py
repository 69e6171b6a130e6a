"""A tiny project with box annotations, and what the stage localise makes of it, run once for all tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import EVALUATE, REGISTER, SHARD, TRAIN, draw_images, once, program
from trainings import files, run

from runtime.shards.shardset import ShardSet
from runtime.targets import Directory
from vgg.params.shard import ShardParams
from vgg.sharding.pack import pack
from vgg.sharding.scenes import voc_xml
from vgg.sharding.sources import Folder

LOCALISE: dict[str, Any] = {
    "pixel_origin": 0, "on_box_mismatch": "fail", "regression": "per_class", "trainable": "fc",
    "min_visible": 0.5, "dropout": 0.5, "instances": "drawn",
    "train_scale": 36, "flip": True, "epochs": 1, "batch_size": 8, "learning_rate": 0.001,
    "schedule": {"rule": "steps", "warmup_epochs": 0, "drop_factor": 10, "drop_epochs": []}, "seed": 3,
    "test_scales": [36, 64], "match": "centre_iou", "merge_threshold": 0.7, "fuse": [], "classify": [],
    "blacklist": "blacklist.txt",
}  # fmt: skip


def flags(t: Path) -> list[object]:
    return [
        "--params", t / "params.yaml", "--images", t / "images", "--shards", t / "shards", "--checkpoint", t / "model",
        "--boxes", t / "boxes", "--localiser", t / "localiser", "--localisations", t / "localisations",
        "--curves", t / "m/localise.csv", "--report", t / "m/localisation.html",
        "--metrics", t / "m/localise.json", "--dvc-metrics", t / "m/dvc.json",
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


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """Images, annotations, shards, a trained classifier and parameters."""

    def make(folder: Path) -> None:
        draw_images(folder / "images")
        pack(ShardParams(**SHARD), Folder(folder / "images"), Directory(folder / "shards"), "test", num_workers=1)
        shards = ShardSet(folder / "shards")
        run(shards, folder / "model", epochs=1)
        annotate(folder / "images", shards)
        sections = {"shard": SHARD, "train": TRAIN, "evaluate": EVALUATE, "localise": LOCALISE, "register": REGISTER}
        (folder / "params.yaml").write_text(json.dumps(sections))
        (folder / "blacklist.txt").write_text("2\n5\n")
        shutil.copy(empty_database, folder / "mlflow.db")

    return once(tmp_path_factory, "localise", make)


@pytest.fixture
def project(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def shards(project: Path) -> ShardSet:
    return ShardSet(project / "shards")


@pytest.fixture(scope="session")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after a run that nothing disturbs; read it only.  stderr: what the run said."""

    def make(folder: Path) -> None:
        shutil.copytree(prepared, folder, dirs_exist_ok=True)
        done = program("localise", *flags(folder), cwd=folder)
        assert done.returncode == 0, done.stderr
        (folder / "stderr").write_text(done.stderr)

    return once(tmp_path_factory, "localised", make)


@pytest.fixture
def straight(finished: Path) -> dict[str, bytes]:
    """The outputs of the undisturbed run, by path."""
    return outputs(finished)


def outputs(project: Path) -> dict[str, bytes]:
    """What the stage has made, by path; without its provenance record, which tells the time."""
    folders = ("boxes", "localiser", "localisations", "m")
    return {
        f"{name}/{path}": data
        for name in folders
        for path, data in files(project / name).items()
        if not path.endswith(".record.json")
    }
