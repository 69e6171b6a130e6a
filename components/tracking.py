"""MLflow, at arm's length: everything is written to a journal first, and one thread passes it on.

Training never waits for the tracking server and never dies with it.  What could not be delivered waits in the journal
and goes out when the same stage runs again, or by hand: `python -m components.tracking replay`.  Nothing is logged
twice: a point carries the time it was made, and a resumed run does not repeat the steps that are in its journal.

One parent run for a pipeline run (its tag `vgg.lineage`), one child for each stage.  An injected MLFLOW_RUN_ID (the
Kubeflow plugin) is adopted as the child.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from vgg import manifest
from vgg.errors import Preempted, StorageFailure, Unreachable

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("vgg.tracking")

DEFAULT_URI = "sqlite:///mlflow.db"
EXPERIMENT = "vgg-imagenet"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # or the UI takes it for a study of language models
GIVE_UP_SECONDS = 30.0  # how long the end of a stage waits for the server
GRACE_SECONDS = 5.0  # the same for a stage that goes on later: whoever preempts it kills it soon
RETRY_SECONDS = 5.0
MLFLOW = threading.Lock()  # held while MLflow is imported or called: its lazy imports do not stand two threads
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # what file systems without them say
MAX_TAG, MAX_PARAM = 5000, 500  # characters: MLflow cuts longer ones off without a word


def tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_URI)


def connect() -> MlflowClient:
    """A client that gives up soon: patience is the journal's business."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLFLOW_RUN_ID is read by us, once; the library would delete it, or start a run of its own with it
    import mlflow

    for noisy in ("alembic", "mlflow"):  # set up by the import
        logging.getLogger(noisy).setLevel(logging.WARNING)
    mlflow.set_tracking_uri(tracking_uri())
    mlflow.set_registry_uri(tracking_uri())
    return mlflow.MlflowClient()


def key(identity: dict[str, Any], output: str) -> str:
    """What a stage's journal is called after: what it computes from, and where to, a path or an address.

    The same work done twice at once, to two places, is two runs in MLflow.
    """
    return manifest.digest_of({**identity, "output": output if "://" in output else str(Path(output).resolve())})


class Journal:
    """An append-only file of events, and how many of them have been delivered.  One process has it at a time.

    Raises Preempted while another one does.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "events.jsonl"
        self._position = directory / "delivered"
        self._runs = directory / "runs.json"
        self._file = self._locked()
        self._mend()

    def _locked(self) -> BinaryIO:
        """The file, opened for appending; the lock ends with the process that holds it."""
        while True:
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                file = open(self.path, "ab")  # noqa: SIM115  # as long as the journal
            except FileNotFoundError:  # its holder has just removed the journal
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in NO_LOCKS:  # its name, by the output, must do
                    return file
                file.close()
                if error.errno != errno.EWOULDBLOCK:
                    raise
                raise Preempted(
                    f"{self.directory}: another process does this very work, from the same inputs to the same output; "
                    "wait for it, or stop it"
                ) from None
            if os.fstat(file.fileno()).st_nlink:
                return file
            file.close()  # removed between opening and locking

    def close(self) -> None:
        self._file.close()

    def _mend(self) -> None:
        """Cut off a line that a kill left unfinished."""
        if self.path.exists():
            data = self.path.read_bytes()
            if (whole := data.rfind(b"\n") + 1) < len(data):
                os.truncate(self.path, whole)

    def append(self, event: dict[str, Any]) -> None:
        self._file.write(manifest.canonical_json(event) + b"\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def events(self, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """Every event from a byte offset on, with the offset behind it."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # being written at this moment
                offset += len(line)
                yield json.loads(line), offset

    def delivered(self) -> int:
        """Offset behind the last event that has been delivered, bytes."""
        return int(self._position.read_text()) if self._position.exists() else 0

    def mark_delivered(self, offset: int) -> None:
        temporary = self._position.with_suffix(".tmp")
        temporary.write_text(str(offset))
        os.replace(temporary, self._position)

    def waiting(self) -> int:
        """Events that have not been delivered."""
        return sum(1 for _ in self.events(self.delivered()))

    def runs(self) -> dict[str, str]:
        return dict(json.loads(self._runs.read_bytes())) if self._runs.exists() else {}

    def remember_runs(self, runs: dict[str, str]) -> None:
        manifest.write_json(self._runs, runs)

    def keep(self, path: Path) -> Path:
        """Copy a file beside the events."""
        (self.directory / "files").mkdir(exist_ok=True)
        return Path(shutil.copy(path, self.directory / "files")).resolve()

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)  # somebody who waits for it may be making it anew
        self.close()


