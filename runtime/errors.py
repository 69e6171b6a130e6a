"""Errors that a user can act on; the exit code tells an orchestrator whether to try again.

Every message is complete: what, where, what to do.  The programs print it without a traceback.
"""

from __future__ import annotations


class Problem(Exception):
    """An error that the user can act on.  Subclasses set the exit code (that of sysexits.h if it has one)."""

    exit_code = 70


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
