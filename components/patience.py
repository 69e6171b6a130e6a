"""How long a store that fails is tried again, and what a user is told when that does not help.

One loop for every request, botocore's own is off: two loops multiply, and only one of them knows of progress.

    VGG_S3_PATIENCE_SECONDS   how long an operation may go without progress (120)
    VGG_S3_TIMEOUT_SECONDS    how long one request may be silent (20; never longer than the patience)
"""

from __future__ import annotations

import os
import random
import time
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004  # botocore's base of what a network does
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from vgg.errors import Problem, Refused, StorageFailure, Unreachable, WrongParameters

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0  # seconds; doubled in between, and up to a half of it left out by chance


class Broken(Exception):
    """An answer that is not what was asked for, of a kind that the next try may mend."""


STORE_ERRORS = (BotoCoreError, ClientError, HTTPError, ResponseParserError, Broken)
_PASSING = (
    ConnectionError, CredentialRetrievalError, FlexibleChecksumError, HTTPClientError, IncompleteReadError,
    MetadataRetrievalError, ResponseParserError, HTTPError, Broken,
)  # fmt: skip
_PASSING_CODES = {
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "OperationAborted", "RequestTimeout",
    "ServiceUnavailable", "SlowDown", "XAmzContentSHA256Mismatch",
}  # fmt: skip


def seconds(variable: str, default: float) -> float:
    """A number of seconds from the environment.  Raises WrongParameters."""
    text = os.environ.get(variable, str(default))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise WrongParameters(f"{variable}: {text!r} is no number of seconds above 0")
    return value


def patience_seconds() -> float:
    return seconds("VGG_S3_PATIENCE_SECONDS", 120)


def timeout_seconds() -> float:
    return min(seconds("VGG_S3_TIMEOUT_SECONDS", 20), patience_seconds())


def status_of(error: BaseException) -> tuple[int, str]:
    """HTTP status and error code of a store's answer; (0, '') of anything else."""
    if not isinstance(error, ClientError):
        return 0, ""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return status, str(error.response.get("Error", {}).get("Code", ""))


class Patience:
    """The budget of one operation.  where: address of the object and of the store, for messages."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.budget, self.timeout = patience_seconds(), timeout_seconds()
        self.began = time.monotonic()
        self.progress()

    def progress(self) -> None:
        """Something has come of it: the budget is whole again."""
        self.spent, self.failures = 0.0, 0
        self.resumed = time.monotonic()

    def wait(self, error: Exception) -> None:
        """Sleep before the next try.

        Raises a Problem when another try is of no use, and Unreachable when the budget is used up.
        """
        if not _passes(error):
            raise explain(error, self.where) from error
        # what took longer than a request may be silent was no silence: a long upload is charged for its failure only
        self.spent += min(time.monotonic() - self.resumed, self.timeout)
        pause = min(FIRST_PAUSE * 2**self.failures, LONGEST_PAUSE) * random.uniform(0.5, 1)  # noqa: S311
        if self.spent + pause > self.budget:
            tried = time.monotonic() - self.began
            raise Unreachable(
                f"{self.where}: no success for {tried:.0f} s, the last reason: {_brief(error)}. "
                "Check the store and the network, then run the same command again; finished work is kept."
            ) from error
        time.sleep(pause)
        self.spent += pause
        self.failures += 1
        self.resumed = time.monotonic()


def _passes(error: Exception) -> bool:
    status, code = status_of(error)
    if status:
        return (status >= 500 and status != 501) or status in (408, 429) or code in _PASSING_CODES
    return isinstance(error, _PASSING)


def explain(error: Exception, where: str) -> Problem:
    """The message of an answer that will not change by asking again."""
    status, code = status_of(error)
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return WrongParameters(
            f"{where}: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the "
            "machine a role."
        )
    if code == "NoSuchBucket":
        return WrongParameters(f"{where}: there is no such bucket. Check the address, AWS_ENDPOINT_URL and AWS_REGION.")
    if status in (401, 403):
        return WrongParameters(
            f"{where}: access refused ({_brief(error)}). Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, what they "
            "may do in this bucket, and this machine's clock."
        )
    if status == 404:
        return Refused(f"{where}: missing. Run the stage that makes it, or check the address.")
    if status == 412:
        return StorageFailure(f"{where}: was replaced while it was being read. Run the same command again.")
    return WrongParameters(f"{where}: {_brief(error)}. Check the address, AWS_ENDPOINT_URL and AWS_REGION.")


def _brief(error: Any) -> str:
    status, code = status_of(error)
    if not status:
        return str(error).rstrip(".")
    said = str(error.response.get("Error", {}).get("Message", "")).rstrip(".")
    return f"{status} {code}" if said in ("", code) or code == str(status) else f"{status} {code}: {said}"
