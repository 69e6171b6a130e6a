"""The journal of a stage's tracking: an append-only file of events, and the position up to which they are delivered."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from runtime import filesystem, manifest
from runtime.errors import Preempted

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # errors of file systems without locks


class Journal:
    """An append-only file of events, and the position up to which they are delivered.

    Only one process has it open at a time.  Raises Preempted if another process has.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "events.jsonl"
        self._position = directory / "delivered"
        self._runs = directory / "runs.json"
        self._file = self._locked()
        self._truncate_partial_line()

    def _locked(self) -> BinaryIO:
        """The file, opened for appending and locked; the lock ends with the process."""
        while True:
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                file = open(self.path, "ab")  # noqa: SIM115  # open as long as the journal
            except FileNotFoundError:  # the previous holder has just removed the journal
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in NO_LOCKS:  # continue unlocked: journals of different outputs have different names
                    return file
                file.close()
                if error.errno != errno.EWOULDBLOCK:
                    raise
                raise Preempted(
                    f"{self.directory}: another process does the same work, with the same inputs and the same output; "
                    "wait for it or stop it"
                ) from None
            if os.fstat(file.fileno()).st_nlink:
                return file
            file.close()  # removed between opening and locking

    def close(self) -> None:
        self._file.close()

    def _truncate_partial_line(self) -> None:
        """Cut off an incomplete last line, left by a killed process."""
        if self.path.exists():
            data = self.path.read_bytes()
            if (whole := data.rfind(b"\n") + 1) < len(data):
                os.truncate(self.path, whole)

    def append(self, event: dict[str, Any]) -> None:
        self._file.write(manifest.canonical_json(event) + b"\n")
        self._file.flush()

    def sync(self) -> None:
        filesystem.fsync(self._file.fileno())

    def events(self, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """Events from a byte offset on, each with the offset after it."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # is being written
                offset += len(line)
                yield json.loads(line), offset

    def delivered(self) -> int:
        """Byte offset after the last delivered event."""
        return int(self._position.read_text()) if self._position.exists() else 0

    def mark_delivered(self, offset: int) -> None:
        temporary = self._position.with_suffix(".tmp")
        temporary.write_text(str(offset))
        os.replace(temporary, self._position)

    def pending(self) -> int:
        """Number of events that are not delivered yet."""
        return sum(1 for _ in self.events(self.delivered()))

    def runs(self) -> dict[str, str]:
        return dict(json.loads(self._runs.read_bytes())) if self._runs.exists() else {}

    def save_runs(self, runs: dict[str, str]) -> None:
        manifest.write_json(self._runs, runs)

    def copy_file(self, path: Path) -> Path:
        """Copy a file into the journal's folder; returns the copy's path."""
        (self.directory / "files").mkdir(exist_ok=True)
        return Path(shutil.copyfile(path, self.directory / "files" / path.name)).resolve()

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)  # another process may be creating it again
        self.close()
