"""A pod's log, followed to its end: every line once, however often the connection breaks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from kubernetes.client import ApiException
from urllib3.exceptions import HTTPError, ReadTimeoutError

from components.train.cluster import FIRST_PAUSE, QUIET_SECONDS, TIMEOUT, Cluster, explain, log, passes
from components.train.trainjob import NODE
from vgg.errors import Problem

SILENT_SECONDS = 120  # after which a log that says nothing is asked for anew: its connection may have died
OVERLAP = timedelta(seconds=1)  # of two connections: lines of stdout and stderr may be out of order by a little
WAITING, GONE = 400, 404  # a container that is not there yet, a pod that is no more


class Position:
    """How far a log has been read.  The API begins again at a whole second, so that lines are told apart here."""

    def __init__(self) -> None:
        self._last: datetime | None = None  # second
        self._read: dict[datetime, Counter[str]] = {}
        self._again: Counter[str] = Counter()

    def since(self) -> str | None:
        """Where the API shall begin; it will repeat what has been read since then."""
        if self._last is None:
            return None
        self._again = sum(self._read.values(), Counter())
        return (self._last - OVERLAP).strftime("%Y-%m-%dT%H:%M:%SZ")

    def new(self, line: str) -> str | None:
        """The text of a line that begins with its time, or None if it was read before."""
        if self._again[line]:
            self._again[line] -= 1
            return None
        stamp, _, text = line.partition(" ")
        try:
            second = datetime.fromisoformat(stamp).astimezone(UTC).replace(microsecond=0)
        except ValueError:  # a word of the kubelet's own
            return line
        self._last = max(second, self._last or second)
        self._read.setdefault(second, Counter())[line] += 1
        self._read = {when: lines for when, lines in self._read.items() if when >= self._last - OVERLAP}
        return text


class LogFollower(threading.Thread):
    """Hands every line of a pod's log to `tell`; ends when there will be no more.

    ended: to be set when the pod has.
    """

    def __init__(self, cluster: Cluster, pod: str, tell: Callable[[str], None]) -> None:
        super().__init__(name=f"log of {pod}", daemon=True)
        self.ended = threading.Event()
        self._cluster, self._pod, self._tell = cluster, pod, tell

    def run(self) -> None:
        position, pause, failures = Position(), FIRST_PAUSE, 0
        while True:
            last = self.ended.is_set()  # then what is read now is all
            try:
                for line in lines(self._cluster, self._pod, since=position.since()):
                    failures = 0
                    if (text := position.new(line)) is not None:
                        self._tell(text)
                self._cluster.answered()
                if last:
                    return
                self.ended.wait(QUIET_SECONDS)
            except ReadTimeoutError:
                continue
            except (ApiException, HTTPError, OSError) as error:
                failures += 1
                pause = FIRST_PAUSE if failures == 1 else pause
                if isinstance(error, ApiException) and error.status == WAITING:
                    time.sleep(QUIET_SECONDS)
                elif isinstance(error, ApiException) and not passes(error):
                    if error.status != GONE:
                        log.warning("the log of %s is not shown: %s", self._pod, why(error, self._cluster))
                    return
                else:
                    try:
                        pause = self._cluster.wait(f"the log of {self._pod}", error, pause)
                    except Problem:  # whoever watches the TrainJob says it
                        return


def tail(cluster: Cluster, pod: str, count: int) -> list[str]:
    """The last lines of a pod's log, or why there are none."""
    try:
        return [line.partition(" ")[2] for line in lines(cluster, pod, follow=False, tail=count)]
    except ApiException as error:
        return [f"(no log: {'the pod is gone' if error.status == GONE else why(error, cluster)})"]
    except (HTTPError, OSError) as error:
        return [f"(no log: {error})"]


def why(error: ApiException, cluster: Cluster) -> str:
    return str(explain(error, "get pods/log", cluster.namespace))


def lines(
    cluster: Cluster, pod: str, since: str | None = None, follow: bool = True, tail: int | None = None
) -> Iterator[str]:
    """Of the training's container, each with its time.  Raises what the client raises, also when cut in the middle."""
    wanted = {"container": NODE, "timestamps": "true", "follow": str(follow).lower()}
    wanted |= {"sinceTime": since} if since else {}
    wanted |= {"tailLines": str(tail)} if tail else {}
    # by hand: the client's own method does not know sinceTime, and seconds before now need clocks that agree
    response: Any = cluster.api.call_api(
        "/api/v1/namespaces/{namespace}/pods/{name}/log", "GET", {"namespace": cluster.namespace, "name": pod},
        list(wanted.items()), {}, auth_settings=["BearerToken"], _preload_content=False, _return_http_data_only=True,
        _request_timeout=(TIMEOUT[0], SILENT_SECONDS),
    )  # fmt: skip
    try:
        rest = b""
        for piece in response.stream(amt=None, decode_content=False):
            *whole, rest = (rest + piece).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
        if rest:  # only at a true end: of a connection that was cut nothing half is passed on
            yield rest.decode(errors="replace")
    finally:
        response.close()
        response.release_conn()
