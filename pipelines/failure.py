"""Why a run failed: which tasks, what they said last, and with which exit code.

Kubeflow's own list of tasks has neither messages nor names of pods (2.17), so they are taken from the workflow that the
older API still hands out, or from the pods themselves where Kubernetes can be asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.cluster import Cluster, NotAllowed
from pipelines.package import NAME
from pipelines.server import Server
from vgg.errors import Problem

LOG_LINES = 30
# nodes of the graph that stand for no step of ours
_STRUCTURE = re.compile(
    rf"executor|.*-driver|.*\(\d+\)|root|(exit-handler|condition|for-loop|{NAME})-.*|run|gate-is-open|.*\.onExit"
)


class RunFailed(Problem):
    """The run ended FAILED.  exit_code: of its first failed task if that can be told, else 1."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class FailedTask:
    """message: of the orchestrator.  log: the last lines, or None if they cannot be had."""

    name: str
    pod: str = ""
    message: str = ""
    log: list[str] | None = None

    @property
    def exit_code(self) -> int:
        """Of the program, as components.step leaves it in the pod's status and says it last; the pod's own is always 1,
        because Kubeflow's launcher ends so."""
        seen = re.findall(r"components\.[\w.]+: exit code (\d+)", "\n".join([*(self.log or []), self.message]))
        return int(seen[-1]) if seen else 1


def is_step(name: str) -> bool:
    """Whether a task of Kubeflow's list is one of the pipeline's steps, and not one of its attempts."""
    return not _STRUCTURE.fullmatch(name)


def workflow_of(server: Server, run_id: str) -> dict[str, Any]:
    """The Argo workflow of a run; {} where the server does not hand it out."""
    try:
        detail = server.find(server.read, f"/apis/v1beta1/runs/{run_id}", patience=5.0) or {}
        return dict(json.loads(detail["pipeline_runtime"]["workflow_manifest"]))
    except (Problem, KeyError, TypeError, ValueError):
        return {}


def was_terminated(workflow: dict[str, Any]) -> bool:
    """Whether somebody stopped it, which Kubeflow 2.17 calls FAILED: it stops a run by a deadline of 0 s."""
    return bool(workflow) and workflow.get("spec", {}).get("activeDeadlineSeconds") == 0


def explain(server: Server, run: Any, workflow: dict[str, Any], cluster: Callable[[], Cluster]) -> RunFailed:
    """The tasks that failed for good with their last lines, first the one that failed first."""
    tasks = from_workflow(workflow) or from_pods(run, cluster) or from_details(run)
    for task in tasks:
        text = server.log_of(run.run_id, task.pod) if task.pod else None
        if text is None and task.pod:
            text = _pod_log(cluster, task.pod)
        task.log = None if text is None else server.access.clean(text).rstrip().splitlines()[-LOG_LINES:]
        task.message = server.access.clean(task.message)
    said = str(workflow.get("status", {}).get("message") or "")
    lines = [f"run {run.display_name} FAILED" + (f": {said}" if said else "")]
    for task in tasks:
        lines.append(f"task {task.name} failed" + (f": {task.message}" if task.message else ""))
        lines += [f"  | {line}" for line in task.log] if task.log else [f"  its log: {_where(task, run.run_id)}"]
    return RunFailed("\n".join(lines), tasks[0].exit_code if tasks else 1)


def from_workflow(workflow: dict[str, Any]) -> list[FailedTask]:
    """By the nodes of the Argo workflow."""
    nodes = workflow.get("status", {}).get("nodes", {})
    repeats = {
        child: mark for mark, node in nodes.items() if node.get("type") == "Retry" for child in node.get("children", [])
    }
    found: dict[str, tuple[str, FailedTask]] = {}
    for mark, node in nodes.items():
        if node.get("type") != "Pod" or node.get("phase") not in ("Failed", "Error"):
            continue
        outer = list(_around(mark, nodes, repeats))
        if any(other.get("phase") == "Succeeded" for other in outer):
            continue  # another attempt has done it
        # the pod that runs the program is called executor; the task is the graph around it
        own = _task_name(node)
        graphs = [_task_name(other) for other in outer if other.get("type") == "DAG"]
        name = graphs[0] if own == "executor" and graphs else own
        began, pod = node.get("startedAt", ""), _pod_name(workflow, node)
        if name not in found or found[name][0] < began:  # of several attempts the last
            found[name] = began, FailedTask(name, pod, node.get("message", ""))
    return [task for _, task in sorted(found.values(), key=lambda one: one[0])]


def _around(mark: str, nodes: dict[str, Any], repeats: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The node that repeats a node, or the graph in which it stands, then what repeats or holds that, and so on.

    With a retry strategy for all templates, which Kubeflow 2.17 installs, Argo puts a Retry node around every pod and
    every graph.  repeats: by child, the Retry node.
    """
    seen = {mark}
    while (mark := repeats.get(mark) or nodes[mark].get("boundaryID", "")) in nodes and mark not in seen:
        seen.add(mark)
        yield nodes[mark]


def _task_name(node: dict[str, Any]) -> str:
    """Without the number of the attempt: train(1) is train."""
    return re.sub(r"\(\d+\)$", "", str(node["displayName"]))


def _pod_name(workflow: dict[str, Any], node: dict[str, Any]) -> str:
    """Argo's rule: the name of the template stands between workflow and hash."""
    name, annotations = workflow["metadata"]["name"], workflow["metadata"].get("annotations", {})
    if annotations.get("workflows.argoproj.io/pod-name-format") == "v1":
        return str(node["id"])
    return f"{name}-{node['templateName']}-{node['id'].rpartition('-')[2]}"


def from_pods(run: Any, cluster: Callable[[], Cluster]) -> list[FailedTask]:
    """By the pods of the run; [] where they are gone or may not be seen."""
    try:
        pods = cluster().pods(run.run_id)
    except (NotAllowed, Problem):
        return []
    last: dict[str, dict[str, Any]] = {}  # of several attempts
    for pod in sorted(pods, key=lambda one: str(one["status"].get("startTime", ""))):
        stage = pod["metadata"].get("labels", {}).get("vgg.stage", pod["metadata"]["name"])
        last[stage] = pod
    failed = {stage: pod for stage, pod in last.items() if pod["status"].get("phase") == "Failed"}
    return [FailedTask(stage, pod["metadata"]["name"], _reason(pod)) for stage, pod in failed.items()]


def _reason(pod: dict[str, Any]) -> str:
    """Why a pod failed, as far as it is more than the exit code of the launcher."""
    status = pod["status"]
    main = [
        one.get("state", {}).get("terminated", {})
        for one in status.get("containerStatuses", [])
        if one["name"] == "main"
    ]
    said = [status.get("reason"), status.get("message")]
    said += [ended.get(key) for ended in main for key in ("reason", "message")]
    return ", ".join(text for text in said if text and text != "Error")


def from_details(run: Any) -> list[FailedTask]:
    """By the names alone; with the error where the server gives one."""
    details = (run.run_details.task_details if run.run_details else None) or []
    failed = [task for task in details if task.state == "FAILED"]
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
    return f"not to be had from here (no access, or the pod is gone); look at the run's page, or at {pods}"
