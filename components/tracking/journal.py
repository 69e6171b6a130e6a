"""The journal of a stage's tracking: its events, until MLflow has them.

    <journal>/events.jsonl      one event a line, numbered, each with its sha256
    <journal>/delivered.json    the numbers of the last event and the last artifact that MLflow has, and the runs there
    <journal>/files/            copies of output files
    <journal>.damaged           what could not be read, for example after a power loss

The events are in memory, too.  So a disk that cannot be written stops neither the stage nor the delivery; it only means
that what MLflow does not have when the process ends is lost.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from runtime import filesystem, manifest
from runtime.errors import Preempted, StorageFailure
from runtime.redaction import redacted_values

log = logging.getLogger("vgg.tracking")

SAVE_SECONDS = 1.0  # between two writes of delivered.json; events that are sent again do no harm
ENDED = ("FINISHED", "FAILED", "KILLED")
Event = dict[str, Any]


class Journal:
    """The events of one stage's run.

    earlier: the events that it held when it was opened, delivered or not.  known: points that MLflow has, as far as it
    was asked: {run: {metric: {step: last value}}}, None for a metric whose points are not known yet.
    Only one process has a journal open at a time.  Raises Preempted if another process has, and nothing else.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "events.jsonl"
        self.known: dict[str, dict[str, dict[int, float] | None]] = {}
        self._state_path = directory / "delivered.json"
        self._is_broken, self._said, self._unwritten = False, False, bytearray()
        self._lock, self._state_lock = threading.Lock(), threading.Lock()
        existed = os.path.exists(self.path)
        self._file, self._size = self._locked(), 0
        self._delivered = {"events": 0, "artifacts": 0}
        self._runs, self._saved, self._is_saved = dict[str, str](), 0.0, True
        self._read_state()
        found = self._read_events()
        if existed and not self._size:  # a journal begins with an event
            log.warning("tracking: %s was empty: what MLflow did not have is lost", self.path)
        self.earlier = [event for event, _ in found]
        self._last_number = max([*self._delivered.values(), *(number for _, number in found)])
        self._events = deque((event, number) for event, number in found if self._waits(event, number))
        self._last = self.earlier[-1] if found else {}
        self._opening = next((event for event in self.earlier if event["kind"] == "open"), None)

    def _locked(self) -> FileIO | None:
        """The file, opened for appending and locked; the lock ends with the process.  None if that is impossible."""
        for _ in range(100):
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                file = open(self.path, "ab", buffering=0)  # noqa: SIM115  # open as long as the journal
                filesystem.fsync_directory(self.directory)
                filesystem.fsync_directory(self.directory.parent)
            except FileNotFoundError:  # the previous holder has just removed the journal
                continue
            except OSError as error:
                self._report(error)
                return None
            try:
                if not filesystem.lock(file):
                    file.close()
                    raise Preempted(
                        f"{self.directory}: another process does the same work, with the same inputs and the same "
                        "output; wait for it or stop it"
                    )
            except OSError as error:
                self._report(error)
            if os.fstat(file.fileno()).st_nlink:
                return file
            file.close()  # removed between opening and locking
        self._report(OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self.path)))
        return None

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            self._report(error)
            return b""

    def _read_state(self) -> None:
        raw = self._read(self._state_path)
        state = manifest.unsealed(raw)
        if state is not None:
            self._delivered = {what: int(state["delivered"][what]) for what in self._delivered}
            self._runs = dict(state["runs"])
        elif raw or self._state_path.exists():
            self._set_aside(self._state_path, raw, "is damaged; all events of the journal are sent again")
            self._state_path.unlink(missing_ok=True)

    def _read_events(self) -> list[tuple[Event, int]]:
        """The undamaged events, each with its number; the others are moved to another file."""
        raw = self._read(self.path)
        good, bad, found = b"", b"", []
        for line in raw.splitlines(keepends=True):
            if (event := manifest.unsealed(line)) is None:
                bad += line
            else:
                good += line
                number = int(event.pop("number"))
                found.append((event, number))
        self._size = len(good)
        if bad:
            self._set_aside(self.path, bad, "has damaged lines; the other events are used")
            self._replace_file(good)
        return found

    def _set_aside(self, path: Path, damaged: bytes, what: str) -> None:
        target = self.directory.with_name(self.directory.name + ".damaged")
        try:
            with open(target, "ab") as file:
                file.write(damaged if damaged.endswith(b"\n") else damaged + b"\n")
            log.warning("tracking: %s %s (%d bytes moved to %s)", path, what, len(damaged), target)
        except OSError as error:
            log.warning("tracking: %s %s (%d bytes not kept: %s)", path, what, len(damaged), error)

    def _replace_file(self, content: bytes) -> None:
        """Replace the file by one with other content, which is locked before it is seen."""
        temporary = self.path.with_suffix(".tmp")
        try:
            file = open(temporary, "wb", buffering=0)  # noqa: SIM115  # open as long as the journal
            filesystem.lock(file)
            _write(file, content)
            filesystem.fsync(file.fileno())
            os.replace(temporary, self.path)
            filesystem.fsync_directory(self.directory)
        except OSError as error:
            self._report(error)
            return
        if self._file:
            self._file.close()
        self._file = file

    def _report(self, error: OSError | StorageFailure) -> None:
        """Say once that the journal cannot be written."""
        self._is_broken = True
        if self._said:
            return
        self._said = True
        reason = str(error)
        if isinstance(error, OSError):
            reason = f"{error.filename or self.path}: {error.strerror or error}"
        log.warning(
            "tracking: cannot write the journal: %s. The stage goes on; events that MLflow does not have at its end "
            "are lost, unless the journal can be written again (VGG_JOURNAL is its folder).", reason.split(" Free")[0],
        )  # fmt: skip

    def append(self, event: Event) -> None:
        """Add an event, without passwords.  It is in the file when this returns, if the disk allows."""
        event = redacted_values(event)
        with self._lock:
            self._last_number += 1
            self._events.append((event, self._last_number))
            self._last = event
            if event["kind"] == "open" and not self._opening:
                self._opening = event
            self._unwritten += manifest.sealed({**event, "number": self._last_number})
            self._write_lines()

    def _write_lines(self) -> None:
        """Write the lines that are not in the file, also those that failed before."""
        if not self._file or not self._unwritten:
            return
        try:
            if self._is_broken:
                os.ftruncate(self._file.fileno(), self._size)  # a part of a line
            _write(self._file, bytes(self._unwritten))
        except OSError as error:
            self._report(error)
            return
        self._size += len(self._unwritten)
        self._unwritten.clear()
        self._is_broken = False

    def sync(self) -> None:
        """Make all events so far, and what is known of their delivery, safe against a power loss."""
        try:
            with self._lock:
                self._write_lines()
                same = FileIO(os.dup(self._file.fileno()), "a") if self._file else None
            if same:  # without the lock: append() must not wait for a slow disk
                with same:
                    filesystem.fsync(same.fileno())
        except OSError as error:
            self._report(error)
        self._save_state()

    def close(self) -> None:
        self._save_state()
        with self._lock, self._state_lock:
            if self._file:
                self._file.close()
            self._file = None

    def events(self, what: str = "events") -> Iterator[tuple[Event, int]]:
        """What is not delivered yet, each with its position.

        what: events, or artifacts: they have a position of their own, so that they hold back nothing else.
        """
        with self._lock:
            waiting = list(self._events)
        return ((event, number) for event, number in waiting if _kind(event) == what and self._waits(event, number))

    def _waits(self, event: Event, number: int) -> bool:
        return number > self._delivered[_kind(event)]

    def mark_delivered(self, position: int, what: str = "events") -> None:
        with self._lock:
            self._delivered[what], self._is_saved = position, False
            while self._events and not self._waits(*self._events[0]):
                self._events.popleft()
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._save_state()

    def rewind(self) -> None:
        """Make all events pending again."""
        with self._lock:
            found = {number: event for event, number in (*self._read_events(), *self._events)}
            self._events = deque((found[number], number) for number in sorted(found))
            self._delivered, self._is_saved = dict.fromkeys(self._delivered, 0), False
        self.known.clear()
        self._save_state()

    def pending(self) -> int:
        """Number of events that are not delivered yet."""
        with self._lock:
            return sum(self._waits(event, number) for event, number in self._events)

    def unwritten(self) -> int:
        """Number of events that are neither delivered nor in the file."""
        return min(self._unwritten.count(b"\n"), self.pending())

    def opening(self) -> Event | None:
        """The event that describes the run; None if it is lost."""
        return self._opening

    def has_ended(self) -> bool:
        """Whether the last event is the end of the run."""
        return self._last.get("status") in ENDED

    def runs(self) -> dict[str, str]:
        """The runs in MLflow: child and parent; {} before they are known."""
        return dict(self._runs)

    def save_runs(self, runs: dict[str, str]) -> None:
        self._runs, self._is_saved = dict(runs), False
        self._save_state()

    def _save_state(self) -> None:
        with self._state_lock:
            if self._is_saved or not self._file:
                return
            state = manifest.sealed({"delivered": self._delivered, "runs": self._runs})
            self._saved = time.monotonic()
            try:
                manifest.write_atomically(self._state_path, lambda file: file.write(state))
                self._is_saved = True
            except (OSError, StorageFailure) as error:
                self._report(error)

    def copy_file(self, path: Path) -> Path:
        """Copy a file into the journal's folder; returns the copy's path in it, or the original's if that fails."""
        folder = self.directory / "files"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            copied = Path(shutil.copyfile(path, folder / path.name))
            with open(copied, "rb") as file:
                filesystem.fsync(file.fileno())
        except OSError as error:  # which names the file that was read
            self._report(OSError(error.errno, error.strerror, str(folder / path.name)))
            return path.resolve()
        return copied.relative_to(self.directory)

    def remove(self) -> None:
        with self._state_lock:
            self._is_saved = True  # a later save would create the folder again
            shutil.rmtree(self.directory, ignore_errors=True)  # another process may be creating it again
        self.close()


def _kind(event: Event) -> str:
    return "artifacts" if event["kind"] == "artifact" else "events"


def _write(file: FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) or 0 :]


def opening_of(directory: Path) -> Event | None:
    """The event that describes the run of a journal, which another process may have open; None if it is not known."""
    try:
        with open(directory / "events.jsonl", "rb") as file:
            events = (manifest.unsealed(line) for line in file)
            return next((event for event in events if event and event["kind"] == "open"), None)
    except OSError:
        return None
