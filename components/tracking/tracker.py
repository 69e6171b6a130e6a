"""Asynchronous tracking in MLflow: events are written to a journal first, and one thread delivers them.

Training never waits for the tracking server or for the journal's disk, and never fails because of them.  Events that
could not be delivered stay in the journal; they are sent when the same stage runs again, or with
`python -m components.tracking replay`.  Points are not duplicated: a resumed run skips the steps that are in its
journal, and delivery skips those that the run in MLflow has.

A pipeline run has one parent run (tag `vgg.lineage`) and one child run per stage.  A stage that runs again finds its
run by the digest of its work (tag `vgg.work`), also after it was finished.  What an output held before is over: its run
is closed as KILLED.  The state of a parent run follows from those of its stages.  If MLFLOW_RUN_ID is set (by the
Kubeflow plugin), that run is used as the child.
"""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from components.tracking.access import MLFLOW_LOCK, connect, set_environment
from components.tracking.delivery import deliver
from components.tracking.journal import Journal, opening_of
from components.tracking.machine import Monitor
from components.tracking.names import PARENT_PARAMS
from runtime import environment, manifest
from runtime.errors import Preempted, Problem, Refused, StorageFailure, Unreachable
from runtime.redaction import redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("vgg.tracking")

FLUSH_SECONDS = 30.0  # limit for delivering the last events at the end of a stage
PREEMPTED_FLUSH_SECONDS = 5.0  # the same for a preempted stage, which will be killed soon
RETRY_SECONDS = 5.0
REFUSED_SECONDS = 60.0  # the same after a refusal: many failed logins lock an account
MAX_TAG, MAX_PARAM = 5000, 500  # characters: MLflow truncates longer values silently


def journal_key(identity: dict[str, Any], output: str) -> str:
    """Name of a stage's journal: a digest of the stage's identity and of its output, a path or an address.

    The same work with two outputs is two runs in MLflow.
    """
    return manifest.digest_of({**identity, "output": output if "://" in output else str(Path(output).resolve())})


def _place(root: Path) -> str:
    """A name of this folder of journals, which no other folder on any machine has; '' if none can be given.

    It distinguishes outputs with the same path on two machines.
    """
    path = root / "place"
    try:
        if not path.exists() or not path.stat().st_size:
            manifest.write_atomically(path, lambda file: file.write(secrets.token_hex(16).encode()))
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, StorageFailure):
        return ""


def output_key(output: str) -> str:
    """A name of an output, a path or an address, that no other output has on any machine; '' if none can be given."""
    if "://" in output:
        return manifest.digest_of({"output": output})
    here = _place(environment.JOURNAL.get())
    return manifest.digest_of({"place": here, "output": str(Path(output).resolve())}) if here else ""


