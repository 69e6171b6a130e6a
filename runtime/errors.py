"""What can go wrong for a user, each with the exit code that tells an orchestrator whether to try again.

The message of every one of these is complete: what, where, what to do.  The programs print it without a traceback.
"""

from __future__ import annotations


class Problem(Exception):
    """Something the user can act on.  Subclasses fix the exit code (sysexits.h where it has one)."""

    exit_code = 70


class WrongParameters(Problem):
    """Wrong usage or parameters.  Do not retry."""

    exit_code = 64


class BadData(Problem):
    """Bad input data, named.  Do not retry."""

    exit_code = 65


class Unreachable(Problem):
    """A service did not answer after bounded retries.  Retry."""

    exit_code = 69


class StorageFailure(Problem):
    """Disk or I/O failure.  Retry."""

    exit_code = 74


class Preempted(Problem):
    """StopRequested to stop; the state is saved.  Run again."""

    exit_code = 75


class Refused(Problem):
    """Artefacts do not belong together, or failed verification.  Do not retry."""

    exit_code = 78


class Interrupted(BaseException):
    """A stop was requested inside Stop.interrupts() (runtime.stopping); no Exception, so that nothing swallows it."""