class Tracker:
    """One stage's run.  Use as a context: leaving it by an exception ends the run as FAILED, or keeps it open when the
    stage was preempted, and leaving it normally as FINISHED."""

    def __init__(self, stage: str, key: str, lineage: str) -> None:
        self.journal = Journal(Path(os.environ.get("VGG_JOURNAL", ".tracking")) / f"{stage}-{key[:16]}")
        earlier = [event for event, _ in self.journal.events()]
        metrics = [event for event in earlier if event["kind"] == "metrics"]
        self._logged = {
            (event["step"], name, event.get("to", "child")) for event in metrics for name in event["values"]
        }
        if not any(event["kind"] == "open" for event in earlier):
            self._add("open", stage=stage, lineage=lineage, adopt=os.environ.get("MLFLOW_RUN_ID"), uid=uuid.uuid4().hex)
        else:
            self._add("status", status="RUNNING")
        self._closing = threading.Event()
        self._failure: str | None = None
        self._sender = threading.Thread(target=self._send_all, name="tracking", daemon=True)

    def _add(self, kind: str, **event: Any) -> None:
        self.journal.append({"kind": kind, "time": int(time.time() * 1000), **event})

    def point(self, step: int, values: dict[str, float]) -> None:
        """Points of curves.  What an earlier attempt logged is not logged again: resume computes the same."""
        self._metrics(step, values, "child")

    def _metrics(self, step: int, values: dict[str, float], to: str) -> None:
        new = {name: value for name, value in values.items() if (step, name, to) not in self._logged}
        if new:
            self._add("metrics", step=step, values=new, to=to)

    def metrics(self, values: dict[str, float], to: str = "both") -> None:
        """Results without a step, on this run and on the parent (both), or on one of them (child, parent)."""
        self._metrics(0, values, to)

    def note(self, text: str) -> None:
        """Markdown that the UI shows on top of the parent run."""
        self.tags({"mlflow.note.content": text}, to="parent")

    def params(self, values: dict[str, Any]) -> None:
        """Decisions, on this run and on the parent, where the MLflow UI compares them with the results."""
        self._add("params", values={name: str(value)[:MAX_PARAM] for name, value in flat(values)})

    def tags(self, values: dict[str, str], to: str = "child") -> None:
        self._add("tags", values={name: value[:MAX_TAG] for name, value in values.items()}, to=to)

    def dataset(self, name: str, address: str, digest: str, context: str, profile: dict[str, Any]) -> None:
        """The data set as an input.  digest: DVC's directory digest, 36 characters, all that MLflow allows."""
        self._add("dataset", name=name, address=address, digest=digest, context=context, profile=profile)

    def artifact(self, path: Path, folder: str) -> None:
        """A small file of the stage's outputs.  The journal keeps a copy: the next run will write another."""
        kept = self.journal.keep(path)
        self._add("artifact", path=str(kept), folder=folder)

    def run_id(self, client: MlflowClient) -> str:
        """The stage's run, made now if it has not been yet.  Call it with MLFLOW held."""
        deliver(client, self.journal)
        return self.journal.runs()["child"]

    def __enter__(self) -> Self:
        self._sender.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # what an orchestrator tries again continues this very run
        goes_on = isinstance(error, Preempted | Unreachable | StorageFailure | KeyboardInterrupt)
        if error is None:
            self._add("status", status="FINISHED")
        elif goes_on:
            self._add("tags", values={"vgg.preempted": str(error)[:MAX_TAG]}, to="child")
        else:
            self._add("tags", values={"vgg.failure": str(error)[:MAX_TAG]}, to="child")
            self._add("status", status="FAILED")
        self.journal.sync()
        self._closing.set()
        self._sender.join(GRACE_SECONDS if goes_on else GIVE_UP_SECONDS)
        if waiting := self.journal.waiting():
            log.warning(
                "tracking: %d events wait in %s (%s). They go out when this stage runs again, or with: "
                "python -m components.tracking replay", waiting, self.journal.directory, self._failure or "server slow",
            )  # fmt: skip
        elif not goes_on:
            self.journal.remove()
        if not self._sender.is_alive():  # else the end of the process lets go of it
            self.journal.close()

    def _send_all(self) -> None:
        client: MlflowClient | None = None
        while True:
            closing = self._closing.is_set()
            try:
                with MLFLOW:
                    client = client or connect()
                    deliver(client, self.journal)
                self._failure = None
            except Exception as error:  # whatever the server or its client does must not reach the work
                self._failure = f"{type(error).__name__}: {error}"
            if closing:
                return
            self._closing.wait(RETRY_SECONDS if self._failure else 1.0)


