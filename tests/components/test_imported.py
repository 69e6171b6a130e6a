"""An imported network in every program that takes a checkpoint: all say where it is from, none claims a training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import chain
import numpy as np
import pytest
import torch
import weightfiles
from conftest import ALONE, NARROW, draw, train_params

from components.classify.__main__ import main as classify
from components.lineage.__main__ import main as lineage
from components.tracking import access
from components.weights import origin
from components.weights.__main__ import main as weights
from runtime.errors import BadData, Refused
from runtime.shards.shardset import ShardSet
from vgg.network.trained import Trained
from vgg.training.run import start
from vgg.training.task import Task, describe

FILE = "imported from tiny.caffemodel (caffe, sha256 "


@pytest.fixture(scope="module")
def project(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[chain.Chain]:
    """Shards, and a network of Caffe as models/vgg, evaluated and registered; the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        where = tmp_path_factory.mktemp("imported")
        chain.prepare(where, empty_database, patch)
        # absolute: MLflow remembers what it has opened under a relative address in another folder
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{where}/mlflow.db")
        chain.run("shard")
        weightfiles.write(where / "tiny.caffemodel", "caffe", weightfiles.net(NARROW["A"], side=1, width=16))
        weights(["import", "tiny.caffemodel", "--as", "models/vgg", "--shards", "data/shards"])
        chain.run("evaluate")
        yield chain.register(where, access.connect())


def test_evaluated_as_one_of_ours(project: chain.Chain) -> None:
    metrics = json.loads(Path("metrics/evaluate.json").read_text())
    trained = Trained.open(Path("models/vgg"))
    assert metrics["weights_sha256"] == trained.weights_sha256
    assert np.isfinite(metrics["loss"])
    experiment = project.client.get_experiment_by_name("vgg-imagenet").experiment_id
    runs = project.client.search_runs([experiment], "tags.`vgg.stage` = 'pipeline'")
    assert [run.info.run_name.partition(" → ")[0] for run in runs] == ["folder · A · 32 px · imported tiny.caffemodel"]
    told = {"configuration": "A", "batch_norm": False, "train_scale": None, "input_size": 32, "source": "imported"}
    assert metrics["training"] == told


def test_a_version_says_where_it_is_from(project: chain.Chain) -> None:
    card = (project.files / "MODEL_CARD.md").read_text()
    assert f"3 classes of folder, {FILE}" in card
    assert "not trained here" in card
    assert "trained on" not in card
    tags = project.client.get_model_version("tiny", "1").tags
    made_of = json.loads(tags["provenance"])["chain"]["train"]
    assert made_of.keys() == {"digest", "weights_sha256", "imported"}
    assert made_of["imported"]["file"] == "tiny.caffemodel"


@pytest.mark.parametrize("reference", ["models:/tiny@champion", "models/vgg"])
def test_lineage_ends_at_the_file(reference: str, project: chain.Chain, capsys: pytest.CaptureFixture[str]) -> None:
    lineage([reference, "--verify"])
    told = " ".join(capsys.readouterr().out.split()).replace("│ ", "")
    assert FILE in told
    assert "not trained here" in told
    assert "its file does not say" in told
    assert "✗" not in told
    assert ("data/shards" in told) == reference.startswith("models:")  # those that it was evaluated on
    with pytest.raises(Refused, match="there is no training to repeat"):
        lineage(["reproduce", reference])


def test_lineage_of_a_version_without_the_checkpoint(project: chain.Chain, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move("models/vgg", "elsewhere")
    try:
        lineage(["models:/tiny/1"])
    finally:
        shutil.move("elsewhere", "models/vgg")
    assert FILE in " ".join(capsys.readouterr().out.split())


def test_classifies_at_the_publishers_scale(project: chain.Chain, capsys: pytest.CaptureFixture[str]) -> None:
    draw(Path("photo.png"), 3, (80, 60))
    classify(["models/vgg", "photo.png", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert {p["wnid"] for p in answer["predictions"]} == {"cat", "dog", "emu"}
    assert origin.publishers_scale(Trained.open(Path("models/vgg")).manifest) == 36


def test_shards_of_other_classes_are_refused(project: chain.Chain, tmp_path: Path) -> None:
    (tmp_path / "classes").write_text("cat\nemu\ndog\n")
    arguments = ["tiny.caffemodel", "--as", str(tmp_path / "net"), "--classes", str(tmp_path / "classes")]
    with pytest.raises(BadData, match="other classes than those of"):
        weights(["import", *arguments, "--shards", "data/shards"])
    weights(["import", *arguments])
    evaluate = chain.DVC["evaluate"]["cmd"].replace("models/vgg", str(tmp_path / "net")).split()[3:]
    with pytest.raises(Refused, match="other classes than those of"):
        chain.MAIN["evaluate"](evaluate)


def test_features_are_initial_weights_and_nothing_else(project: chain.Chain, tmp_path: Path) -> None:
    weightfiles.write(tmp_path / "f.h5", "keras", weightfiles.net(NARROW["A"], side=7, width=8, classes=5))
    arguments = [str(tmp_path / "f.h5"), "--as", str(tmp_path / "net"), "--shards", "data/shards"]
    weights(["import", *arguments, "--new-classifier"])
    with pytest.raises(Refused, match="convolutions only"):
        classify([str(tmp_path / "net"), "photo.png"])
    evaluate = chain.DVC["evaluate"]["cmd"].replace("models/vgg", str(tmp_path / "net")).split()[3:]
    with pytest.raises(Refused, match="convolutions only"):
        chain.MAIN["evaluate"](evaluate)
    shards, initial = ShardSet(Path("data/shards")), Trained.open(tmp_path / "net")
    changes = {"init": "checkpoint", "input_size": 224, "classifier_width": 8, "train_scale": 224, "standardise": False}
    task = Task(params=train_params(**changes), shards=shards, directory=tmp_path, code={}, initial=initial)
    metadata = describe(task, ALONE.device)
    model = start(task, metadata, ALONE).model
    assert metadata["run"]["initial"] == initial.weights_sha256
    # as the file was made for: R, G, B minus the mean of the release
    image = torch.full((1, 3, 224, 224), 90.0)
    found = model.features[0](image - torch.tensor(shards.mean)[:, None, None])
    network = initial.network()
    expected = network.features[0](image - torch.tensor(initial.manifest["pixels"]["mean"])[:, None, None])
    assert torch.allclose(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-3)
