"""Every run in MLflow once, without duplicate points, and none that is RUNNING for ever; in a database and a server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflowserver import server
from ports import free_port

from components.tracking import access
from components.tracking.__main__ import replay
from components.tracking.tracker import Tracker, journal_key, output_key
from runtime.errors import Preempted, Refused
from runtime.manifest import digest_of


@pytest.fixture(params=["database", pytest.param("server", marks=pytest.mark.faults)])
def mlflow(
    request: pytest.FixtureRequest, tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MlflowClient]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VGG_PIPELINE_RUN", raising=False)
    monkeypatch.setattr("components.tracking.tracker.RETRY_SECONDS", 0.2)
    monkeypatch.setattr("components.tracking.tracker.PREEMPTED_FLUSH_SECONDS", 60.0)  # servers are slow here
    if request.param == "database":
        shutil.copy(empty_database, tmp_path / "mlflow.db")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        yield access.connect()
    else:
        port = free_port()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        with server(tmp_path, port, empty_database):
            yield access.connect()


def tracked(stage: str, rate: float, lineage: str, output: str = "model") -> Tracker:
    """The tracker of a stage, as components.stage makes it.  rate: a parameter."""
    identity = {stage: {"rate": rate}}
    return Tracker(stage, journal_key(identity, output), lineage, digest_of(identity), output_key(output))


def runs(client: MlflowClient, stage: str) -> list[Run]:
    """The runs of a stage in the order of their start."""
    experiment = client.get_experiment_by_name(access.EXPERIMENT)
    assert experiment
    return client.search_runs(
        [experiment.experiment_id], f"tags.`vgg.stage` = '{stage}'", order_by=["attributes.start_time ASC"]
    )


def history(client: MlflowClient, run: Run, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def train(rate: float, lineage: str, steps: int, stop: bool = False, output: str = "model") -> None:
    with tracked("train", rate, lineage, output) as tracker:
        for step in range(1, steps + 1):
            tracker.point(step, {"train/loss": rate / step})
        if stop:
            raise Preempted("stopped")
        tracker.metrics({"final/error": rate})


def test_a_stage_that_runs_again_finds_its_run(mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from another folder, and when it computes everything again."""
    train(0.5, "lineage", 3)
    with tracked("train", 0.5, "lineage") as tracker:  # finds its finished checkpoint
        tracker.metrics({"final/error": 0.5})
    monkeypatch.setenv("VGG_JOURNAL", "other/.tracking")
    train(0.5, "lineage", 4, output="other/model")
    [child], [parent] = runs(mlflow, "train"), runs(mlflow, "pipeline")
    assert child.info.status == "FINISHED"
    assert history(mlflow, child, "train/loss") == [(1, 0.5), (2, 0.25), (3, 0.5 / 3), (4, 0.125)]
    assert history(mlflow, child, "final/error") == history(mlflow, parent, "final/error") == [(0, 0.5)]


