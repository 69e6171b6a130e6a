"""Cancel a run, wait until its pods have ended, and say what remains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from pipelines.kfp.failure import was_terminated, workflow_of
from pipelines.kfp.find import state
from pipelines.kfp.pending import Pending
from pipelines.kfp.runs import ENDED, Pipelines
from pipelines.kfp.waiting import wait
from pipelines.preflight.cluster import Cluster, NotAllowed
from runtime.errors import Preempted, Problem, Refused

log = logging.getLogger("vgg.submit")

PODS_SECONDS = 120.0  # for its pods after the end of the run: Kubernetes gives each 30 s
GONE = ("Succeeded", "Failed")


def cancel(pipelines: Pipelines, run_id: str, poll_seconds: float, cluster: Callable[[], Cluster]) -> list[str]:
    """Lines about what remains.  Doing it again continues to wait.

    Raises Refused if the run has ended by itself, Preempted if pods still run after PODS_SECONDS.
    """
    before = pipelines.get(run_id)
    if before.state not in ENDED:
        pipelines.cancel(run_id)
        log.info("waiting for the end of run %s", before.display_name)
        ended, canceled = wait(pipelines, run_id, poll_seconds, Pending(cluster, run_id))
    else:
        ended, canceled = before, False
    if not canceled and state(ended) != "CANCELED" and not was_terminated(workflow_of(pipelines.server, run_id)):
        raise Refused(f"run {ended.display_name} has ended by itself: {ended.state}; there is nothing to cancel")
    return _remains(run_id, poll_seconds, cluster)


def _remains(run_id: str, poll_seconds: float, cluster: Callable[[], Cluster]) -> list[str]:
    until = time.monotonic() + PODS_SECONDS
    while True:
        try:
            steps, nodes = cluster().pods(run_id), cluster().training_pods(run_id)
            namespace = cluster().namespace
        except (NotAllowed, Problem) as problem:
            return [f"whether pods remain is not known: {problem}"]
        steps = [pod for pod in steps if pod["status"].get("phase") not in GONE]
        nodes = [pod for pod in nodes if pod["status"].get("phase") not in GONE]
        waiting = [pod for pod in steps if _never_started(pod)]  # its deadline counts only from its start
        if running := [pod for pod in (*steps, *nodes) if pod not in waiting or pod in nodes]:
            if time.monotonic() > until:
                raise Preempted(_still_there(running, bool(nodes), namespace, run_id))
            time.sleep(poll_seconds)
            continue
        names = " ".join(pod["metadata"]["name"] for pod in waiting)
        command = f"to delete: kubectl -n {namespace} delete pod {names}"
        return [f"{_named(waiting)} never started and may wait for a long time; {command}"] if waiting else []


def _never_started(pod: dict[str, Any]) -> bool:
    return pod["status"].get("phase") == "Pending" and not pod["metadata"].get("deletionTimestamp")


def _still_there(pods: list[dict[str, Any]], nodes: bool, namespace: str, run_id: str) -> str:
    message = f"the run has ended, but after {PODS_SECONDS:.0f} s there still are {_named(pods)}. "
    message += "Run the same command again to wait for them"
    if nodes:
        command = f"kubectl -n {namespace} delete trainjob --cascade=background -l vgg.pipeline-run={run_id}"
        message += f", or delete what is left of the TrainJob: {command}"
    return message


def _named(pods: list[dict[str, Any]]) -> str:
    return ", ".join(f"pod {pod['metadata']['name']} ({pod['status'].get('phase')})" for pod in pods)
