"""A pod's log, followed to its end: every line once, even if the connection breaks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from kubernetes.client import ApiException
from urllib3.exceptions import ReadTimeoutError

from components.trainjob.body import NODE
from components.trainjob.cluster import QUIET_SECONDS, TIMEOUT, Cluster, log
from components.trainjob.refusals import ApiErrors, brief, explain
from runtime.errors import Problem, Unreachable

SILENT_SECONDS = 120  # without a line, after which the log is requested again: the connection may be dead
OVERLAP = timedelta(seconds=1)  # of two connections: lines of stdout and stderr may be slightly out of order
WAITING, GONE = 400, 404  # the status for a container that has not started, and for a deleted pod


class Position:
    """How far a log has been read.  The API starts at a whole second and so repeats lines, which are skipped here."""

    def __init__(self) -> None:
        self._last: datetime | None = None  # second
        self._read: dict[datetime, Counter[str]] = {}
        self._again: Counter[str] = Counter()

    def since(self) -> str | None:
        """The time to request the log from; lines after it that were already read will be repeated."""
        if self._last is None:
            return None
        self._again = sum(self._read.values(), Counter())
        return (self._last - OVERLAP).strftime("%Y-%m-%dT%H:%M:%SZ")

    def new(self, line: str) -> str | None:
        """The text of a line that starts with its time, or None if it was already read."""
        if self._again[line]:
            self._again[line] -= 1
            return None
        stamp, _, text = line.partition(" ")
        try:
            second = datetime.fromisoformat(stamp).astimezone(UTC).replace(microsecond=0)
        except ValueError:  # a message of the kubelet
            return line
        self._last = max(second, self._last or second)
        self._read.setdefault(second, Counter())[line] += 1
        self._read = {when: lines for when, lines in self._read.items() if when >= self._last - OVERLAP}
        return text


class LogFollower(threading.Thread):
    """Passes every line of a pod's log to `tell` until the log ends.

    ended: to be set when the pod has ended.
    """

    def __init__(self, cluster: Cluster, pod: str, tell: Callable[[str], None]) -> None:
        super().__init__(name=f"log of {pod}", daemon=True)
        self.ended = threading.Event()
        self._cluster, self._pod, self._tell = cluster, pod, tell

    def run(self) -> None:
        position, retry = Position(), self._cluster.operation("get pods/log")
        while True:
            is_last = self.ended.is_set()  # then the log is complete
            try:
                for line in lines(self._cluster, self._pod, since=position.since()):
                    retry.progress()
                    if (text := position.new(line)) is not None:
                        self._tell(text)
                retry.progress()
                if is_last:
                    return
                self.ended.wait(QUIET_SECONDS)
            except ReadTimeoutError:
                continue
            except ApiErrors.errors as error:
                status = error.status if isinstance(error, ApiException) else None
                if status == GONE:
                    return
                if status == WAITING:
                    time.sleep(QUIET_SECONDS)
                    continue
                try:
                    retry.failed(error)
                except Unreachable:  # reported by the watch of the TrainJob
                    return
                except Problem as refusal:
                    log.warning("the log of %s is not shown: %s", self._pod, refusal)
                    return


def tail(cluster: Cluster, pod: str, count: int) -> list[str]:
    """The last lines of a pod's log, or why there are none."""
    try:
        return [line.partition(" ")[2] for line in lines(cluster, pod, follow=False, tail=count)]
    except ApiErrors.errors as error:
        if not isinstance(error, ApiException):
            return [f"(no log: {brief(error)})"]
        reason = "the pod is gone" if error.status == GONE else explain(error, "get pods/log", cluster.namespace)
        return [f"(no log: {reason})"]


def lines(
    cluster: Cluster, pod: str, since: str | None = None, follow: bool = True, tail: int | None = None
) -> Iterator[str]:
    """Lines of the training's container, each with its time.  Raises ApiErrors.errors, also half way."""
    wanted = {"container": NODE, "timestamps": "true", "follow": str(follow).lower()}
    wanted |= {"sinceTime": since} if since else {}
    wanted |= {"tailLines": str(tail)} if tail else {}
    # the client's own method has no sinceTime, and its sinceSeconds needs synchronous clocks
    response: Any = cluster.api.call_api(
        "/api/v1/namespaces/{namespace}/pods/{name}/log", "GET", {"namespace": cluster.namespace, "name": pod},
        list(wanted.items()), {}, auth_settings=["BearerToken"], _preload_content=False, _return_http_data_only=True,
        _request_timeout=(TIMEOUT[0], SILENT_SECONDS),
    )  # fmt: skip
    cluster.granted.add("get pods/log")
    try:
        rest = b""
        for piece in response.stream(amt=None, decode_content=False):
            *whole, rest = (rest + piece).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
        if rest:  # only at the end of the log: a broken connection raises, so no half line is passed on
            yield rest.decode(errors="replace")
    finally:
        response.close()
        response.release_conn()
