"""Follow a TrainJob to its end: what its pods wait for, the log of node 0, how it ended.

Three threads watch TrainJob, pods and events and put every change into one queue, which the main thread reads.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from components.trainjob.cluster import Cluster, Object
from components.trainjob.ended import End, Pod, attempt, end, exit_code, has_ended, has_started, is_pending, node
from components.trainjob.podlog import LogFollower, tail
from runtime.errors import Preempted, Refused

log = logging.getLogger("vgg.cluster")

TAIL_LINES = 40
FINAL_REASONS = {"TrainingRuntimeNotSupported"}  # of a condition: failed before any pod existed
LOG_SECONDS = 30.0  # for the rest of the log, once the TrainJob has ended


class Follower:
    """The known state of a TrainJob and its pods."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self._seen: queue.SimpleQueue[tuple[Callable[[Any], None], Any]] = queue.SimpleQueue()
        self._job: Object = {}
        self._was_seen = False  # by the watch
        self._pods: dict[str, Pod] = {}
        self._attempt = 0  # the newest one
        self._failed: dict[str, tuple[Pod, End, list[str]]] = {}
        self._logs: dict[str, LogFollower] = {}
        self._reported: set[tuple[str, ...]] = set()
        self._events: dict[str, Object] = {}

    def begin(self) -> None:
        """Start to watch.  Raises Refused if that is forbidden, before anything is created."""
        for take, watched in (
            (self._take_job, self.cluster.trainjobs(self.name)),
            (self._take_pods, self.cluster.pods(self.name)),
            (self._take_events, self.cluster.events()),
        ):
            self._seen.put((take, next(watched)))
            threading.Thread(target=self._watch, args=(take, watched), daemon=True).start()

    def _watch(self, take: Callable[[Any], None], watched: Iterator[dict[str, Object]]) -> None:
        try:
            for found in watched:
                self._seen.put((take, found))
        except Exception as error:  # raised again by the main thread
            self._seen.put((self._raise, error))

    @staticmethod
    def _raise(error: Exception) -> None:
        raise error

    def to_the_end(self, job: Object) -> int:
        """Wait for the end of this TrainJob; returns 0, or the exit code for its failure.

        Raises Preempted if the TrainJob is deleted, Unreachable if the API does not answer.
        """
        self._job = job
        while (outcome := self._outcome()) is None:
            take, seen = self._seen.get()
            take(seen)
        return outcome

    # -- changes

    def _take_job(self, found: dict[str, Object]) -> None:
        """Raises Preempted when the TrainJob is gone."""
        job = found.get(self._job["metadata"]["uid"])
        if job is not None:
            self._job, self._was_seen = job, True
            for condition in conditions(job):
                if condition["type"] == "Suspended" and condition["status"] == "True":
                    self._report("the TrainJob is suspended: it waits to be admitted", condition["lastTransitionTime"])
        elif self._was_seen:  # else the watch has not reached its creation
            raise Preempted(f"TrainJob {self.name} was deleted by somebody else; run again to continue")

    def _take_pods(self, found: dict[str, Pod]) -> None:
        # pods of a deleted TrainJob of the same name may still exist
        self._pods = {uid: pod for uid, pod in found.items() if created(pod) >= created(self._job)}
        for uid, pod in self._pods.items():
            if attempt(pod) > self._attempt:
                self._attempt, self._failed = attempt(pod), {}
                self._report(f"all pods are restarted, attempt {self._attempt + 1}")
            if attempt(pod) == self._attempt:
                self._check_pod(uid, pod)
        for uid, follower in self._logs.items():
            if uid not in self._pods or has_ended(self._pods[uid]):
                follower.ended.set()
        self._report_events()

    def _check_pod(self, uid: str, pod: Pod) -> None:
        name = pod["metadata"]["name"]
        if node(pod) == 0 and has_started(pod) and uid not in self._logs:
            self._report(f"--- log of pod {name}, node 0")
            self._logs[uid] = LogFollower(self.cluster, name, write)
            self._logs[uid].start()
        ended = end(pod)
        if ended and uid not in self._failed:
            # at once, because a restart of all pods deletes this one and its log
            self._failed[uid] = pod, ended, tail(self.cluster, name, TAIL_LINES)
            self._report(f"pod {name}, node {node(pod)}, has failed: {ended.text}", uid)

    def _take_events(self, found: dict[str, Object]) -> None:
        self._events = {uid: event for uid, event in found.items() if self._is_ours(event)}
        self._report_events()

    def _is_ours(self, event: Object) -> bool:
        name = str(event["involvedObject"].get("name", ""))
        return name == self.name or name.startswith(f"{self.name}-")

    def _report_events(self) -> None:
        """Log all events of pending pods and the warnings of all other objects, each once."""
        pending = {pod["metadata"]["name"] for pod in self._pods.values() if is_pending(pod)}
        for event in sorted(self._events.values(), key=when):
            target = event["involvedObject"]
            if when(event) >= created(self._job) and (target.get("name") in pending or event.get("type") == "Warning"):
                self._report(
                    f"{target.get('kind', '').lower()} {target.get('name')}: {event.get('reason')}: "
                    f"{(event.get('message') or '').strip()}"
                )

    def _report(self, text: str, *key: str) -> None:
        """Log a text once for every key."""
        if (text, *key) not in self._reported:
            self._reported.add((text, *key))
            log.info("%s", text)

    # -- the end

    def _outcome(self) -> int | None:
        found = {c["type"]: c for c in conditions(self._job) if c["status"] == "True"}
        if not found.keys() & {"Complete", "Failed"}:
            return None
        self._take_pods(next(self.cluster.pods(self.name)))  # the watch may not have seen their last changes
        for follower in self._logs.values():
            follower.join(LOG_SECONDS)
        if "Failed" in found:
            return self._report_failure(found["Failed"])
        log.info("TrainJob %s is complete", self.name)
        return 0

    def _report_failure(self, failure: Object) -> int:
        """Log a failure; returns the exit code.  Raises Refused if another attempt cannot succeed."""
        for condition in conditions(self._job):
            log.error(
                "TrainJob %s: %s=%s %s: %s", self.name, condition["type"], condition["status"],
                condition.get("reason", ""), condition.get("message", ""),
            )  # fmt: skip
        for pod, ended, last in sorted(self._failed.values(), key=lambda failed: node(failed[0])):
            log.error("--- pod %s, node %d: %s; its last lines:", pod["metadata"]["name"], node(pod), ended.text)
            for line in last:
                log.error("%s", line)
        if failure.get("reason") in FINAL_REASONS:
            raise Refused(f"TrainJob {self.name}: {failure.get('message')}. Check the TrainingRuntime and the Trainer.")
        code = exit_code([ended for _, ended, _ in self._failed.values()])
        log.error("TrainJob %s has failed; exit code %d", self.name, code)
        return code


def conditions(job: Object) -> list[Object]:
    return list(job.get("status", {}).get("conditions") or [])


def created(item: Object) -> str:
    return str(item["metadata"]["creationTimestamp"])


def when(event: Object) -> str:
    """The time of an event, to the second: comparable with an object's creation."""
    metadata = event["metadata"]
    times = (event.get("lastTimestamp"), event.get("eventTime"), metadata.get("creationTimestamp"))
    return f"{next((time for time in times if time), '')[:19]}Z"


def write(line: str) -> None:
    """Write a line of the training's log to standard output."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
