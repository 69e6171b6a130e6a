"""Requests to stop: SIGTERM, SIGHUP (the terminal was closed) and Ctrl-C; and processes that die with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from types import FrameType
from typing import Any, NoReturn, Protocol

from runtime.errors import Interrupted, Preempted

PR_SET_PDEATHSIG = 1  # of Linux's prctl
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class StopRequested(KeyboardInterrupt):
    """Somebody asked this process to end.

    Not KeyboardInterrupt itself: where CPython (seen in 3.11 and 3.12) meets that inside exec() or eval() of a text, as
    many imports do them, it remembers it and ends the process by signal 2 instead of with its exit code, although the
    exception was caught (Py_RunMain, unhandled_keyboard_interrupt).
    """


def on_stop_signal(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Have a handler called for each of them.  A SIGHUP that is ignored already stays so: that is what nohup is for."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """For the end of a process: what comes twice, from a group and from a parent, does not disturb it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def raise_stop_requested(_number: int, _frame: FrameType | None) -> NoReturn:
    """A handler that raises StopRequested."""
    raise StopRequested


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies; elsewhere than on Linux, nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Stop(Protocol):
    """Whether this process has been asked to stop."""

    def __call__(self) -> bool:
        """Called at every step and batch; being called is also this process's sign of life."""
        ...

    def interrupts(self) -> AbstractContextManager[None]:
        """Inside, a request raises errors.Interrupted at once: for waits and for work of which nothing is kept."""
        ...


class StopSignal:
    """Whether this process has been asked to stop (SIGTERM, SIGHUP, Ctrl-C): a Stop.

    A second Ctrl-C stops at once.
    beat: called whenever somebody asks, as a sign of life.
    """

    def __init__(self, beat: Callable[[], None] = lambda: None) -> None:
        self.received, self._interrupting, self._beat = False, False, beat
        on_stop_signal(self._receive)

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGINT, raise_stop_requested)
        if self._interrupting:
            self._interrupting = False  # once: whoever cleans up is not interrupted again
            raise Interrupted

    def __call__(self) -> bool:
        self._beat()
        return self.received

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        self._interrupting = True
        try:
            if self.received:  # just before
                raise Interrupted
            yield
        finally:
            self._interrupting = False

    def raise_if_received(self) -> None:
        if self():
            raise Preempted("stopped before training began; run again")


class Never:
    """Nobody asks."""

    def __call__(self) -> bool:
        return False

    def interrupts(self) -> AbstractContextManager[None]:
        return nullcontext()
