"""The MLflow server: connecting to it, and delivering the events of a journal.  Delivery is idempotent."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from components.tracking.journal import Journal
from components.tracking.runs import close, close_parent, close_replaced, find_child, reopen, send_points
from runtime import environment

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("vgg.tracking")

EXPERIMENT = "vgg-imagenet"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI's default is language models
MLFLOW_LOCK = threading.Lock()  # held while MLflow is imported or called: its lazy imports are not thread-safe


def tracking_uri() -> str:
    return environment.TRACKING_URI.get()


def connect() -> MlflowClient:
    """A client that gives up soon, because events that fail stay in the journal."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLFLOW_RUN_ID is read by our code, once; the library would delete it, or start another run with it
    import mlflow

    for noisy in ("alembic", "mlflow"):  # the import sets their levels
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of errors that we report
    mlflow.set_tracking_uri(tracking_uri())
    mlflow.set_registry_uri(tracking_uri())
    with _one_process(tracking_uri()):
        return mlflow.MlflowClient()


@contextmanager
def _one_process(uri: str) -> Iterator[None]:
    """Only one process at a time creates the tables of a database file: two at once leave it unusable for ever."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    with open(uri.removeprefix("sqlite:///") + ".lock", "ab") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def deliver(client: MlflowClient, journal: Journal) -> None:
    """Send all pending events in order.  An event may be sent again without harm."""
    if not journal.runs() and (opening := journal.opening()):  # perhaps already delivered: see Journal._read_state
        journal.save_runs(_open(client, opening))
    for event, offset in journal.events(journal.delivered()):
        _send(client, journal, event)
        journal.mark_delivered(offset)


def _send(client: MlflowClient, journal: Journal, event: dict[str, Any]) -> None:
    from mlflow.entities import DatasetInput, InputTag, Param, RunTag
    from mlflow.exceptions import MlflowException

    if event["kind"] == "open":
        journal.save_runs(_open(client, event))
        return
    runs = journal.runs()
    targets = {"child": ["child"], "parent": ["parent"], "both": ["child", "parent"]}[event.get("to", "child")]
    match event["kind"]:
        case "metrics":
            for target in targets:
                send_points(client, journal, runs[target], event)
        case "params":
            for target in ("child", "parent"):
                try:
                    client.log_batch(runs[target], params=[Param(k, v) for k, v in event["values"].items()][:100])
                except MlflowException as error:  # MLflow parameters are immutable; the first value stays
                    if error.error_code != "INVALID_PARAMETER_VALUE":
                        raise
        case "tags":
            for target in targets:
                client.log_batch(runs[target], tags=[RunTag(k, v) for k, v in event["values"].items()])
        case "dataset":
            dataset = _dataset(event)
            tags = [InputTag("mlflow.data.context", event["context"])]
            client.log_inputs(runs["child"], [DatasetInput(dataset, tags)])
            client.log_inputs(runs["parent"], [DatasetInput(dataset, tags)])
        case "artifact":
            if (path := journal.directory / event["path"]).exists():
                client.log_artifact(runs["child"], str(path), event["folder"])
            else:
                log.warning("tracking: %s is gone, so MLflow does not get it", path)
        case "replace":
            if (experiment := client.get_experiment_by_name(EXPERIMENT)) and (opening := journal.opening()):
                close_replaced(client, experiment.experiment_id, runs, opening, event["time"])
        case "status":
            _set_status(client, runs, (journal.opening() or {}).get("lineage", ""), event)


def _open(client: MlflowClient, event: dict[str, Any]) -> dict[str, str]:
    """Find or create the parent and the child run."""
    stage, lineage = event["stage"], event["lineage"]
    if event["adopt"]:
        adopted = str(event["adopt"])
        return {"child": adopted, "parent": client.get_run(adopted).data.tags.get("mlflow.parentRunId", adopted)}
    experiment = client.get_experiment_by_name(EXPERIMENT)
    experiment_id = experiment.experiment_id if experiment else _create_experiment(client)

    def create(tags: dict[str, str], name: str) -> str:
        created = client.create_run(experiment_id, event["time"], {**tags, "mlflow.source.name": "vgg"}, name)
        return str(created.info.run_id)

    def find_or_create(key: dict[str, str], name: str) -> str:
        query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in key.items())
        found = client.search_runs([experiment_id], query, max_results=1)
        return str(found[0].info.run_id) if found else create(key, name)

    parent = find_or_create({"vgg.lineage": lineage, "vgg.stage": "pipeline"}, f"pipeline-{lineage[:8]}")
    if client.get_run(parent).info.status != "FINISHED":  # a stage that runs again does not end it a second time
        client.update_run(parent, "RUNNING")
    if child := find_child(client, experiment_id, parent, event):
        reopen(client, child, event)
    else:
        key = {"vgg.work": event["work"], "vgg.output": event["output"], "vgg.stage": stage}
        child = create({"mlflow.parentRunId": parent, **key}, stage)
    client.set_tag(parent, f"vgg.run.{stage}", child)
    client.set_tag(parent, f"vgg.output.{stage}", event["output"])
    return {"child": child, "parent": parent}


def _create_experiment(client: MlflowClient) -> str:
    folder = environment.artifacts()  # MLflow's default is the working directory: under DVC perhaps a temporary one
    return client.create_experiment(EXPERIMENT, str(folder) if folder else None, EXPERIMENT_TAGS)


def _set_status(client: MlflowClient, runs: dict[str, str], lineage: str, event: dict[str, Any]) -> None:
    """Set the status of the child run.  The parent run ends with the last stage, or with the first that fails."""
    status = event["status"]
    if status == "KILLED":  # replaced: see Tracker
        close(client, runs["child"])
        if runs["parent"] != runs["child"] and event["by"] != lineage:
            close_parent(client, client.get_run(runs["parent"]).info.experiment_id, runs["parent"])
        return
    client.set_terminated(runs["child"], status, event["time"])
    is_last = client.get_run(runs["child"]).data.tags.get("vgg.stage") == "register"
    if runs["parent"] != runs["child"] and (is_last or status == "FAILED"):
        client.set_terminated(runs["parent"], status, event["time"])


def _dataset(event: dict[str, Any]) -> Any:
    from mlflow.entities import Dataset

    return Dataset(
        name=event["name"], digest=event["digest"], source_type="local",
        source=json.dumps({"uri": event["address"]}), profile=json.dumps(event["profile"]),
    )  # fmt: skip
