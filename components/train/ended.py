"""How the pods of a training ended: in words, and as the one exit code that says whether to try again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from components.train.trainjob import NODE
from vgg.errors import BadData, Preempted, Refused, StorageFailure, Unreachable, WrongParameters

Pod = dict[str, Any]  # as JSON has it

ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"
NUMBER = "batch.kubernetes.io/job-completion-index"
KILLED = {128 + 9, 128 + 15}  # from outside: out of memory, evicted, told to stop
CRASHED = 1
FINAL = (WrongParameters.exit_code, BadData.exit_code, Refused.exit_code)
PASSING = (StorageFailure.exit_code, Unreachable.exit_code, Preempted.exit_code)
# the first of these that some pod gave is the reason; the others followed from it: who loses a rank ends with 75
ORDER = (*FINAL, CRASHED, *PASSING)


@dataclass(frozen=True)
class End:
    """Of one pod.  code: of the contract, or 1 for a crash."""

    code: int
    words: str


def node(pod: Pod) -> int:
    """Which of the nodes a pod is."""
    metadata = pod["metadata"]
    return int({**metadata.get("annotations", {}), **metadata.get("labels", {})}.get(NUMBER, -1))


def attempt(pod: Pod) -> int:
    """Of how many starts of all pods this one is."""
    return int(pod["metadata"].get("labels", {}).get(ATTEMPT, 0))


def container(pod: Pod) -> dict[str, Any]:
    """What is known of the training's container; {} before there is one."""
    statuses = pod.get("status", {}).get("containerStatuses") or []
    return next((status for status in statuses if status["name"] == NODE), {})


def has_begun(pod: Pod) -> bool:
    """Whether there is a log to read."""
    state = container(pod).get("state", {})
    return "running" in state or "terminated" in state


def has_ended(pod: Pod) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def is_pending(pod: Pod) -> bool:
    return not has_begun(pod) and bool(pod.get("status", {}).get("phase", "Pending") == "Pending")


def end(pod: Pod) -> End | None:
    """How a pod failed; None for one that has not."""
    status = pod.get("status", {})
    terminated = container(pod).get("state", {}).get("terminated")
    if status.get("phase") != "Failed" and not (terminated and terminated["exitCode"]):
        return None
    disrupted = next(
        (c for c in status.get("conditions") or [] if c["type"] == "DisruptionTarget" and c["status"] == "True"), None
    )
    words = [_words(terminated)] if terminated else ["ended without its program having said anything"]
    if status.get("reason"):
        words.append(f"{status['reason']}: {status.get('message', '')}".rstrip(": "))
    if disrupted:
        words.append(f"disrupted ({disrupted.get('reason', '')}): {disrupted.get('message', '')}".rstrip(": "))
    if before := container(pod).get("lastState", {}).get("terminated"):
        words.append(f"before that, {_words(before)}")
    code = terminated["exitCode"] if terminated else Preempted.exit_code
    if code not in (*FINAL, *PASSING):
        from_outside = code in KILLED or disrupted or status.get("reason") == "Evicted"
        code = Preempted.exit_code if from_outside else CRASHED
    return End(code, "; ".join(words))


def _words(terminated: dict[str, Any]) -> str:
    """exit code 137 (OOMKilled)"""
    reason, message = terminated.get("reason", ""), terminated.get("message", "")
    said = f"exit code {terminated['exitCode']}"
    if reason not in ("", "Error"):
        said += f" ({reason})"
    return f"{said}: {message.strip()}" if message else said


def exit_code(ends: list[End]) -> int:
    """Of the whole step.  Pods of which nothing is known went away with their nodes: run again."""
    codes = {end.code for end in ends}
    return next((code for code in ORDER if code in codes), Preempted.exit_code)
