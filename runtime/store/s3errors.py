"""Errors of an object store: which of them pass, and the message of those that do not."""

from __future__ import annotations

import logging
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004  # botocore's base class of network errors
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

from runtime import environment
from runtime.errors import Problem, Refused, StorageFailure, Unreachable, WrongParameters
from runtime.retry import Outage, Retry

log = logging.getLogger("vgg")

QUIET_FAILURES = 3  # in a row: single ones, such as 503 SlowDown, are normal


class WrongAnswer(Exception):
    """An answer that does not fit the request; the next one may."""


STORE_ERRORS = (BotoCoreError, ClientError, HTTPError, ResponseParserError, WrongAnswer)
_TEMPORARY = (
    ConnectionError, CredentialRetrievalError, FlexibleChecksumError, HTTPClientError, IncompleteReadError,
    MetadataRetrievalError, ResponseParserError, HTTPError, WrongAnswer,
)  # fmt: skip
_TEMPORARY_CODES = {
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "OperationAborted", "RequestTimeout",
    "ServiceUnavailable", "SlowDown", "XAmzContentSHA256Mismatch",
}  # fmt: skip


def operation(where: str) -> Retry:
    """A retry of one operation on a store.  where: address of the object and of the store, for messages."""
    seconds = environment.S3_PATIENCE_SECONDS.get()
    return Retry(StoreErrors(where), seconds, Outage(where, log, timeout_seconds(), QUIET_FAILURES))


def timeout_seconds() -> float:
    return min(environment.S3_TIMEOUT_SECONDS.get(), environment.S3_PATIENCE_SECONDS.get())


def status_of(error: BaseException) -> tuple[int, str]:
    """HTTP status and error code of a store's answer; (0, '') for any other error."""
    if not isinstance(error, ClientError):
        return 0, ""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return status, str(error.response.get("Error", {}).get("Code", ""))


class StoreErrors:
    """A runtime.retry.Classifier."""

    errors: tuple[type[Exception], ...] = STORE_ERRORS

    def __init__(self, where: str) -> None:
        self.where = where

    def is_temporary(self, error: Exception) -> bool:
        status, code = status_of(error)
        if status:
            return (status >= 500 and status != 501) or status in (408, 429) or code in _TEMPORARY_CODES
        return isinstance(error, _TEMPORARY)

    def refusal(self, error: Exception) -> Problem:
        return explain(error, self.where)

    def gave_up(self, error: Exception, seconds: float) -> Problem:
        return Unreachable(
            f"{self.where}: no success for {seconds:.0f} s, the last reason: {_brief(error)}. "
            "Check the store and the network, then run the same command again; finished work is not lost."
        )

    def brief(self, error: Exception) -> str:
        return _brief(error)


def explain(error: Exception, where: str) -> Problem:
    """The message of an error that is not temporary."""
    status, code = status_of(error)
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return WrongParameters(
            f"{where}: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the "
            "machine a role."
        )
    if code == "NoSuchBucket":
        return WrongParameters(f"{where}: no such bucket. Check the address, AWS_ENDPOINT_URL and AWS_REGION.")
    if status in (401, 403):
        return WrongParameters(
            f"{where}: access refused ({_brief(error)}). Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, their "
            "permissions on this bucket, and this machine's clock."
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
    message = str(error.response.get("Error", {}).get("Message", "")).rstrip(".")
    return f"{status} {code}" if message in ("", code) or code == str(status) else f"{status} {code}: {message}"
