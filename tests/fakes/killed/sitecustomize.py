"""On the path of a program under test: every process of it counts the calls that change something, before and after,
and the one that reaches KILL_AT kills them all.  KILL_COUNTER: a file that grows by a byte a moment."""

import os
import signal
from collections.abc import Callable
from typing import Any

AT, COUNTER = int(os.environ["KILL_AT"]), os.environ["KILL_COUNTER"]


def moment() -> None:
    fd = os.open(COUNTER, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, b".")
    reached = os.fstat(fd).st_size
    os.close(fd)
    if 0 < AT <= reached:
        os.killpg(0, signal.SIGKILL)


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        moment()
        try:
            return function(*args, **kwargs)
        finally:
            moment()

    return call


if os.environ["KILL_IN"] == "files":
    os.fsync, os.replace, os.unlink = counted(os.fsync), counted(os.replace), counted(os.unlink)
else:
    from botocore.httpsession import URLLib3Session

    URLLib3Session.send = counted(URLLib3Session.send)  # type: ignore[method-assign]
