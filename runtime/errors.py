"""Errors that a user can act on; the exit code tells an orchestrator whether to try again.

Every message is complete: what, where, what to do.  The programs print it without a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class Problem(Exception):
    """An error that the user can act on.  Subclasses set the exit code (that of sysexits.h if it has one).

    everything: all items of which the message names only some (wording.some); the programs write them to a file.
    """

    exit_code = 70

    def __init__(self, message: str = "", everything: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.everything = tuple(everything)


class WrongParameters(Problem):
    """Wrong usage or parameters.  Do not retry."""

    exit_code = 64


class BadData(Problem):
    """Bad input data; the message names it.  Do not retry."""

    exit_code = 65


class Unreachable(Problem):
    """A service did not answer after bounded retries.  Retry."""

    exit_code = 69


class StorageFailure(Problem):
    """Disk or I/O failure.  Retry."""

    exit_code = 74


class Preempted(Problem):
    """Stopped on request, or because another process is gone; saved state is good.  Run again."""

    exit_code = 75


class Refused(Problem):
    """Artifacts do not belong together, or verification failed.  Do not retry."""

    exit_code = 78


class Interrupted(BaseException):
    """A stop was requested inside Stop.interrupts() (runtime.stopping).  Not an Exception, so nothing catches it."""
