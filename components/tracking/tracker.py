"""Asynchronous tracking in MLflow: events are written to a journal first, and one thread delivers them.

Training never waits for the tracking server and never fails because of it.  Events that could not be delivered stay in
the journal; they are sent when the same stage runs again, or with `python -m components.tracking replay`.  Points are
not duplicated: a point has a fixed timestamp, and a resumed run skips the steps that are in its journal.

A pipeline run has one parent run (tag `vgg.lineage`) and one child run per stage.  If MLFLOW_RUN_ID is set (by the
Kubeflow plugin), that run is used as the child.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from components.tracking.journal import Journal
from components.tracking.server import MLFLOW_LOCK, connect, deliver
from runtime import environment, manifest
from runtime.errors import Preempted, StorageFailure, Unreachable

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("vgg.tracking")

FLUSH_SECONDS = 30.0  # limit for delivering the last events at the end of a stage
PREEMPTED_FLUSH_SECONDS = 5.0  # the same for a preempted stage, which will be killed soon
RETRY_SECONDS = 5.0
MAX_TAG, MAX_PARAM = 5000, 500  # characters: MLflow truncates longer values silently


def journal_key(identity: dict[str, Any], output: str) -> str:
    """Name of a stage's journal: a digest of the stage's identity and of its output, a path or an address.

    The same work with two outputs is two runs in MLflow.
    """
    return manifest.digest_of({**identity, "output": output if "://" in output else str(Path(output).resolve())})


class Tracker:
    """One stage's run, as a context manager.

    The run ends as FINISHED, or after an exception as FAILED; if the stage was preempted, the run stays open.
    """

    def __init__(self, stage: str, key: str, lineage: str) -> None:
        self.journal = Journal(environment.JOURNAL.get() / f"{stage}-{key[:16]}")
        earlier = [event for event, _ in self.journal.events()]
        metrics = [event for event in earlier if event["kind"] == "metrics"]
        self._logged = {
            (event["step"], name, event.get("to", "child")) for event in metrics for name in event["values"]
        }
        if not any(event["kind"] == "open" for event in earlier):
            self._add(
                "open",
                stage=stage,
                lineage=lineage,
                adopt=environment.TRACKING_RUN_ID.get() or None,
                uid=uuid.uuid4().hex,
            )
        else:
            self._add("status", status="RUNNING")
        self._closing = threading.Event()
        self._failure: str | None = None
        self._sender = threading.Thread(target=self._send_all, name="tracking", daemon=True)

    def _add(self, kind: str, **event: Any) -> None:
        self.journal.append({"kind": kind, "time": int(time.time() * 1000), **event})

    def point(self, step: int, values: dict[str, float]) -> None:
        """Points of curves.  Points that an earlier attempt logged are skipped: a resumed stage computes the same."""
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
        """Parameters, on this run and on the parent, where the MLflow UI compares them with the results."""
        self._add("params", values={name: str(value)[:MAX_PARAM] for name, value in flat(values)})

    def tags(self, values: dict[str, str], to: str = "child") -> None:
        self._add("tags", values={name: value[:MAX_TAG] for name, value in values.items()}, to=to)

    def dataset(self, name: str, address: str, digest: str, context: str, profile: dict[str, Any]) -> None:
        """The data set as an input.  digest: DVC's directory digest, 36 characters, the maximum of MLflow."""
        self._add("dataset", name=name, address=address, digest=digest, context=context, profile=profile)

    def artifact(self, path: Path, folder: str) -> None:
        """A small output file.  The journal keeps a copy, because the next run overwrites the file."""
        copy = self.journal.copy_file(path)
        self._add("artifact", path=str(copy), folder=folder)

    def run_id(self, client: MlflowClient) -> str:
        """The stage's run, created now if needed.  Call it with MLFLOW_LOCK held."""
        deliver(client, self.journal)
        return self.journal.runs()["child"]

    def __enter__(self) -> Self:
        self._sender.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # an orchestrator retries after these, and the retry continues this run
        resumable = isinstance(error, Preempted | Unreachable | StorageFailure | KeyboardInterrupt)
        if error is None:
            self._add("status", status="FINISHED")
        elif resumable:
            self._add("tags", values={"vgg.preempted": str(error)[:MAX_TAG]}, to="child")
        else:
            self._add("tags", values={"vgg.failure": str(error)[:MAX_TAG]}, to="child")
            self._add("status", status="FAILED")
        self.journal.sync()
        self._closing.set()
        self._sender.join(PREEMPTED_FLUSH_SECONDS if resumable else FLUSH_SECONDS)
        if pending := self.journal.pending():
            log.warning(
                "tracking: %d events pending in %s (%s). They are sent when this stage runs again, or with: "
                "python -m components.tracking replay", pending, self.journal.directory, self._failure or "server slow",
            )  # fmt: skip
        elif not resumable:
            self.journal.remove()
        if not self._sender.is_alive():  # otherwise the lock ends with the process
            self.journal.close()

    def _send_all(self) -> None:
        client: MlflowClient | None = None
        while True:
            closing = self._closing.is_set()
            try:
                with MLFLOW_LOCK:
                    client = client or connect()
                    deliver(client, self.journal)
                self._failure = None
            except Exception as error:  # no failure of the server or its client may stop the stage
                self._failure = f"{type(error).__name__}: {error}"
            if closing:
                return
            self._closing.wait(RETRY_SECONDS if self._failure else 1.0)


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict as (dotted name, value)."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
