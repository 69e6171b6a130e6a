"""The exit task of a pipeline run: the parent run gets its state, and the page shows the main figures."""

import json
from pathlib import Path

import pytest
from conftest import executor_input
from mlflow import MlflowClient

from components.report.__main__ import main
from components.tracking import access, provenance
from components.tracking.tracker import Tracker


def stage(name: str, **metrics: float) -> None:
    """A step of the run, as its program tracks it."""
    with Tracker(name, name * 4, provenance.lineage("{}")) as tracker:
        tracker.metrics(metrics)


def report(tmp_path: Path, **status: object) -> str:
    arguments = ["--status", json.dumps(status), "--summary", str(tmp_path / "page.md")]
    main([*arguments, "--executor-input", executor_input(tmp_path / "executor.json")])
    output = json.loads((tmp_path / "executor.json").read_text())
    assert output["artifacts"]["summary"]["artifacts"][0]["uri"] == str(tmp_path / "page.md")
    return (tmp_path / "page.md").read_text()


def test_a_run_with_a_lost_step_is_closed_and_reported(client: MlflowClient, tmp_path: Path) -> None:
    stage("shard", **{"data/num_train": 1501.0})
    stage("train")
    experiment = client.get_experiment_by_name(access.EXPERIMENT).experiment_id
    lost = client.search_runs([experiment], "tags.`vgg.stage` = 'train'")[0].info.run_id
    client.update_run(lost, "RUNNING")  # killed: it could not report its end
    page = report(tmp_path, state="FAILED", error={"code": 9, "message": "OOMKilled\nexit 137"})
    assert client.get_run(lost).info.status == "FAILED"
    [parent] = client.search_runs([experiment], "tags.`vgg.stage` = 'pipeline'")
    assert parent.info.status == "FAILED"
    assert parent.data.tags["vgg.pipeline.state"] == "FAILED"
    assert "# Run run-1 failed" in page
    assert "> OOMKilled\n> exit 137" in page
    assert "| shard | finished | 1,501 training images |" in page
    assert "resume run-1" in page


@pytest.mark.parametrize(("state", "status"), [("SUCCEEDED", "FINISHED"), ("CANCELLED", "KILLED")])
def test_the_parent_run_gets_the_state_of_the_pipeline_run(
    state: str, status: str, client: MlflowClient, tmp_path: Path
) -> None:
    stage("evaluate", top1_error_percent=25.0)
    page = report(tmp_path, state=state)
    experiment = client.get_experiment_by_name(access.EXPERIMENT).experiment_id
    [parent] = client.search_runs([experiment], "tags.`vgg.stage` = 'pipeline'")
    assert parent.info.status == status
    assert "25.00 % top-1 error" in page
    assert ("resume" in page) == (state != "SUCCEEDED")


def test_an_unreachable_tracking_server_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("VGG_PIPELINE_RUN", "run-2")
    assert "# Run run-2 succeeded" in report(tmp_path, state="SUCCEEDED")
    assert "the page has no figures: MLflow at http://127.0.0.1:9 does not answer" in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    assert "# Run run-2 succeeded" in report(tmp_path, state="SUCCEEDED")
    assert "the page has no figures: MLFLOW_TRACKING_URI=nonsense://x: unknown scheme" in caplog.text
