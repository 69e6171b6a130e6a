"""Why pods of a run wait: for a node that has room, for an image, for a secret."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from pipelines.preflight.cluster import Cluster, NotAllowed
from runtime.errors import Problem

PAUSE_SECONDS = 300.0  # after Kubernetes could not be asked
STARTING = {"ContainerCreating", "PodInitializing"}


class Pending:
    """The pods of a run, steps and nodes of a TrainJob.  cluster: raises Problem without access to Kubernetes."""

    def __init__(self, cluster: Callable[[], Cluster], run_id: str) -> None:
        self._cluster, self._run_id = cluster, run_id
        self._said: set[str] = set()
        self._pause_until = 0.0

    def news(self) -> Iterator[str]:
        """Lines for the log, each once."""
        if time.monotonic() < self._pause_until:
            return
        try:
            found = [f"pod {pod['metadata']['name']} waits: {why}" for pod in self._pods() if (why := reason(pod))]
        except (NotAllowed, Problem) as problem:
            self._pause_until = time.monotonic() + PAUSE_SECONDS
            found = [f"whether pods wait, and for what, is not shown: {problem}"]
        for line in found:
            if line not in self._said:
                self._said.add(line)
                yield line

    def _pods(self) -> list[dict[str, Any]]:
        cluster = self._cluster()
        return [*cluster.pods(self._run_id), *cluster.training_pods(self._run_id)]


def reason(pod: dict[str, Any]) -> str:
    """Why a pod does not start, in Kubernetes' words; '' if it has started, or is about to."""
    status = pod["status"]
    if status.get("phase") != "Pending":
        return ""
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _text(condition)
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting.get("reason") not in (None, *STARTING):
            return _text(waiting)
    return ""


def _text(why: dict[str, Any]) -> str:
    return ": ".join(str(why[key]).strip() for key in ("reason", "message") if why.get(key))
