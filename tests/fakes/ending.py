"""The end of a process that a test has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

PATIENCE_SECONDS = 15


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any], group: bool = False) -> Iterator[None]:
    """End a process with the context: SIGTERM, and SIGKILL if it does not obey.

    group: its whole process group, which it must lead: MLflow's servers do not pass the signal on to their workers.
    """

    def send(number: int) -> None:
        os.killpg(process.pid, number) if group else process.send_signal(number)

    try:
        yield
    finally:
        send(signal.SIGTERM)
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            send(signal.SIGKILL)
            process.wait(PATIENCE_SECONDS)
