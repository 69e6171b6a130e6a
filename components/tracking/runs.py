"""Runs in MLflow, each once: found again by the digest of their work, without duplicate points, closed when replaced.

Tags of a child run: vgg.stage, vgg.work (what determines the result), vgg.output (where it is written), and
mlflow.parentRunId.  Of a parent run: vgg.stage = pipeline, vgg.lineage, vgg.output.<stage> of every stage.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from components.tracking.journal import Journal

if TYPE_CHECKING:
    from mlflow import MlflowClient

RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
RUNNING = "attributes.status = 'RUNNING'"
STATES = ("RUNNING", "FAILED", "KILLED", "FINISHED")  # the first that a stage has is its parent's
OUTDATED_TAGS = ("vgg.failure", "vgg.preempted")  # of an earlier attempt


def find_child(client: MlflowClient, experiment_id: str, parent: str, opening: dict[str, Any]) -> str | None:
    """The run of the same work at the same output, or a finished one of the same work; None if there is none."""
    key = {"mlflow.parentRunId": parent, "vgg.work": opening["work"], "vgg.stage": opening["stage"]}
    query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in key.items())
    found = client.search_runs([experiment_id], query, order_by=["attributes.start_time DESC"])
    same = [run for run in found if run.data.tags.get("vgg.output") == opening["output"]]
    same += [run for run in found if run.info.status == "FINISHED"]
    return str(same[0].info.run_id) if same else None


@contextlib.contextmanager
def sent_once() -> Iterator[None]:
    """No repeated requests within: the first may have been applied though its answer was lost.

    A run would be there twice.  What fails is tried again with the whole event, which first looks for the run.
    """
    before = os.environ.setdefault(RETRIES, "1")
    os.environ[RETRIES] = "0"
    try:
        yield
    finally:
        os.environ[RETRIES] = before


def reopen(client: MlflowClient, run_id: str, opening: dict[str, Any]) -> None:
    """The work of a run goes on, perhaps at another output."""
    client.update_run(run_id, "RUNNING")
    client.set_tag(run_id, "vgg.output", opening["output"])
    tags = client.get_run(run_id).data.tags
    for name in OUTDATED_TAGS:
        if name in tags:
            client.delete_tag(run_id, name)


def send_points(client: MlflowClient, journal: Journal, run_id: str, event: dict[str, Any]) -> None:
    """Send those points of an event that the run does not have.

    A run does not get a second point at a step.  Results have step 0; one with another value is a new result.
    """
    from mlflow.entities import Metric

    if run_id not in journal.known:
        journal.known[run_id] = dict.fromkeys(client.get_run(run_id).data.metrics)
    known, step, points = journal.known[run_id], event["step"], []
    for name, value in event["values"].items():
        there = known.get(name, {})
        if there is None:
            there = {point.step: point.value for point in client.get_metric_history(run_id, name)}
        known[name] = there
        if step not in there or (step == 0 and there[step] != value):
            points.append(Metric(name, value, event["time"], step))
    if points:
        client.log_batch(run_id, metrics=points)
    for point in points:
        (known[point.key] or {})[step] = point.value


def close_replaced(
    client: MlflowClient, experiment_id: str, runs: dict[str, str], opening: dict[str, Any], before: int
) -> None:
    """Close as KILLED what was running at the output of these runs, and give its parent the state that follows.

    runs: child and parent that have replaced it.  before: time of that, ms; a journal may be delivered much later.
    """
    stage, output = opening["stage"], opening["output"]
    earlier = f"{RUNNING} and attributes.start_time <= {before}"
    query = f"{earlier} and tags.`vgg.stage` = '{stage}' and tags.`vgg.output` = '{output}'"
    for run in client.search_runs([experiment_id], query):
        if run.info.run_id != runs["child"]:
            close(client, run.info.run_id)
    query = f"{earlier} and tags.`vgg.stage` = 'pipeline' and tags.`vgg.output.{stage}` = '{output}'"
    for run in client.search_runs([experiment_id], query):
        if run.info.run_id != runs["parent"]:
            settle(client, run.info.run_id, before)


def close(client: MlflowClient, run_id: str) -> None:
    """Close a run as KILLED, unless it has ended."""
    if client.get_run(run_id).info.status == "RUNNING":
        client.set_terminated(run_id, "KILLED")


def settle(client: MlflowClient, parent: str, when: int) -> None:
    """Give a parent run the state of its stages: RUNNING if one runs, FAILED if one failed, FINISHED if all ended well.

    The pipeline has no process of its own that could end it: `dvc repro` may run one stage only.  when: time, ms.
    """
    run = client.get_run(parent)
    query = f"tags.`mlflow.parentRunId` = '{parent}'"
    children = client.search_runs([run.info.experiment_id], query, order_by=["attributes.start_time ASC"])
    latest = {child.data.tags.get("vgg.stage", child.info.run_id): child.info.status for child in children}
    state = next((state for state in STATES if state in latest.values()), run.info.status)
    if state == run.info.status:
        return
    if state == "RUNNING":
        client.update_run(parent, state)
    else:
        client.set_terminated(parent, state, when)
