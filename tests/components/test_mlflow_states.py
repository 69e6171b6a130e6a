"""States that people make in MLflow's web interface or with its client: each has an answer, none a traceback."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import environment
from mlflow import MlflowClient

from components.register.registry import open_registry
from components.tracking.__main__ import main as replay
from components.tracking.access import EXPERIMENT
from components.tracking.tracker import Tracker
from runtime.errors import Preempted, Refused

TAGS = {
    "weights_sha256": "a" * 64,
    "evaluation": (
        '{"headline": "dense", "top1_error": 0.25, "top5_error": 0.1, "num_images": 50, "data_digest": "abc.dir"}'
    ),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("components.tracking.tracker.RETRY_SECONDS", 0.2)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)


def stage(*steps: int, stop: bool = False) -> None:
    """Track a training that logs these steps."""
    try:
        with Tracker("train", "k" * 64, "lineage") as tracker:
            for step in steps:
                tracker.point(step, {"train/loss": 1 / step})
            tracker.params({"train": {"seed": 1}})
            if stop:
                raise Preempted("stopped")
    except Preempted:
        pass


def runs(client: MlflowClient, name: str = EXPERIMENT) -> dict[str, Any]:
    """Active runs by stage."""
    found = client.get_experiment_by_name(name)
    assert found and found.lifecycle_stage == "active"
    listed = client.search_runs([found.experiment_id])
    by_stage = {run.data.tags["vgg.stage"]: run for run in listed}
    assert len(by_stage) == len(listed), "one run per stage"
    return by_stage


def curve(client: MlflowClient, run: Any) -> list[int]:
    return [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]


def experiment_id(client: MlflowClient) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    assert found
    return str(found.experiment_id)


def assert_complete(client: MlflowClient, steps: list[int]) -> None:
    """The training has one finished run below one parent, with all points once and all parameters."""
    found = runs(client)
    assert set(found) == {"pipeline", "train"}
    assert curve(client, found["train"]) == steps
    assert found["train"].info.status == "FINISHED"
    assert found["train"].data.tags["mlflow.parentRunId"] == found["pipeline"].info.run_id
    assert found["pipeline"].data.params == found["train"].data.params == {"train.seed": "1"}


def test_a_deleted_experiment_is_restored(client: MlflowClient, caplog: pytest.LogCaptureFixture) -> None:
    client.delete_experiment(client.create_experiment(EXPERIMENT))
    stage(1, 2)
    assert_complete(client, [1, 2])
    assert "experiment vgg-imagenet was deleted; it is restored, with its runs, to take new ones" in caplog.text


def test_an_experiment_that_is_deleted_during_a_training(client: MlflowClient) -> None:
    stage(1, stop=True)
    client.delete_experiment(experiment_id(client))
    stage(2)
    assert_complete(client, [1, 2])


@pytest.mark.faults
def test_an_experiment_that_is_deleted_for_good(client: MlflowClient, tmp_path: Path) -> None:
    stage(1, stop=True)
    client.delete_experiment(experiment_id(client))
    database = f"sqlite:///{tmp_path}/mlflow.db"
    command = ["mlflow", "gc", "--backend-store-uri", database, "--tracking-uri", database]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert client.get_experiment_by_name(EXPERIMENT) is None
    stage(2)
    assert_complete(client, [1, 2])


def test_a_renamed_experiment_keeps_its_runs(client: MlflowClient) -> None:
    """A training goes on in it; the next stage makes an experiment with our name."""
    stage(1, stop=True)
    client.rename_experiment(experiment_id(client), "of last year")
    stage(2)
    assert curve(client, runs(client, "of last year")["train"]) == [1, 2]
    with Tracker("evaluate", "e" * 64, "lineage"):
        pass
    assert set(runs(client)) == {"pipeline", "evaluate"}


@pytest.mark.parametrize("deleted", [["train"], ["pipeline"], ["train", "pipeline"]])
def test_deleted_runs_are_made_anew(deleted: list[str], client: MlflowClient, caplog: pytest.LogCaptureFixture) -> None:
    """With all points and parameters, also those that were delivered before."""
    stage(1, stop=True)
    before = runs(client)
    for name in deleted:
        client.delete_run(before[name].info.run_id)
    stage(2)
    assert_complete(client, [1, 2])
    for name in deleted:
        said = {"train": "child", "pipeline": "parent"}[name]
        assert f"run {before[name].info.run_id} ({said})" in caplog.text
    assert "its events are sent again, to a new run" in caplog.text


@pytest.mark.parametrize("state", ["deleted", "missing"])
def test_a_given_run_that_is_gone(
    state: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = "0" * 32
    if state == "deleted":
        given = client.create_run("0").info.run_id
        client.delete_run(given)
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    stage(1)
    assert_complete(client, [1])
    assert f"run {given} (MLFLOW_RUN_ID) does not exist or was deleted" in caplog.text


def test_files_that_cannot_be_stored_hold_back_nothing(
    client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Here the experiment's location is below a file; later it is a folder again."""
    (tmp_path / "taken").write_text("")
    client.create_experiment(EXPERIMENT, artifact_location=f"{tmp_path}/taken/artifacts")
    (tmp_path / "page.html").write_text("page")
    with caplog.at_level(logging.WARNING), Tracker("evaluate", "e" * 64, "lineage") as tracker:
        tracker.artifact(tmp_path / "page.html", "pages")
        tracker.metrics({"eval/top1_error": 0.25})
    run = runs(client)["evaluate"]
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"eval/top1_error": 0.25})
    assert "pending in" in caplog.text
    assert f"files cannot be stored at {tmp_path}/taken" in caplog.text
    (tmp_path / "taken").unlink()
    replay(["replay"])
    assert [file.path for file in client.list_artifacts(run.info.run_id, "pages")] == ["pages/page.html"]
    assert not list((tmp_path / "journal").iterdir())


