"""Being asked to end: SIGTERM, SIGHUP (the terminal was closed) and Ctrl-C, for every program alike."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

ASKED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Asked(KeyboardInterrupt):
    """Somebody asked this process to end.

    Not KeyboardInterrupt itself: where CPython (seen in 3.11 and 3.12) meets that inside exec() or eval() of a text, as
    many imports do them, it remembers it and ends the process by signal 2 instead of with its exit code, although the
    exception was caught (Py_RunMain, unhandled_keyboard_interrupt).
    """


def on_asked(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Have a handler called for each of them.  A SIGHUP that is ignored already stays so: that is what nohup is for."""
    for number in ASKED:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def ignore_asked() -> None:
    """For the end of a process: what comes twice, from a group and from a parent, does not disturb it."""
    for number in ASKED:
        signal.signal(number, signal.SIG_IGN)


def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """A handler that raises Asked."""
    raise Asked
