"""Delivering the events of a journal to MLflow.  Delivery is idempotent."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from components.tracking import artifacts, view
from components.tracking.access import EXPERIMENT
from components.tracking.journal import Journal
from components.tracking.problems import translated
from components.tracking.runs import close, close_replaced, find_child, reopen, send_points, sent_once, settle
from runtime import environment
from runtime.errors import Problem

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("vgg.tracking")

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI's default is language models
SCHEMA = {  # of a sample in the shards
    "mlflow_colspec": [
        {"name": "jpg", "type": "binary", "required": True},
        {"name": "cls", "type": "long", "required": True},
    ]
}
GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE")  # MLflow's codes for deleted runs


def deliver(client: MlflowClient, journal: Journal) -> None:
    """Send all pending events in order, artifacts last.  An event may be sent again without harm.

    Artifacts that cannot be stored hold back nothing else.  If a run of the journal was deleted, all its events are
    sent again, to a new one.  Raises Problem with the first event that cannot be sent.
    """
    from mlflow.exceptions import MlflowException

    with translated():
        try:
            _deliver_events(client, journal)
        except MlflowException as error:
            if error.error_code not in GONE or not (lost := _deleted(client, journal.runs())):
                raise
            _start_again(journal, lost)
            _deliver_events(client, journal)
        _deliver_artifacts(client, journal)


def _deliver_events(client: MlflowClient, journal: Journal) -> None:
    if not journal.runs() and (opening := journal.opening()):  # perhaps already delivered: see Journal._read_state
        journal.save_runs(_open(client, opening, {}))
    elif any(event["kind"] == "open" for event, _ in journal.events()) and (lost := _deleted(client, journal.runs())):
        _start_again(journal, lost)  # deleted while the stage was stopped
    for event, position in journal.events():
        _send(client, journal, event)
        journal.mark_delivered(position)


def _start_again(journal: Journal, lost: list[str]) -> None:
    log.warning("MLflow: %s was deleted; its events are sent again, to a new run", " and ".join(lost))
    journal.rewind()


def _deliver_artifacts(client: MlflowClient, journal: Journal) -> None:
    for event, position in journal.events("artifacts"):
        if (path := journal.directory / event["path"]).is_file():
            for run in dict.fromkeys(_targets(journal, event)):
                artifacts.store(client, run, str(path), event["folder"])
        else:
            log.warning("tracking: %s is gone, so MLflow does not get it", path)
        journal.mark_delivered(position, "artifacts")


def _deleted(client: MlflowClient, runs: dict[str, str]) -> list[str]:
    """The runs that were deleted, in words; a parent and its child may be the same run."""
    return [f"run {run} ({name})" for name, run in runs.items() if not _is_active(client, run)]


def _is_active(client: MlflowClient, run: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _send(client: MlflowClient, journal: Journal, event: dict[str, Any]) -> None:
    from mlflow.entities import DatasetInput, InputTag, LoggedModelOutput, Param, RunTag
    from mlflow.exceptions import MlflowException

    if event["kind"] == "open":
        journal.save_runs(_open(client, event, journal.runs()))
        try:
            artifacts.check_destination(client, journal.runs()["child"])
        except Problem as problem:
            log.warning("%s Metrics, parameters and states are tracked all the same.", problem)
        return
    runs, targets = journal.runs(), _targets(journal, event)
    match event["kind"]:
        case "metrics":
            for target in targets:
                send_points(client, journal, target, event)
        case "params":
            for target in targets:
                try:
                    client.log_batch(target, params=[Param(k, v) for k, v in event["values"].items()][:100])
                except MlflowException as error:  # MLflow parameters are immutable; the first value stays
                    if error.error_code != "INVALID_PARAMETER_VALUE" or not _is_active(client, target):
                        raise
        case "tags":
            for target in targets:
                client.log_batch(target, tags=[RunTag(k, v) for k, v in event["values"].items()])
        case "name":
            _name(client, runs["parent"], event["text"])
        case "model":
            there = client.get_run(runs["parent"]).outputs
            if event["model_id"] not in [output.model_id for output in (there.model_outputs if there else [])]:
                with sent_once():
                    client.log_outputs(runs["parent"], [LoggedModelOutput(event["model_id"], step=0)])
        case "dataset":
            dataset = _dataset(event)
            tags = [InputTag("mlflow.data.context", event["context"])]
            client.log_inputs(runs["child"], [DatasetInput(dataset, tags)])
            client.log_inputs(runs["parent"], [DatasetInput(dataset, tags)])
        case "replace":
            if (experiment := client.get_experiment_by_name(EXPERIMENT)) and (opening := journal.opening()):
                close_replaced(client, experiment.experiment_id, runs, opening, event["time"])
        case "status":
            _set_status(client, runs, event)


def _targets(journal: Journal, event: dict[str, Any]) -> list[str]:
    """IDs of the runs that get an event."""
    runs = journal.runs()
    return {"child": [runs["child"]], "parent": [runs["parent"]]}.get(event.get("to", "child"), [*runs.values()])


def _name(client: MlflowClient, parent: str, text: str) -> None:
    """Rename a parent run of ours; one that was given (MLFLOW_RUN_ID) keeps the name that others gave it."""
    run = client.get_run(parent)
    if run.data.tags.get("vgg.stage") == "pipeline" and not (run.info.run_name or "").startswith(text):
        client.update_run(parent, name=text)


def _open(client: MlflowClient, event: dict[str, Any], earlier: dict[str, str]) -> dict[str, str]:
    """Find or create the parent and the child run.  earlier: those of this journal so far; they may be deleted."""
    stage, lineage = event["stage"], event["lineage"]
    if adopted := str(event["adopt"] or ""):
        if _is_active(client, adopted):
            return {"child": adopted, "parent": client.get_run(adopted).data.tags.get("mlflow.parentRunId", adopted)}
        log.warning("MLflow: run %s (MLFLOW_RUN_ID) does not exist or was deleted; this stage makes its own", adopted)
    experiment_id = _experiment(client)

    def create(tags: dict[str, str], name: str) -> str:
        with sent_once():
            created = client.create_run(experiment_id, event["time"], {**tags, "mlflow.source.name": "vgg"}, name)
        return str(created.info.run_id)

    def find_or_create(key: dict[str, str], name: str) -> str:
        query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in key.items())
        found = client.search_runs([experiment_id], query, max_results=1)
        return str(found[0].info.run_id) if found else create(key, name)

    parent = find_or_create({"vgg.lineage": lineage, "vgg.stage": "pipeline"}, f"pipeline-{lineage[:8]}")
    child = find_child(client, experiment_id, parent, event)
    if not child and earlier and _is_active(client, earlier["child"]):  # only its parent was deleted
        child = earlier["child"]
        client.set_tag(child, "mlflow.parentRunId", parent)
    if child:
        reopen(client, child, event)
    else:
        key = {"vgg.work": event["work"], "vgg.output": event["output"], "vgg.stage": stage}
        child = create({"mlflow.parentRunId": parent, **key}, stage)
    client.set_tag(parent, f"vgg.run.{stage}", child)
    client.set_tag(parent, f"vgg.output.{stage}", event["output"])
    settle(client, parent, event["time"])
    return {"child": child, "parent": parent}


def _experiment(client: MlflowClient) -> str:
    """ID of the experiment; a missing or renamed one is created anew, a deleted one is restored.

    MLflow keeps the name of a deleted experiment, until `mlflow gc`: no other one can have it.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        folder = environment.artifacts()  # MLflow's default is the working directory: under DVC perhaps a temporary one
        location = str(folder).replace("%", "%25") if folder else None  # MLflow decodes a path as if it were an address
        return str(client.create_experiment(EXPERIMENT, location, {**EXPERIMENT_TAGS, view.TAG: view.state()}))
    if found.lifecycle_stage != "active":
        log.warning("MLflow: experiment %s was deleted; it is restored, with its runs, to take new ones", EXPERIMENT)
        client.restore_experiment(found.experiment_id)
    if found.tags.get(view.TAG) != view.state():  # of an earlier version
        try:
            client.set_experiment_tag(found.experiment_id, view.TAG, view.state())
        except MlflowException as error:  # an experiment of other people, to which this user may only add runs
            if error.error_code != "PERMISSION_DENIED":
                raise
    return str(found.experiment_id)


def _set_status(client: MlflowClient, runs: dict[str, str], event: dict[str, Any]) -> None:
    """End the child run; the parent run gets the state that follows."""
    if event["status"] == "KILLED":  # replaced: see Tracker
        close(client, runs["child"])
    else:
        client.set_terminated(runs["child"], event["status"], event["time"])
    if runs["parent"] != runs["child"]:
        settle(client, runs["parent"], event["time"])


def _dataset(event: dict[str, Any]) -> Any:
    from mlflow.entities import Dataset

    return Dataset(
        name=event["name"], digest=event["digest"], source_type="local",
        source=json.dumps({"uri": event["address"]}), schema=json.dumps(SCHEMA), profile=json.dumps(event["profile"]),
    )  # fmt: skip
