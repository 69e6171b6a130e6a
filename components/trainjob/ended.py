"""How the pods of a training ended: as text, and as the exit code that decides whether the step is run again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from components.trainjob.body import NODE
from runtime.errors import BadData, Preempted, Refused, StorageFailure, Unreachable, WrongParameters

Pod = dict[str, Any]  # parsed JSON

ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"
NUMBER = "batch.kubernetes.io/job-completion-index"
KILLED = {128 + 9, 128 + 15}  # from outside: out of memory, evicted, stopped
CRASHED = 1
FINAL = (WrongParameters.exit_code, BadData.exit_code, Refused.exit_code)
TEMPORARY = (StorageFailure.exit_code, Unreachable.exit_code, Preempted.exit_code)
# the first of these that any pod ended with is the cause; a pod that loses the other ranks ends with 75
ORDER = (*FINAL, CRASHED, *TEMPORARY)


@dataclass(frozen=True)
class End:
    """The end of one pod.  code: one of runtime.errors, or 1 for a crash.  text: for the log."""

    code: int
    text: str


def node(pod: Pod) -> int:
    """The number of a pod's node; -1 if unknown."""
    metadata = pod["metadata"]
    return int({**metadata.get("annotations", {}), **metadata.get("labels", {})}.get(NUMBER, -1))


def attempt(pod: Pod) -> int:
    """How many times all pods had been restarted when this one was created."""
    return int(pod["metadata"].get("labels", {}).get(ATTEMPT, 0))


def container(pod: Pod) -> dict[str, Any]:
    """The status of the training's container; {} before it exists."""
    statuses = pod.get("status", {}).get("containerStatuses") or []
    return next((status for status in statuses if status["name"] == NODE), {})


def has_started(pod: Pod) -> bool:
    """Whether the container has started, and so has a log."""
    state = container(pod).get("state", {})
    return "running" in state or "terminated" in state


def has_ended(pod: Pod) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def is_pending(pod: Pod) -> bool:
    return not has_started(pod) and bool(pod.get("status", {}).get("phase", "Pending") == "Pending")


def disruption(pod: Pod) -> dict[str, Any] | None:
    """The condition of a pod that Kubernetes ends for another reason than its program: drained, preempted, evicted."""
    known = pod.get("status", {}).get("conditions") or []
    return next((one for one in known if one["type"] == "DisruptionTarget" and one["status"] == "True"), None)


def end(pod: Pod) -> End | None:
    """How a pod failed; None if it has not."""
    status = pod.get("status", {})
    terminated = container(pod).get("state", {}).get("terminated")
    if status.get("phase") != "Failed" and not (terminated and terminated["exitCode"]):
        return None
    disrupted = disruption(pod)
    texts = [_text(terminated)] if terminated else ["ended without an exit code"]
    if status.get("reason"):
        texts.append(f"{status['reason']}: {status.get('message', '')}".rstrip(": "))
    if disrupted:
        texts.append(f"disrupted ({disrupted.get('reason', '')}): {disrupted.get('message', '')}".rstrip(": "))
    if before := container(pod).get("lastState", {}).get("terminated"):
        texts.append(f"before that, {_text(before)}")
    code = terminated["exitCode"] if terminated else Preempted.exit_code
    if code not in (*FINAL, *TEMPORARY):
        from_outside = code in KILLED or disrupted or status.get("reason") == "Evicted"
        code = Preempted.exit_code if from_outside else CRASHED
    return End(code, "; ".join(texts))


def _text(terminated: dict[str, Any]) -> str:
    """For example 'exit code 137 (OOMKilled)'."""
    reason, message = terminated.get("reason", ""), terminated.get("message", "")
    text = f"exit code {terminated['exitCode']}"
    if reason not in ("", "Error"):
        text += f" ({reason})"
    return f"{text}: {message.strip()}" if message else text


def exit_code(ends: list[End]) -> int:
    """The exit code of the step.  If no pod is known, they disappeared with their nodes: run again."""
    codes = {end.code for end in ends}
    return next((code for code in ORDER if code in codes), Preempted.exit_code)
