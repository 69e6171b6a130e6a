"""A tiny project with everything from its images to a version in the registry, made in this process."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import EVALUATE, NARROW, REGISTER, ROOT, SHARD, TRAIN, draw_images
from ruamel.yaml import YAML

from components.evaluate.__main__ import main as evaluate
from components.register.registry import read_evaluation
from components.register.version.package import Package
from components.register.version.stored import FILES_TAG, write_files
from components.shard.__main__ import main as shard
from components.tracking import access, provenance
from components.train.__main__ import main as train
from runtime.shards.shardset import ShardSet
from vgg.network.model import CONFIGURATIONS
from vgg.params.register import RegisterParams

DVC = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
MAIN = {"shard": shard, "train": train, "evaluate": evaluate}


@dataclass(frozen=True)
class Chain:
    """where: the project.  files: folder of version 1 of model tiny in the artifact store."""

    where: Path
    client: Any
    files: Path


def make(where: Path, database: Path, patch: pytest.MonkeyPatch) -> Chain:
    """Run shard, train and evaluate with the commands of dvc.yaml, and register the network; stays in that folder."""
    prepare(where, database, patch)
    for stage in MAIN:
        run(stage)
    return register(where, access.connect())


def run(stage: str) -> None:
    """Run a stage with its command of dvc.yaml, in the current folder."""
    MAIN[stage](DVC[stage]["cmd"].split()[3:])


def prepare(where: Path, database: Path, patch: pytest.MonkeyPatch) -> None:
    """A project with images and parameters; it becomes the current folder."""
    shutil.copy(database, where / "mlflow.db")
    for name in ("MLFLOW_TRACKING_URI", "VGG_JOURNAL", "VGG_STORE", "DVC_ROOT"):
        patch.delenv(name, raising=False)
    patch.setenv("VGG_PIPELINE_RUN", "run-1")
    for name, stages in NARROW.items():
        patch.setitem(CONFIGURATIONS, name, stages)
    draw_images(where / "data/images")
    shutil.copy(ROOT / "dvc.yaml", where / "dvc.yaml")
    params = {"shard": SHARD, "train": {**TRAIN, "epochs": 1, "schedule": {**TRAIN["schedule"], "drop_epochs": []}}}
    (where / "params.yaml").write_text(json.dumps({**params, "evaluate": EVALUATE, "register": REGISTER}))
    patch.chdir(where)


def register(where: Path, client: Any) -> Chain:
    """A version as components.register makes it, without MLflow's packaging and the serving check, which take long."""
    package = Package.open(
        ShardSet(Path("data/shards")), Path("models/vgg"), Path("data/predictions"),
        evaluation := read_evaluation(Path("metrics/evaluate.json")), RegisterParams.model_validate(REGISTER),
    )  # fmt: skip
    inputs = {
        "shards": package.shards.digest, "checkpoint": package.trained.digest,
        "predictions": package.predictions_digest, "weights_sha256": package.trained.weights_sha256,
    }  # fmt: skip
    record = provenance.record("register", REGISTER, inputs)
    tags = {"vgg.stage": "register", "vgg.model": "tiny/1", **provenance.tags(record)}
    run = client.create_run(client.get_experiment_by_name("vgg-imagenet").experiment_id, tags=tags)
    package.write(where / "version", record)
    files_sha256 = write_files(where / "version")
    client.log_artifacts(run.info.run_id, str(where / "version"), "model")
    client.set_terminated(run.info.run_id)
    client.create_registered_model("tiny")
    found = {name: evaluation[name] for name in ("top1_error", "top5_error", "num_images", "data_digest")}
    created = client.create_model_version(
        "tiny", f"{run.info.artifact_uri}/model", run.info.run_id,
        tags={
            "weights_sha256": package.trained.weights_sha256,
            "evaluation": json.dumps(found),
            "provenance": json.dumps({**record, "chain": package.chain()}),
            FILES_TAG: files_sha256,
        },
    )  # fmt: skip
    client.set_registered_model_alias("tiny", "champion", created.version)
    return Chain(where, client, Path(run.info.artifact_uri.removeprefix("file://")) / "model")


def flip(path: Path, position: int = -1) -> None:
    """Flip one bit of a file, by default in its last byte; doing it twice changes nothing."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