def deliver(client: MlflowClient, journal: Journal) -> None:
    """Send every event that has not been delivered yet, in order.  Sending one twice does no harm."""
    for event, offset in journal.events(journal.delivered()):
        _send(client, journal, event)
        journal.mark_delivered(offset)


def _send(client: MlflowClient, journal: Journal, event: dict[str, Any]) -> None:
    from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    if event["kind"] == "open":
        journal.remember_runs(_open(client, event))
        return
    runs = journal.runs()
    targets = {"child": ["child"], "parent": ["parent"], "both": ["child", "parent"]}[event.get("to", "child")]
    match event["kind"]:
        case "metrics":
            points = [Metric(name, value, event["time"], event["step"]) for name, value in event["values"].items()]
            for target in targets:
                client.log_batch(runs[target], metrics=points)
        case "params":
            for target in ("child", "parent"):
                try:
                    client.log_batch(runs[target], params=[Param(k, v) for k, v in event["values"].items()][:100])
                except MlflowException as error:  # a parameter cannot change; the first value of a run stays
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
            client.log_artifact(runs["child"], event["path"], event["folder"])
        case "status":
            _set_status(client, runs, event)


def _open(client: MlflowClient, event: dict[str, Any]) -> dict[str, str]:
    """Find or make the parent and the child run."""
    stage, lineage = event["stage"], event["lineage"]
    if event["adopt"]:
        adopted = str(event["adopt"])
        return {"child": adopted, "parent": client.get_run(adopted).data.tags.get("mlflow.parentRunId", adopted)}
    experiment = client.get_experiment_by_name(EXPERIMENT)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT, tags=KIND)

    def find_or_create(marks: dict[str, str], name: str, tags: dict[str, str]) -> str:
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in marks.items())
        if found := client.search_runs([experiment_id], query, max_results=1):
            return str(found[0].info.run_id)
        made = client.create_run(experiment_id, event["time"], {**marks, **tags, "mlflow.source.name": "vgg"}, name)
        return str(made.info.run_id)

    parent = find_or_create({"vgg.lineage": lineage, "vgg.stage": "pipeline"}, f"pipeline-{lineage[:8]}", {})
    client.update_run(parent, "RUNNING")
    child = find_or_create({"vgg.journal": event["uid"]}, stage, {"mlflow.parentRunId": parent, "vgg.stage": stage})
    client.set_tag(parent, f"vgg.run.{stage}", child)
    return {"child": child, "parent": parent}


def _set_status(client: MlflowClient, runs: dict[str, str], event: dict[str, Any]) -> None:
    """The parent ends with its last stage, or with the first that fails."""
    status = event["status"]
    if status == "RUNNING":
        client.update_run(runs["child"], status)
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


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict as (dotted name, value)."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def replay(root: Path) -> int:
    """Deliver every journal that waits below a folder; returns how many events still wait."""
    client, waiting = connect(), 0
    for directory in sorted(path.parent for path in root.glob("*/events.jsonl")):
        try:
            journal = Journal(directory)
        except Preempted:
            log.info("%s: its stage runs, and sends its events", directory)
            continue
        try:
            deliver(client, journal)
        except Exception as error:
            log.warning("%s: %s", directory, error)
        left, last = journal.waiting(), [event for event, _ in journal.events()][-1:]
        log.info("%s: %d events wait", directory, left)
        if not left and last and last[0].get("status") in ("FINISHED", "FAILED"):
            journal.remove()
        journal.close()
        waiting += left
    return waiting


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if sys.argv[1:] != ["replay"]:
        sys.exit("usage: python -m components.tracking replay")
    sys.exit(69 if replay(Path(os.environ.get("VGG_JOURNAL", ".tracking"))) else 0)
