"""Repeat a request that fails until it succeeds, is refused, or has used up its time.

This is the only retry loop: object stores, Kubernetes and Kubeflow Pipelines use it, each with its own Classifier.
The retries of their clients are off, because two loops multiply and a client's loop knows nothing of progress.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from runtime.errors import Problem

T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 15.0  # seconds; doubled in between, then shortened at random by up to half


class Classifier(Protocol):
    """What the errors of one operation mean.  errors: what a request may raise; anything else is not caught."""

    errors: tuple[type[Exception], ...]

    def is_temporary(self, error: Exception) -> bool:
        """Whether the next try may succeed."""

    def refusal(self, error: Exception) -> Problem:
        """What to raise for an error that is not temporary."""

    def gave_up(self, error: Exception, seconds: float) -> Problem:
        """What to raise when the time is used up.  seconds: since the last success; error: the last one."""

    def brief(self, error: Exception) -> str:
        """The error in a few words, for the log."""


class Outage:
    """How long a service has failed.  Thread-safe: the operations of one client may share it.

    service: its name in the log.  longest_attempt: seconds that one failed attempt counts at most, so that a long
    upload that breaks is not counted as silence.  quiet_failures: failures that are not logged.
    """

    def __init__(
        self, service: str, log: logging.Logger, longest_attempt: float = math.inf, quiet_failures: int = 0
    ) -> None:
        self.service, self.longest_attempt, self.quiet_failures = service, longest_attempt, quiet_failures
        self._log, self._lock = log, threading.Lock()
        self._failures, self._counted, self._since, self._last = 0, 0.0, 0.0, 0.0

    def add(self, started: float, pause: float, message: str) -> tuple[float, float]:
        """Count a failed attempt; returns the seconds counted so far and the seconds since the last success.

        started: time.monotonic() before the attempt and the pause in front of it.  pause: its seconds.  message: for
        the log, of the first failure that is not quiet.
        """
        with self._lock:
            now = time.monotonic()
            counted = min(now - max(started, self._last), self.longest_attempt + pause)
            self._since = self._since if self._failures else started
            self._failures, self._counted, self._last = self._failures + 1, self._counted + counted, now
            if self._failures == self.quiet_failures + 1:
                self._log.warning("%s: %s", self.service, message)
            return self._counted, now - self._since

    def end(self) -> None:
        """The service answers."""
        with self._lock:
            if self._failures > self.quiet_failures:
                self._log.info("%s answers again", self.service)
            self._failures, self._counted, self._last = 0, 0.0, 0.0


class Retry:
    """One operation.  seconds: how long it may fail in a row.  outage: shared with other operations, or its own."""

    def __init__(self, classifier: Classifier, seconds: float, outage: Outage) -> None:
        self._classifier, self._seconds, self._outage = classifier, seconds, outage
        self._failures, self._pause, self._started = 0, 0.0, time.monotonic()

    def call(self, request: Callable[[], T]) -> T:
        """The answer of a request, repeated as needed.  Raises a Problem as failed() does."""
        while True:
            try:
                answer = request()
            except self._classifier.errors as error:
                self.failed(error)
            else:
                self.progress()
                return answer

    def progress(self) -> None:
        """Renew the time: the operation has succeeded or moved forward."""
        self._failures, self._pause, self._started = 0, 0.0, time.monotonic()
        self._outage.end()

    def failed(self, error: Exception) -> None:
        """Sleep before the next try.  Raises a Problem when the error is not temporary or the time is used up."""
        if not self._classifier.is_temporary(error):
            self._outage.end()  # a refusal is an answer
            raise self._classifier.refusal(error) from None
        message = f"{self._classifier.brief(error)}; trying for {self._seconds:.0f} s"
        counted, silent = self._outage.add(self._started, self._pause, message)
        if counted >= self._seconds:
            raise self._classifier.gave_up(error, silent) from None
        longest = min(FIRST_PAUSE * 2 ** min(self._failures, 20), LONGEST_PAUSE)
        # the last try is at the end of the time, not before it
        self._pause = min(longest * random.uniform(0.5, 1), self._seconds - counted)  # noqa: S311
        self._failures, self._started = self._failures + 1, time.monotonic()
        time.sleep(self._pause)
