"""Being asked to stop, and being watched: what the loop needs to know of the world outside."""

from __future__ import annotations

import ctypes
import signal
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Protocol

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies; elsewhere than on Linux, nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Stop(Protocol):
    """Whether this process has been asked to stop."""

    def __call__(self) -> bool:
        """Asked at every step and batch; being asked is also this process's sign of life to whoever watches it."""
        ...

    def interrupts(self) -> AbstractContextManager[None]:
        """Inside, a request raises errors.Interrupted at once: for waits and for work of which nothing is kept."""
        ...


class Never:
    """Nobody asks."""

    def __call__(self) -> bool:
        return False

    def interrupts(self) -> AbstractContextManager[None]:
        return nullcontext()