def test_an_adopted_run_gets_no_point_twice(mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Kubeflow retry in a new pod has MLFLOW_RUN_ID and no journal."""
    experiment = mlflow.create_experiment("kubeflow")
    parent = mlflow.create_run(experiment).info.run_id
    child = mlflow.create_run(experiment, tags={"mlflow.parentRunId": parent})
    monkeypatch.setenv("MLFLOW_RUN_ID", child.info.run_id)
    with pytest.raises(Preempted):
        train(0.5, "lineage", 2, stop=True)
    shutil.rmtree(".tracking")
    train(0.5, "lineage", 3)
    assert mlflow.get_run(child.info.run_id).info.status == "FINISHED"
    assert history(mlflow, child, "train/loss") == [(1, 0.5), (2, 0.25), (3, 0.5 / 3)]
    assert [point.value for point in mlflow.get_metric_history(parent, "final/error")] == [0.5]


def test_the_state_of_a_pipeline_follows_from_its_stages(mlflow: MlflowClient) -> None:
    """`dvc repro` may run any of them, in several calls."""

    def states() -> list[str]:
        return [run.info.status for run in runs(mlflow, "pipeline")]

    train(0.5, "lineage", 1)
    assert states() == ["FINISHED"]
    with pytest.raises(Refused), tracked("register", 1.0, "lineage", "metrics/register.json") as tracker:
        with access.MLFLOW_LOCK:
            tracker.run_id(mlflow)
        assert states() == ["RUNNING"]
        with tracked("evaluate", 1.0, "lineage", "metrics/evaluate.json"):  # beside it
            pass
        assert states() == ["RUNNING"]
        raise Refused("the gate")
    assert states() == ["FAILED"]
    train(0.5, "lineage", 1)
    assert states() == ["FAILED"]
    with tracked("register", 1.0, "lineage", "metrics/register.json"):
        pass
    assert states() == ["FINISHED"]


def test_a_run_that_failed_is_continued(mlflow: MlflowClient) -> None:
    with pytest.raises(Refused), tracked("train", 0.5, "lineage") as tracker:
        tracker.point(1, {"train/loss": 0.5})
        raise Refused("the loss is not finite")
    train(0.5, "lineage", 2)
    [child] = runs(mlflow, "train")
    assert child.info.status == "FINISHED"
    assert "vgg.failure" not in child.data.tags
    assert history(mlflow, child, "train/loss") == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize("journal", ["kept", "lost"])
def test_what_replaces_a_stopped_training_closes_it(journal: str, mlflow: MlflowClient) -> None:
    with pytest.raises(Preempted):
        train(0.5, "first", 2, stop=True)
    assert [run.info.status for run in runs(mlflow, "train") + runs(mlflow, "pipeline")] == ["RUNNING", "RUNNING"]
    if journal == "lost":
        for path in Path(".tracking").glob("train-*"):
            shutil.rmtree(path)
    with pytest.raises(Refused), tracked("train", 0.25, "second"):
        raise Refused("contains an unfinished run that differs")  # replaces nothing
    assert [run.info.status for run in runs(mlflow, "train")] == ["RUNNING", "FAILED"]
    with tracked("train", 0.25, "second") as tracker:
        tracker.point(1, {"train/loss": 0.25})
    assert [run.info.status for run in runs(mlflow, "train")] == ["KILLED", "FINISHED"]
    assert [run.info.status for run in runs(mlflow, "pipeline")] == ["KILLED", "FINISHED"]
    assert history(mlflow, runs(mlflow, "train")[0], "train/loss") == [(1, 0.5), (2, 0.25)]
    assert [path.name for path in Path(".tracking").iterdir()] == ["place"]


def test_a_training_at_another_output_replaces_nothing(mlflow: MlflowClient) -> None:
    with pytest.raises(Preempted):
        train(0.5, "first", 1, stop=True)
    train(0.25, "second", 1, output="other")
    assert [run.info.status for run in runs(mlflow, "train")] == ["RUNNING", "FINISHED"]


def test_a_pipeline_ends_with_the_stage_that_is_replaced(mlflow: MlflowClient) -> None:
    """But not while another of its stages runs."""
    train(0.5, "first", 1)
    with tracked("evaluate", 1.0, "first", "metrics/evaluate.json"):
        train(0.25, "second", 1)
        assert [run.info.status for run in runs(mlflow, "pipeline")] == ["RUNNING", "FINISHED"]
    train(0.125, "third", 1)
    assert [run.info.status for run in runs(mlflow, "train")] == ["FINISHED"] * 3
    assert [run.info.status for run in runs(mlflow, "pipeline")] == ["FINISHED"] * 3


def test_a_replaced_run_that_mlflow_never_saw(mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server was down all the time; what is replayed later is not RUNNING."""
    address = access.tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr("components.tracking.tracker.FLUSH_SECONDS", 0.2)
    monkeypatch.setattr("components.tracking.tracker.PREEMPTED_FLUSH_SECONDS", 0.2)
    with pytest.raises(Preempted):
        train(0.5, "first", 1, stop=True)
    train(0.25, "second", 1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert replay(Path(".tracking")) == 0
    assert sorted(run.info.status for run in runs(mlflow, "train")) == ["FINISHED", "KILLED"]
    assert sorted(run.info.status for run in runs(mlflow, "pipeline")) == ["FINISHED", "KILLED"]
