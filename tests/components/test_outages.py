"""Outages of MLflow at every point of a run: no stage fails, no point is missing or there twice, no run stays open."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from faultproxy import FaultProxy
from mlflow import MlflowClient
from mlflowservers import mlflow_server

from components.tracking import access
from components.tracking.__main__ import replay
from components.tracking.tracker import Tracker
from runtime.errors import Problem

ROUNDS = int(os.environ.get("VGG_OUTAGES", "3"))
STAGES = ("train", "register") if ROUNDS > 3 else ("register",)  # the last one ends the pipeline run
STEPS = range(20, 120, 20)
PHASES = ("start", "middle", "end")
KINDS = {"absent": ("reset",), "stalls": ("stall",), "faulty": ("late", "unavailable", "reset", "short")}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    options = ("--artifacts-destination", "a")
    with mlflow_server(tmp_path_factory.mktemp("server"), empty_database, *options) as address:
        yield address


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_outages(kind: str, upstream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every round the server is away, answers nothing or answers wrongly, in one or more phases of the stages."""
    monkeypatch.setattr("components.tracking.tracker.RETRY_SECONDS", 0.05)
    monkeypatch.setattr("components.tracking.tracker.FLUSH_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1" if kind == "stalls" else "30")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("VGG_JOURNAL", str(tmp_path / "journal"))
    (tmp_path / "page.html").write_text("page")
    client = MlflowClient(upstream)
    model_id = client.create_logged_model("0").model_id
    injected: Counter[str] = Counter()
    for number in range(len(KINDS) * ROUNDS)[list(KINDS).index(kind) :: len(KINDS)][: max(1, ROUNDS // len(KINDS))]:
        chance = random.Random(number)
        away = {phase for phase in PHASES if chance.random() < 0.5} or {PHASES[number % len(PHASES)]}
        writes = ("POST", "PUT", "PATCH", "DELETE")
        with FaultProxy(upstream, seed=number, kinds=KINDS[kind], stall=1.5, writes=writes) as proxy:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.endpoint)
            monkeypatch.setenv("VGG_PIPELINE_RUN", f"{kind}-{number}")
            for stage in STAGES:
                work(stage, f"{kind}-{number}", proxy, away, 0.4 if kind == "faulty" else 1.0, tmp_path, model_id)
            proxy.probability = 0.0
            settle(tmp_path / "journal")
            injected += proxy.injected
        expect_complete(client, f"{kind}-{number}", model_id)
    assert sum(injected.values()) >= 1 and set(injected) <= set(KINDS[kind]), injected


def work(stage: str, run: str, proxy: FaultProxy, away: set[str], probability: float, folder: Path, model: str) -> None:
    """A stage; in the phases that are named, requests fail.  It must not fail, whatever the server does."""

    def enter(phase: str) -> None:
        proxy.probability = probability if phase in away else 0.0

    enter("start")
    with Tracker(stage, f"{stage}-{run}", run) as tracker:
        tracker.name("digits · D")
        tracker.params({"train": {"learning_rate": 0.1}})
        tracker.dataset("digits", "data/shards", "0" * 32 + ".dir", "train", {"num_images": 3})
        for step in STEPS:
            if step == 60:
                time.sleep(0.2)  # the sender works in the first phase
                enter("middle")
            tracker.point(step, {"loss/train": 1 / step})
        time.sleep(0.2)
        enter("end")
        tracker.metrics({f"{stage}_error": 0.25})
        tracker.model(model)
        tracker.artifact(folder / "page.html", "eval", to="both")
    tracker._sender.join(60)  # which would end with the process, as would its lock
    tracker.journal.close()


def settle(journals: Path) -> None:
    """Deliver what waits; other processes would, or the stage when it runs again."""
    deadline = time.monotonic() + 60
    while True:
        try:
            if replay(journals) == 0 and not list(journals.glob("*/events.jsonl")):
                return
        except Problem:
            pass
        assert time.monotonic() < deadline, list(journals.iterdir())
        time.sleep(0.1)


def expect_complete(client: MlflowClient, run: str, model_id: str) -> None:
    experiment = client.get_experiment_by_name(access.EXPERIMENT)
    assert experiment
    query = f"tags.`vgg.work` LIKE '%-{run}'"
    children = client.search_runs([experiment.experiment_id], query)
    assert sorted(child.data.tags["vgg.stage"] for child in children) == sorted(STAGES)
    [parent_id] = {child.data.tags["mlflow.parentRunId"] for child in children}
    parents = client.search_runs([experiment.experiment_id], f"tags.`vgg.lineage` = '{run}'")
    assert [parent.info.run_id for parent in parents] == [parent_id]
    assert {found.info.status for found in (*children, *parents)} == {"FINISHED"}
    for found in (*children, *parents):
        name = found.info.run_id
        assert [(p.step, p.value) for p in client.get_metric_history(name, "loss/train")] == [
            (step, 1 / step) for step in STEPS
        ]
        assert [file.path for file in client.list_artifacts(name, "eval")] == ["eval/page.html"]
        assert len(found.inputs.dataset_inputs) == 1
    assert len(client.get_metric_history(parent_id, "register_error")) == 1
    [parent] = parents
    assert [output.model_id for output in parent.outputs.model_outputs] == [model_id]
    assert parent.info.run_name == "digits · D"