class Tracker:
    """One stage's run, as a context manager.

    key: of the journal.  work: digest of what determines the stage's result.  output: see output_key().
    The run ends as FINISHED, or after an exception as FAILED; if the stage was preempted, the run stays open.
    """

    def __init__(self, stage: str, key: str, lineage: str, work: str = "", output: str = "") -> None:
        """Raises WrongParameters if MLFLOW_TRACKING_URI can never work, Preempted if the journal is in use."""
        set_environment()
        self._root, self._name = environment.JOURNAL.get(), f"{stage}-{key[:16]}"
        self.journal = Journal(self._root / self._name)
        metrics = [event for event in self.journal.earlier if event["kind"] == "metrics"]
        self._logged = {
            (event["step"], name, event.get("to", "child")) for event in metrics for name in event["values"]
        }
        self.journal.earlier = []
        opening = self.journal.opening() or {
            "stage": stage,
            "lineage": lineage,
            "adopt": environment.TRACKING_RUN_ID.get() or None,
            "work": work or key,
            "output": output or key,
        }
        self._opening = {name: value for name, value in opening.items() if name not in ("kind", "time")}
        self._add("open", **self._opening)
        self._replaced: list[Journal] | None = None  # not known yet
        self._closing = threading.Event()
        self._failure: str | None = None
        self._sender = threading.Thread(target=self._send_all, name="tracking", daemon=True)
        self._monitor = Monitor(self._load)

    def _add(self, kind: str, **event: Any) -> None:
        self.journal.append({"kind": kind, "time": int(time.time() * 1000), **event})

    def point(self, step: int, values: dict[str, float]) -> None:
        """Points of curves, on this run and on the parent.

        Points that an earlier attempt logged are skipped: a resumed stage computes the same.
        """
        self._metrics(step, values, "both")

    def _metrics(self, step: int, values: dict[str, float], to: str) -> None:
        self._replace_earlier()
        new = {
            name: value for name, value in values.items()
            if (step, name, to) not in self._logged and math.isfinite(value)
        }  # fmt: skip
        if new:
            self._add("metrics", step=step, values=new, to=to)

    def _replace_earlier(self) -> None:
        """Close the runs of other work at this output.  Until the first result they are not replaced."""
        if self._replaced is not None:
            return
        stage, output, found = self._opening["stage"], self._opening["output"], []
        for directory in sorted(path.parent for path in self._root.glob(f"{stage}-*/events.jsonl")):
            if directory.name == self._name or (opening_of(directory) or {}).get("output") != output:
                continue
            try:
                other = Journal(directory)
            except Preempted:  # it is just being replayed
                continue
            if not other.has_ended():
                other.append({"kind": "status", "status": "KILLED", "time": int(time.time() * 1000)})
                other.sync()
            found.append(other)
        self._add("replace")
        self._replaced = found  # from now on they are delivered by the thread

    def metrics(self, values: dict[str, float], to: str = "both") -> None:
        """Results without a step, on this run and on the parent (both), or on one of them (child, parent)."""
        self._metrics(0, values, to)

    def name(self, text: str) -> None:
        """Name of the parent run.  One that begins with the text stays: it has the result, too."""
        self._add("name", text=text[:MAX_TAG])

    def note(self, text: str, to: str = "parent") -> None:
        """Markdown that the UI shows on top of a run."""
        self.tags({"mlflow.note.content": text}, to=to)

    def params(self, values: dict[str, Any]) -> None:
        """Parameters.  On the parent, where the MLflow UI compares them with the results, those that people vary."""
        texts = {name: str(value)[:MAX_PARAM] for name, value in flat(values)}
        self._add("params", values=texts, to="child")
        if varied := {name: text for name, text in texts.items() if name in PARENT_PARAMS}:
            self._add("params", values=varied, to="parent")

    def tags(self, values: dict[str, str], to: str = "child") -> None:
        self._add("tags", values={name: value[:MAX_TAG] for name, value in values.items()}, to=to)

    def dataset(self, name: str, address: str, digest: str, context: str, profile: dict[str, Any]) -> None:
        """Shards as an input.  digest: DVC's directory digest, 36 characters, the maximum of MLflow."""
        self._add("dataset", name=name, address=address, digest=digest, context=context, profile=profile)

    def artifact(self, path: Path, folder: str, to: str = "child") -> None:
        """A small output file.  The journal keeps a copy, because the next run overwrites the file."""
        self._add("artifact", path=str(self.journal.copy_file(path)), folder=folder, to=to)

    def model(self, model_id: str) -> None:
        """A model that MLflow holds, as an output of the parent run, too."""
        self._add("model", model_id=model_id)

    def run_id(self, client: MlflowClient) -> str:
        """The stage's run, created now if needed.  Call it with MLFLOW_LOCK held."""
        deliver(client, self.journal)
        return self.journal.runs()["child"]

    def __enter__(self) -> Self:
        self._sender.start()
        self._monitor.start()
        return self

    def _load(self, step: int, values: dict[str, float]) -> None:
        """A sample of the machine; unlike a result it does not replace what was at the output before."""
        if new := {name: value for name, value in values.items() if math.isfinite(value)}:
            self._add("metrics", step=step, values=new, to="child")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._monitor.stop()  # the end is the last event
        # an orchestrator retries after these, and the retry continues this run
        resumable = isinstance(error, Preempted | Unreachable | StorageFailure | KeyboardInterrupt)
        if error is None:
            self._replace_earlier()
            self._add("status", status="FINISHED")
        elif resumable:
            self._add("tags", values={"vgg.preempted": str(error)[:MAX_TAG]}, to="child")
        else:
            self._add("tags", values={"vgg.failure": str(error)[:MAX_TAG]}, to="child")
            self._add("status", status="FAILED")
        self.journal.sync()
        self._closing.set()
        self._sender.join(PREEMPTED_FLUSH_SECONDS if resumable else FLUSH_SECONDS)
        self._report_pending()
        if self._sender.is_alive():  # the locks end with the process
            return
        if not resumable and not self.journal.pending():
            self.journal.remove()
        for journal in (self.journal, *(self._replaced or [])):
            journal.close()

    def _report_pending(self) -> None:
        pending, reason = self.journal.pending(), redacted(self._failure or "no answer yet")
        if lost := self.journal.unwritten():
            log.warning("tracking: %d events are lost: the journal could not be written, and MLflow: %s", lost, reason)
        if pending > lost:
            log.warning(
                "tracking: %d events pending in %s (%s). They are sent when this stage runs again, or with: "
                "python -m components.tracking replay", pending - lost, self.journal.directory, reason,
            )  # fmt: skip

    def _send_all(self) -> None:
        client: MlflowClient | None = None
        while True:
            closing = self._closing.is_set()
            try:
                with MLFLOW_LOCK:
                    client = client or connect()
                    try:
                        deliver(client, self.journal)
                    finally:
                        self._deliver_replaced(client)
                self._failure, pause = None, 1.0
            except Exception as error:  # no failure of the server or its client may stop the stage
                failure = (str(error) if isinstance(error, Problem) else f"{type(error).__name__}: {error}").rstrip(".")
                if self._failure is None and not closing:
                    log.warning("tracking: %s. The stage continues; events wait in %s", failure, self.journal.directory)
                self._failure = failure
                pause = REFUSED_SECONDS if isinstance(error, Refused) else RETRY_SECONDS
            self.journal.sync()
            if closing:
                return
            self._closing.wait(pause)

    def _deliver_replaced(self, client: MlflowClient) -> None:
        while self._replaced:
            deliver(client, self._replaced[0])
            self._replaced.pop(0).remove()


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict as (dotted name, value)."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
