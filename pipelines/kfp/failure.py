"""Why a run failed: the failed tasks with their last log lines and exit codes.

Kubeflow's list of tasks has neither messages nor pod names (2.17).  They are taken from the workflow, which the older
API still returns, or from the pods, if Kubernetes can be accessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.definition.package import NAME
from pipelines.kfp.server import Server
from pipelines.kfp.workflow import pod_name, pods
from pipelines.preflight.cluster import Cluster, NotAllowed
from runtime.errors import Problem

LOG_LINES = 30
DRIVER = r".*-driver"  # pod that Kubeflow runs before a step
ATTEMPT = r".*\(\d+\)"  # of a Retry node
# The server lists steps and other nodes of the graph together; only their display names differ (2.17).
NOT_STEPS = (
    r"executor",  # pod of a step, inside the step's own graph
    DRIVER,
    ATTEMPT,
    r"root",
    r"(exit-handler|condition|for-loop)-.*",
    rf"{NAME}-.*",  # the workflow
    r"run|gate-is-open",  # names of our exit handler and condition (pipelines.definition.imagenet)
    r".*\.onExit",
)
_NOT_A_STEP = re.compile("|".join(NOT_STEPS))
# A pod's exit code is always 1, that of Kubeflow's launcher (2.17).  The program's is in the pod's termination message
# and in its log, as components.step writes it.
EXIT_CODE = re.compile(r"components\.[\w.]+: exit code (\d+)")


class RunFailed(Problem):
    """The run ended FAILED.  exit_code: of its first failed task if known, else 1."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class FailedTask:
    """message: from the orchestrator.  log: the last lines; None if not available."""

    name: str
    pod: str = ""
    message: str = ""
    log: list[str] | None = None

    @property
    def exit_code(self) -> int:
        """Of the program; 1 if unknown."""
        found = EXIT_CODE.findall("\n".join([*(self.log or []), self.message]))
        return int(found[-1]) if found else 1


def is_step(name: str) -> bool:
    """Whether a display name in Kubeflow's list of tasks is a step of the pipeline."""
    return not _NOT_A_STEP.fullmatch(name)


def is_driver(name: str) -> bool:
    return bool(re.fullmatch(DRIVER, name))


def is_attempt(name: str) -> bool:
    return bool(re.fullmatch(ATTEMPT, name))


def workflow_of(server: Server, run_id: str) -> dict[str, Any]:
    """The Argo workflow of a run; {} if the server does not return it."""
    try:
        detail = server.find(server.read, f"/apis/v1beta1/runs/{run_id}", patience=5.0) or {}
        return dict(json.loads(detail["pipeline_runtime"]["workflow_manifest"]))
    except (Problem, KeyError, TypeError, ValueError):
        return {}


def was_terminated(workflow: dict[str, Any]) -> bool:
    """Whether a user stopped it.  Kubeflow 2.17 stops a run by a deadline of 0 s and then calls it FAILED."""
    return bool(workflow) and workflow.get("spec", {}).get("activeDeadlineSeconds") == 0


def explain(server: Server, run: Any, workflow: dict[str, Any], cluster: Callable[[], Cluster]) -> RunFailed:
    """The failed tasks with their last log lines, in order of failure.  A task that succeeded later is not listed."""
    tasks = from_workflow(workflow) or from_pods(run, cluster) or from_details(run)
    for task in tasks:
        text = server.log_of(run.run_id, task.pod) if task.pod else None
        if text is None and task.pod:
            text = _pod_log(cluster, task.pod)
        task.log = None if text is None else server.access.clean(text).rstrip().splitlines()[-LOG_LINES:]
        task.message = server.access.clean(task.message)
    reason = str(workflow.get("status", {}).get("message") or "")
    lines = [f"run {run.display_name} FAILED" + (f": {reason}" if reason else "")]
    for task in tasks:
        lines.append(f"task {task.name} failed" + (f": {task.message}" if task.message else ""))
        lines += [f"  | {line}" for line in task.log] if task.log else [f"  log {_where(task, run.run_id)}"]
    return RunFailed("\n".join(lines), tasks[0].exit_code if tasks else 1)


def from_workflow(workflow: dict[str, Any]) -> list[FailedTask]:
    """From the nodes of the Argo workflow."""
    found: dict[str, tuple[str, FailedTask]] = {}
    for name, node, outer in pods(workflow):
        if node.get("phase") not in ("Failed", "Error"):
            continue
        if any(other.get("phase") == "Succeeded" for other in outer):
            continue  # another attempt succeeded
        started, pod = node.get("startedAt", ""), pod_name(workflow, node)
        if name not in found or found[name][0] < started:  # the last of several attempts
            found[name] = started, FailedTask(name, pod, node.get("message", ""))
    return [task for _, task in sorted(found.values(), key=lambda one: one[0])]


def from_pods(run: Any, cluster: Callable[[], Cluster]) -> list[FailedTask]:
    """From the pods of the run; [] if they are gone or cannot be read."""
    try:
        found = cluster().pods(run.run_id)
    except (NotAllowed, Problem):
        return []
    last: dict[str, dict[str, Any]] = {}  # last attempt of each stage
    for pod in sorted(found, key=lambda one: str(one["status"].get("startTime", ""))):
        stage = pod["metadata"].get("labels", {}).get("vgg.stage", pod["metadata"]["name"])
        last[stage] = pod
    failed = {stage: pod for stage, pod in last.items() if pod["status"].get("phase") == "Failed"}
    return [FailedTask(stage, pod["metadata"]["name"], _reason(pod)) for stage, pod in failed.items()]


def _reason(pod: dict[str, Any]) -> str:
    """Why a pod failed, apart from the launcher's exit code."""
    status = pod["status"]
    main = [
        one.get("state", {}).get("terminated", {})
        for one in status.get("containerStatuses", [])
        if one["name"] == "main"
    ]
    texts = [status.get("reason"), status.get("message")]
    texts += [terminated.get(key) for terminated in main for key in ("reason", "message")]
    return ", ".join(text for text in texts if text and text != "Error")


def from_details(run: Any) -> list[FailedTask]:
    """From Kubeflow's list of tasks: names, and errors if the server gives any.

    Attempts stay FAILED when another one succeeded; the Retry node around them has the task's own state.
    """
    details = (run.run_details.task_details if run.run_details else None) or []
    failed = [task for task in details if task.state == "FAILED" and not is_attempt(task.display_name or "")]
    steps = [task for task in failed if is_step(task.display_name or "")] or failed
    return [
        FailedTask(task.display_name, task.pod_name or "", (task.error and task.error.message) or "") for task in steps
    ]


def _pod_log(cluster: Callable[[], Cluster], pod: str) -> str | None:
    try:
        return cluster().pod_log(pod, LOG_LINES)
    except (NotAllowed, Problem):
        return None


def _where(task: FailedTask, run_id: str) -> str:
    pods = f"pod {task.pod}" if task.pod else f"kubectl get pods -l pipeline/runid={run_id}"
    return f"not available (no access, or the pod is gone); see the run's page, or {pods}"
