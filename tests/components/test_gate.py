"""The gate as a separate step before registration: compares with the champion, and tracks its result."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.register.gate import gate_passes, main
from components.tracking import access, provenance
from runtime.errors import Refused
from runtime.shards.shardset import ShardSet

SECTION = {"model_name": "vgg", "gate": {"max_top1_error": 0.3, "max_top5_error": 0.2, "max_regression": 0.01}}


def evaluation(path: Path, shards: ShardSet, **changes: Any) -> Path:
    found = {
        "headline": "dense", "modes": {}, "top1_error": 0.2, "top5_error": 0.1,
        "num_images": len(shards.split("val")), "weights_sha256": "a" * 64, "data_digest": shards.digest,
    }  # fmt: skip
    path.write_text(json.dumps({**found, **changes}))
    return path


def check(tmp_path: Path, shards: ShardSet, path: Path) -> bool:
    answer = tmp_path / "answer.json"
    arguments = ["--params", json.dumps(SECTION), "--shards", str(shards.directory), "--evaluation", str(path)]
    main([*arguments, "--answer", str(answer)])
    return bool(json.loads(answer.read_text()))


def tag(client: MlflowClient) -> str:
    """Tag vgg.gate of the pipeline's run in MLflow."""
    experiment = client.get_experiment_by_name(access.EXPERIMENT)
    [parent] = client.search_runs([experiment.experiment_id], f"tags.`vgg.lineage` = '{provenance.lineage('{}')}'")
    return str(parent.data.tags["vgg.gate"])


def test_a_good_model_passes(client: MlflowClient, shards: ShardSet, tmp_path: Path) -> None:
    assert check(tmp_path, shards, evaluation(tmp_path / "e.json", shards))
    assert tag(client) == "passed"


def test_a_failure_is_reported_with_its_reason(
    client: MlflowClient, shards: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not check(tmp_path, shards, evaluation(tmp_path / "e.json", shards, top1_error=0.4))
    assert "max_top1_error" in tag(client)
    assert "gate failed: top1_error 0.4000" in caplog.text


def test_the_model_is_compared_with_the_champion(client: MlflowClient, shards: ShardSet, tmp_path: Path) -> None:
    """The error may exceed the champion's by max_regression at most; the champion itself always passes."""
    client.create_registered_model("vgg")
    measured = {"top1_error": 0.15, "top5_error": 0.1, "num_images": 43, "data_digest": shards.digest}
    tags = {"weights_sha256": "c" * 64, "evaluation": json.dumps(measured)}
    version = client.create_model_version("vgg", str(tmp_path), tags=tags).version
    client.set_registered_model_alias("vgg", "champion", version)
    assert not check(tmp_path, shards, evaluation(tmp_path / "worse.json", shards))
    assert "above the champion's 0.1500" in tag(client)
    assert check(tmp_path, shards, evaluation(tmp_path / "near.json", shards, top1_error=0.155))
    assert check(tmp_path, shards, evaluation(tmp_path / "same.json", shards, weights_sha256="c" * 64))


def test_an_invalid_evaluation_is_refused(client: MlflowClient, shards: ShardSet, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text("{}")
    with pytest.raises(Refused, match="lacks"):
        check(tmp_path, shards, path)


def test_the_component_runs_this_program_as_a_step(
    client: MlflowClient, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Kubeflow's Python component calls it: a bool, or the program's exit code."""
    good, bad = evaluation(tmp_path / "e.json", shards), tmp_path / "bad.json"
    bad.write_text("{}")
    assert gate_passes(SECTION, str(shards.directory), str(good)) is True
    with pytest.raises(SystemExit) as exited:
        gate_passes(SECTION, str(shards.directory), str(bad))
    assert exited.value.code == 78
