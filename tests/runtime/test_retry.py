"""The retry loop: renewed by progress, bounded, shared between threads, ended by a refusal; time is simulated."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from collections.abc import Callable

import pytest

from runtime import retry
from runtime.errors import Problem, Refused, Unreachable
from runtime.retry import LONGEST_PAUSE, Outage, Retry

log = logging.getLogger("vgg")


class Temporary(Exception):
    pass


class Final(Exception):
    pass


class Errors:
    errors: tuple[type[Exception], ...] = (Temporary, Final)

    def is_temporary(self, error: Exception) -> bool:
        return isinstance(error, Temporary)

    def refusal(self, error: Exception) -> Problem:
        return Refused(f"refused: {error}")

    def gave_up(self, error: Exception, seconds: float) -> Problem:
        return Unreachable(f"{seconds:.0f} s: {error}")

    def brief(self, error: Exception) -> str:
        return str(error)


class Clock:
    """Simulated time.  slept: every pause."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    return clock


def failing(clock: Clock, seconds: float, times: float = math.inf) -> Callable[[], str]:
    """A request that takes some seconds and fails several times."""
    calls = 0

    def request() -> str:
        nonlocal calls
        calls, clock.now = calls + 1, clock.now + seconds
        if calls <= times:
            raise Temporary("503")
        return "answer"

    return request


def test_an_answer_after_failures_is_logged(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vgg")
    assert Retry(Errors(), 60, Outage("the store", log)).call(failing(clock, 1, times=4)) == "answer"
    assert caplog.messages == ["the store: 503; trying for 60 s", "the store answers again"]
    for number, pause in enumerate(clock.slept):
        assert 0.1 * 2**number <= pause <= 0.2 * 2**number
    caplog.clear()
    assert Retry(Errors(), 60, Outage("the store", log, quiet_failures=4)).call(failing(clock, 1, times=4)) == "answer"
    assert not caplog.messages


def test_the_time_is_used_to_its_end_and_not_exceeded(clock: Clock) -> None:
    began = clock.now
    with pytest.raises(Unreachable, match="100 s: 503"):
        Retry(Errors(), 100, Outage("the store", log)).call(failing(clock, 0))
    assert clock.now == pytest.approx(began + 100)
    assert max(clock.slept) <= LONGEST_PAUSE


def test_a_long_attempt_that_fails_counts_as_a_short_one(clock: Clock) -> None:
    request = failing(clock, 500, times=3)  # an upload that breaks off
    assert Retry(Errors(), 100, Outage("the store", log, longest_attempt=20)).call(request) == "answer"
    with pytest.raises(Unreachable, match=r"250\d s"):
        Retry(Errors(), 100, Outage("the store", log, longest_attempt=20)).call(failing(clock, 500))


def test_progress_renews_time_and_pauses(clock: Clock) -> None:
    operation = Retry(Errors(), 10, Outage("the store", log))
    for _ in range(50):  # a download that breaks off again and again
        clock.now += 9
        operation.progress()
        operation.failed(Temporary("cut"))
    assert max(clock.slept) <= 0.2


def test_a_refusal_ends_at_once_and_other_errors_pass_through(clock: Clock) -> None:
    def refused() -> None:
        raise Final("403")

    def wrong() -> None:
        raise KeyError("a bug")

    for request, error in ((refused, Refused), (wrong, KeyError)):
        with pytest.raises(error):
            Retry(Errors(), 60, Outage("the store", log)).call(request)
    assert not clock.slept


def test_operations_share_an_outage(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """One log line and one clock for all threads of a client; any answer ends it."""
    caplog.set_level("INFO", "vgg")
    outage = Outage("the API", log)
    first, second, third = (Retry(Errors(), 60, outage) for _ in range(3))
    first.failed(Temporary("503"))
    clock.now += 40
    second.failed(Temporary("503"))
    clock.now += 40
    with pytest.raises(Unreachable, match=r"8\d s"):
        third.failed(Temporary("503"))
    assert caplog.messages == ["the API: 503; trying for 60 s"]
    second.progress()
    clock.now += 1000
    first.progress()
    first.failed(Temporary("503"))
    assert caplog.messages == [
        "the API: 503; trying for 60 s",
        "the API answers again",
        "the API: 503; trying for 60 s",
    ]


def test_importing_places_loads_no_client() -> None:
    """The loop and the locations of outputs are for every image; the clients of services are not."""
    code = "import runtime.retry, runtime.store.place, runtime.store.storage, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"boto3", "botocore", "mlflow", "kubernetes", "kfp", "urllib3", "vgg", "components"} & set(loaded)
