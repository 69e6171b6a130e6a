"""A TrainJob, followed to its end: what its pods wait for, what node 0 says, how it ended.

Three threads watch and put what they see into one queue; whoever reads it here knows the state of everything.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from components.train.cluster import Cluster, Object
from components.train.ended import End, Pod, attempt, end, exit_code, has_begun, has_ended, is_pending, node
from components.train.podlog import LogFollower, tail
from vgg.errors import Preempted, Refused

log = logging.getLogger("vgg.cluster")

TAIL_LINES = 40
FINAL_REASONS = {"TrainingRuntimeNotSupported"}  # of a failure before any pod
LOG_SECONDS = 30.0  # for the rest of the log, once the TrainJob has ended


class Follower:
    """What is known of a TrainJob and its pods."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self._seen: queue.SimpleQueue[tuple[Callable[[Any], None], Any]] = queue.SimpleQueue()
        self._job: Object = {}
        self._was_there = False  # it has been among what is watched
        self._pods: dict[str, Pod] = {}
        self._attempt = 0  # the newest of which pods were seen
        self._failed: dict[str, tuple[Pod, End, list[str]]] = {}
        self._logs: dict[str, LogFollower] = {}
        self._told: set[tuple[str, ...]] = set()
        self._events: dict[str, Object] = {}

    def begin(self) -> None:
        """Begin to watch.  Raises what forbids it, before anything has been made."""
        for take, watched in (
            (self._take_job, self.cluster.trainjobs(self.name)),
            (self._take_pods, self.cluster.pods(self.name)),
            (self._take_events, self.cluster.events()),
        ):
            self._seen.put((take, next(watched)))
            threading.Thread(target=self._watch, args=(take, watched), daemon=True).start()

    def _watch(self, take: Callable[[Any], None], watched: Iterator[dict[str, Object]]) -> None:
        try:
            for there in watched:
                self._seen.put((take, there))
        except Exception as error:  # whatever it is, nobody waits for this thread then
            self._seen.put((self._raise, error))

    @staticmethod
    def _raise(error: Exception) -> None:
        raise error

    def to_the_end(self, job: Object) -> int:
        """Wait for the end of this TrainJob; returns 0, or the exit code that its failure stands for.

        Raises Preempted if somebody deletes it, Unreachable if the API stays away.
        """
        self._job = job
        while (outcome := self._outcome()) is None:
            take, what = self._seen.get()
            take(what)
        return outcome

    # -- what has been seen

    def _take_job(self, there: dict[str, Object]) -> None:
        """Raises Preempted when the TrainJob is gone."""
        job = there.get(self._job["metadata"]["uid"])
        if job is not None:
            self._job, self._was_there = job, True
            for condition in conditions(job):
                if condition["type"] == "Suspended" and condition["status"] == "True":
                    self._say("the TrainJob is suspended: it waits to be admitted", condition["lastTransitionTime"])
        elif self._was_there:  # before that, what is seen is of before it was made
            raise Preempted(f"TrainJob {self.name} was deleted by somebody else; run again to go on")

    def _take_pods(self, there: dict[str, Pod]) -> None:
        # a TrainJob of the same name may have been deleted just before
        self._pods = {uid: pod for uid, pod in there.items() if created(pod) >= created(self._job)}
        for uid, pod in self._pods.items():
            if attempt(pod) > self._attempt:
                self._attempt, self._failed = attempt(pod), {}
                self._say(f"all pods start again, for the {ordinal(self._attempt)} time")
            if attempt(pod) == self._attempt:
                self._look_at(uid, pod)
        for uid, follower in self._logs.items():
            if uid not in self._pods or has_ended(self._pods[uid]):
                follower.ended.set()
        self._tell_events()

    def _look_at(self, uid: str, pod: Pod) -> None:
        name = pod["metadata"]["name"]
        if node(pod) == 0 and has_begun(pod) and uid not in self._logs:
            self._say(f"--- log of pod {name}, node 0")
            self._logs[uid] = LogFollower(self.cluster, name, tell)
            self._logs[uid].start()
        found = end(pod)
        if found and uid not in self._failed:
            # now: when all start again it will be deleted, with its log
            self._failed[uid] = pod, found, tail(self.cluster, name, TAIL_LINES)
            self._say(f"pod {name}, node {node(pod)}, has failed: {found.words}", uid)

    def _take_events(self, there: dict[str, Object]) -> None:
        self._events = {uid: event for uid, event in there.items() if self._is_ours(event)}
        self._tell_events()

    def _is_ours(self, event: Object) -> bool:
        about = str(event["involvedObject"].get("name", ""))
        return about == self.name or about.startswith(f"{self.name}-")

    def _tell_events(self) -> None:
        """Of pods that wait all, of anything else what goes wrong.  Each once, however often it is repeated."""
        pending = {pod["metadata"]["name"] for pod in self._pods.values() if is_pending(pod)}
        for event in sorted(self._events.values(), key=when):
            about = event["involvedObject"]
            if when(event) >= created(self._job) and (about.get("name") in pending or event.get("type") == "Warning"):
                self._say(
                    f"{about.get('kind', '').lower()} {about.get('name')}: {event.get('reason')}: "
                    f"{(event.get('message') or '').strip()}"
                )

    def _say(self, text: str, *also: str) -> None:
        """Once."""
        if (text, *also) not in self._told:
            self._told.add((text, *also))
            log.info("%s", text)

    # -- how it ended

    def _outcome(self) -> int | None:
        found = {c["type"]: c for c in conditions(self._job) if c["status"] == "True"}
        if not found.keys() & {"Complete", "Failed"}:
            return None
        self._take_pods(next(self.cluster.pods(self.name)))  # what they did last may not have been heard of
        for follower in self._logs.values():
            follower.join(LOG_SECONDS)
        if "Failed" in found:
            return self._tell_failure(found["Failed"])
        log.info("TrainJob %s is complete", self.name)
        return 0

    def _tell_failure(self, failure: Object) -> int:
        """Raises Refused for a failure that no pod has caused and none can mend."""
        for condition in conditions(self._job):
            log.error(
                "TrainJob %s: %s=%s %s: %s", self.name, condition["type"], condition["status"],
                condition.get("reason", ""), condition.get("message", ""),
            )  # fmt: skip
        for pod, found, last in sorted(self._failed.values(), key=lambda failed: node(failed[0])):
            log.error("--- pod %s, node %d: %s; its last lines:", pod["metadata"]["name"], node(pod), found.words)
            for line in last:
                log.error("%s", line)
        if failure.get("reason") in FINAL_REASONS:
            raise Refused(f"TrainJob {self.name}: {failure.get('message')}. Check the TrainingRuntime and the Trainer.")
        code = exit_code([found for _, found, _ in self._failed.values()])
        log.error("TrainJob %s has failed; this step ends with %d", self.name, code)
        return code


def conditions(job: Object) -> list[Object]:
    return list(job.get("status", {}).get("conditions") or [])


def created(what: Object) -> str:
    return str(what["metadata"]["creationTimestamp"])


def when(event: Object) -> str:
    """The time of an event, to the second: comparable with an object's creation."""
    metadata = event["metadata"]
    times = (event.get("lastTimestamp"), event.get("eventTime"), metadata.get("creationTimestamp"))
    return f"{next((time for time in times if time), '')[:19]}Z"


def ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


def tell(line: str) -> None:
    """A line of the training's own."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
