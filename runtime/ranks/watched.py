"""A rank under a launcher: it dies with it, gives signs of life, and shows where it hangs.

The launcher (components.launch) names a folder in VGG_RANKS.  A rank puts a file there, <rank>.json, and touches it
again and again; the file says who it is and where its stacks go when SIGUSR1 comes.
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

BEAT_SECONDS = 0.5  # between two touches, at least


class Life:
    """This rank, as the launcher that watches it shall see it; does nothing without one."""

    def __init__(self) -> None:
        if environment.ELASTIC_RUN.is_set():
            die_with_parent()
            if environment.LAUNCHER.get() not in (None, os.getppid()):  # it has died already
                raise Preempted("the launcher has ended before this rank began; run again")
        self._rank, self._touched = str(environment.RANK.get()), 0.0
        folder = environment.RANKS_FOLDER.get()
        self._file = Path(folder) / f"{self._rank}.json" if folder else None
        self._about: dict[str, Any] = {"pid": os.getpid(), "trains": False, "stacks": None}
        self._tell()

    def _tell(self) -> None:
        if self._file:
            self._file.write_text(json.dumps(self._about))

    def beat(self) -> None:
        """Still there."""
        if self._file and time.monotonic() - self._touched > BEAT_SECONDS:
            self._touched = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def trains(self) -> None:
        """Past its first step: from here on signs of life come often."""
        if not self._about["trains"]:
            self._about["trains"] = True
            self._tell()

    @contextlib.contextmanager
    def stacks_beside(self, directory: Path) -> Iterator[None]:
        """While inside, SIGUSR1 writes the stacks of all threads to <directory>.stacks/rank-<n>.txt.

        Whoever leaves, by whatever exception, ends in order: the launcher need not look after it any more.
        """
        if not self._file:
            yield
            return
        path = manifest.sibling(directory, ".stacks") / f"rank-{self._rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            faulthandler.register(signal.SIGUSR1, file, all_threads=True)
            self._about["stacks"] = str(path)
            self._tell()
            try:
                yield
            finally:
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)
                self._file.unlink(missing_ok=True)
                self._file = None
        if not path.stat().st_size:  # nobody asked
            path.unlink()
            with contextlib.suppress(OSError):
                path.parent.rmdir()
