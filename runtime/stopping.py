"""Stop requests, and processes that end with their parent.

A request is SIGTERM, SIGHUP (the terminal was closed), Ctrl-C, or SIGUSR1, which batch systems send before the time of
a job is over (sbatch --signal=USR1@120).
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from types import FrameType
from typing import Any, NoReturn, Protocol

from runtime.errors import Interrupted, Preempted

PR_SET_PDEATHSIG = 1  # option of Linux's prctl
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)


class StopRequested(KeyboardInterrupt):
    """A stop of this process was requested.

    Not KeyboardInterrupt itself: if that is raised inside exec() or eval() of a string, which many imports use, CPython
    (3.11 and 3.12) ends the process by signal 2 instead of with its exit code, even if the exception was caught
    (Py_RunMain, unhandled_keyboard_interrupt).
    """


def on_stop_signal(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Install a handler for the stop signals.  A SIGHUP that is already ignored stays ignored, as nohup requires."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """Ignore further stop signals while the process ends; its parent may repeat the one to its process group."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def raise_stop_requested(_number: int, _frame: FrameType | None) -> NoReturn:
    """A handler that raises StopRequested."""
    raise StopRequested


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies.  Only on Linux; elsewhere it does nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Stop(Protocol):
    """Whether a stop of this process was requested."""

    def __call__(self) -> bool:
        """Whether a stop was requested.  Called at every step and batch; each call is also a heartbeat."""
        ...

    def interrupts(self) -> AbstractContextManager[None]:
        """In this context a request raises errors.Interrupted at once: for waits and work whose result is dropped."""
        ...


class StopSignal:
    """A Stop that is set by the stop signals.

    A second Ctrl-C stops at once.
    beat: called whenever the object is called, as a heartbeat.
    """

    def __init__(self, beat: Callable[[], None] = lambda: None) -> None:
        self.received, self._interrupting, self._beat = False, False, beat
        on_stop_signal(self._receive)

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGINT, raise_stop_requested)
        if self._interrupting:
            self._interrupting = False  # only once, so that cleaning up is not interrupted
            raise Interrupted

    def __call__(self) -> bool:
        self._beat()
        return self.received

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        self._interrupting = True
        try:
            if self.received:  # before this context was entered
                raise Interrupted
            yield
        finally:
            self._interrupting = False

    def raise_if_received(self) -> None:
        if self():
            raise Preempted("stopped before training started; run again")


class Never:
    """A Stop that is never requested."""

    def __call__(self) -> bool:
        return False

    def interrupts(self) -> AbstractContextManager[None]:
        return nullcontext()
