"""The side of a rank that its launcher watches: heartbeats, stacks of a hang, and ending with the launcher.

The launcher (components.launch) sets a folder in VGG_RANKS.  Every rank writes a file there, <rank>.json, with its
process ID and the file for the stacks that it writes on SIGUSR1; touching <rank>.json is its heartbeat.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime import environment, manifest
from runtime.errors import Preempted
from runtime.stopping import die_with_parent

BEAT_SECONDS = 0.5  # minimum interval of heartbeats


class Heartbeat:
    """The status of this rank for its launcher.  Without a launcher all methods do nothing."""

    def __init__(self) -> None:
        if environment.ELASTIC_RUN.is_set():
            die_with_parent()
            if environment.LAUNCHER.get() not in (None, os.getppid()):  # it has died already
                raise Preempted("the launcher ended before this rank started; run again")
        self._rank, self._last_beat = str(environment.RANK.get()), 0.0
        folder = environment.RANKS_FOLDER.get()
        self._file = Path(folder) / f"{self._rank}.json" if folder else None
        self._status: dict[str, Any] = {"pid": os.getpid(), "trains": False, "stacks": None}
        self._write()

    def _write(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # the disk of TMPDIR is full: training goes on unwatched
                self._file.write_text(json.dumps(self._status), encoding="utf-8")

    def beat(self) -> None:
        """Touch the file, at most every BEAT_SECONDS."""
        if self._file and time.monotonic() - self._last_beat > BEAT_SECONDS:
            self._last_beat = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def training(self) -> None:
        """Report that the first step is done: from now on the launcher expects frequent heartbeats."""
        if not self._status["trains"]:
            self._status["trains"] = True
            self._write()

    @contextlib.contextmanager
    def saving_stacks(self, directory: Path) -> Iterator[None]:
        """Inside, SIGUSR1 writes the stacks of all threads to <directory>.stacks/rank-<n>.txt.

        Leaving the context, also by an exception, is a regular end: the launcher stops watching this rank.
        """
        if not self._file:
            yield
            return
        path = manifest.sibling(directory, ".stacks") / f"rank-{self._rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            faulthandler.register(signal.SIGUSR1, file, all_threads=True)
            self._status["stacks"] = str(path)
            self._write()
            try:
                yield
            finally:
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)
                self._file.unlink(missing_ok=True)
                self._file = None
        if not path.stat().st_size:  # no stacks were written
            path.unlink()
            with contextlib.suppress(OSError):
                path.parent.rmdir()
