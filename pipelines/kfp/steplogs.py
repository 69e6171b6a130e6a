"""The logs of a run's steps, in the order of the pipeline: of all attempts, running, finished and failed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipelines.definition.package import STEPS
from pipelines.kfp import pending
from pipelines.kfp.failure import is_driver, is_step, workflow_of
from pipelines.kfp.server import Server
from pipelines.kfp.workflow import pod_name, pods, task_name
from pipelines.preflight.cluster import Cluster, NotAllowed
from runtime.errors import Problem, Refused, WrongParameters
from runtime.wording import did_you_mean

CACHED = "taken from Kubeflow's cache: there was no pod"


@dataclass(frozen=True)
class StepLog:
    """One attempt of a step.  state: as Argo or Kubernetes calls it.  text: None if there is none; why: the reason."""

    step: str
    state: str
    pod: str = ""
    text: str | None = None
    why: str = ""
    started: str = ""
    message: str = ""

    def __str__(self) -> str:
        """With a heading."""
        about = ", ".join(part for part in (f"pod {self.pod}" if self.pod else "", self.message) if part)
        heading = f"== {self.step}: {self.state}" + (f" ({about})" if about else "")
        return f"{heading}\n{self.why if self.text is None else self.text.rstrip()}"


def read(server: Server, run: Any, step: str | None, cluster: Callable[[], Cluster]) -> Iterator[StepLog]:
    """Every attempt of every step that has begun, or of one step.

    Raises WrongParameters if the pipeline has no such step, Refused if it has not begun.
    """
    if step and step not in STEPS:
        raise WrongParameters(f"no step {step!r}{did_you_mean(step, STEPS)}. The steps: {', '.join(STEPS)}")
    attempts = _from_workflow(workflow_of(server, run.run_id)) or _from_pods(run.run_id, cluster) or _from_tasks(run)
    wanted = [one for one in attempts if one.step == step] if step else attempts
    if not wanted:
        raise Refused(f"run {run.display_name} is {run.state}: {f'step {step}' if step else 'no step'} has begun yet.")
    wanted.sort(key=lambda one: (STEPS.index(one.step) if one.step in STEPS else len(STEPS), one.started))
    for attempt in wanted:
        yield _with_text(server, run.run_id, attempt, cluster) if attempt.pod else attempt


def _from_workflow(workflow: dict[str, Any]) -> list[StepLog]:
    found = []
    for name, node, _ in pods(workflow):
        if node["type"] == "Skipped":
            if name in STEPS:
                why = CACHED if task_name(node) == "executor" else "it did not run: no pod was made"
                found.append(StepLog(name, str(node.get("phase")), why=why))
        elif name in STEPS or (is_driver(name) and node.get("phase") in ("Failed", "Error")):
            found.append(
                StepLog(
                    name,
                    str(node.get("phase") or "Pending"),
                    pod_name(workflow, node),
                    started=str(node.get("startedAt") or ""),
                    message=str(node.get("message") or ""),
                )
            )
    return found


def _from_pods(run_id: str, cluster: Callable[[], Cluster]) -> list[StepLog]:
    """From Kubernetes; [] if the pods are gone or cannot be read."""
    try:
        found = cluster().pods(run_id)
    except (NotAllowed, Problem):
        return []
    return [
        StepLog(stage, pod["status"].get("phase", ""), pod["metadata"]["name"], started=_start(pod))
        for pod in found
        if (stage := pod["metadata"].get("labels", {}).get("vgg.stage"))
    ]


def _start(pod: dict[str, Any]) -> str:
    return str(pod["status"].get("startTime") or "")


def _from_tasks(run: Any) -> list[StepLog]:
    """From Kubeflow's list of tasks: it has no pods (2.17)."""
    why = f"the log is not available: neither Kubeflow nor Kubernetes tells its pod; see the page of run {run.run_id}"
    details = (run.run_details.task_details if run.run_details else None) or []
    return [StepLog(task.display_name, task.state, why=why) for task in details if is_step(task.display_name or "")]


def _with_text(server: Server, run_id: str, attempt: StepLog, cluster: Callable[[], Cluster]) -> StepLog:
    attempt = replace(attempt, message=server.access.clean(attempt.message))
    text = server.log_of(run_id, attempt.pod)
    if text is not None:
        return replace(attempt, text=text)
    try:
        text = cluster().pod_log(attempt.pod)
    except (NotAllowed, Problem):  # also: the container has not started
        text = None
    if text:
        return replace(attempt, text=server.access.clean(text))
    return replace(attempt, why=_why_missing(attempt.pod, cluster))


def _why_missing(name: str, cluster: Callable[[], Cluster]) -> str:
    try:
        pod = cluster().pod(name)
    except (NotAllowed, Problem) as problem:
        return (
            "no log: Kubeflow has none of this pod. It has not started, or Kubernetes has already deleted it and there "
            f"is no archive. Which of them is not known: {problem}"
        )
    if pod is None:
        return "no log: Kubernetes has already deleted the pod, and Kubeflow has no archive of its log"
    return f"no log yet: the pod is {pod['status'].get('phase', 'new')}" + (
        f": {reason}" if (reason := pending.reason(pod)) else ""
    )
