"""A journal of what a stage tracks: an append-only file of events, and how many of them have been delivered."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from runtime import manifest
from runtime.errors import Preempted

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # what file systems without them say


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