def champion(client: MlflowClient, tags: dict[str, str]) -> None:
    """Version 1 of model tiny, with these tags and the alias champion."""
    client.create_registered_model("tiny")
    client.create_model_version("tiny", "/nowhere", tags=tags)
    client.set_registered_model_alias("tiny", "champion", "1")


def evaluation(**changes: str) -> str:
    """The tag `evaluation` with some values replaced."""
    text = TAGS["evaluation"]
    for name, value in changes.items():
        start, end = text.index(f'"{name}": ') + len(name) + 4, text.find(",", text.index(f'"{name}": '))
        text = text[:start] + value + text[end if end > 0 else len(text) - 1 :]
    return text


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({}, "it has no tag 'weights_sha256'"),
        ({"weights_sha256": "a" * 64}, "it has no tag 'evaluation'"),
        ({**TAGS, "weights_sha256": "mine"}, "its tag 'weights_sha256' is not valid: 'mine'"),
        ({**TAGS, "evaluation": "good"}, "its tag 'evaluation' is not valid: 'good'"),
        ({**TAGS, "evaluation": "{}"}, "its tag 'evaluation' lacks top1_error"),
        ({**TAGS, "evaluation": "[]"}, "its tag 'evaluation' is not valid: '[]'"),
        (
            {**TAGS, "evaluation": evaluation(top1_error="NaN")},
            "its tag 'evaluation' is not valid at top1_error: 'nan'",
        ),
        (
            {**TAGS, "evaluation": evaluation(top1_error='"0.2"')},
            "its tag 'evaluation' is not valid at top1_error: '0.2'",
        ),
        ({**TAGS, "evaluation": evaluation(top5_error="7")}, "its tag 'evaluation' is not valid at top5_error: '7'"),
        (
            {**TAGS, "evaluation": evaluation(data_digest="null")},
            "its tag 'evaluation' is not valid at data_digest: 'None'",
        ),
    ],
)
def test_a_champion_that_this_pipeline_did_not_register(tags: dict[str, str], said: str, client: MlflowClient) -> None:
    champion(client, tags)
    with pytest.raises(Refused) as refused, open_registry("tiny") as models:
        models.champion()
    message = str(refused.value)
    assert message.startswith(f"registered model 'tiny': version 1 has the alias champion, but {said}")
    assert "delete the alias to register without a comparison" in message


def found_champion() -> str | None:
    with open_registry("tiny") as models:
        found = models.champion()
    return found.version if found else None


def test_models_versions_and_aliases_that_are_deleted_or_renamed(client: MlflowClient) -> None:
    """None of them is compared with; a deleted or renamed model is made anew by the next registration."""
    champion(client, TAGS)
    assert found_champion() == "1"  # its files are gone, but its tags suffice for the gate
    client.delete_registered_model_alias("tiny", "champion")
    assert found_champion() is None
    client.set_registered_model_alias("tiny", "champion", "1")
    client.delete_model_version("tiny", "1")
    assert found_champion() is None
    client.rename_registered_model("tiny", "other")
    assert found_champion() is None
    champion(client, TAGS)
    assert found_champion() == "1"
    client.delete_registered_model("tiny")
    assert found_champion() is None
