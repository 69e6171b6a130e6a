"""Which nodes could run a training pod, by Kubernetes' rules; pods already on the nodes are not counted."""

from __future__ import annotations

from typing import Any

Toleration = dict[str, Any]


def fitting(
    nodes: list[dict[str, Any]], gpus: int, kind: str, selector: dict[str, str], tolerations: list[Toleration]
) -> tuple[list[str], list[str]]:
    """Names of the nodes that fit, and for other nodes with such GPUs the reason why not."""
    fit, others = [], []
    for node in nodes:
        name, have = node["metadata"]["name"], int(node["status"].get("allocatable", {}).get(kind, 0))
        reason = _unfit(node, selector, tolerations) or (f"has {have}" if have < gpus else "")
        if not reason:
            fit.append(name)
        elif have:
            others.append(f"{name} {reason}")
    return fit, others


def too_large(
    nodes: list[dict[str, Any]], cpu: str, memory: str, selector: dict[str, str], tolerations: list[Toleration]
) -> str:
    """Why no node is large enough for a pod that requests this, even when it is empty; '' if one is.

    Also '' if no node is open to the pod at all, which is another fault.
    """
    from kubernetes.utils.quantity import parse_quantity

    rooms = []
    for node in nodes:
        if not _unfit(node, selector, tolerations):
            have = node["status"].get("allocatable", {})
            rooms.append((parse_quantity(have.get("cpu", "0")), parse_quantity(have.get("memory", "0")), node))
    needed = parse_quantity(cpu), parse_quantity(memory)
    if not rooms or any(cpus >= needed[0] and room >= needed[1] for cpus, room, _ in rooms):
        return ""
    cpus, room, node = max(rooms, key=lambda one: (one[1], one[0]))
    return f"the largest, {node['metadata']['name']}, offers {float(cpus):g} CPUs and {room / 2**30:.1f} GiB"


def _unfit(node: dict[str, Any], selector: dict[str, str], tolerations: list[Toleration]) -> str:
    """Why Kubernetes schedules no such pod there; '' if it does."""
    if node["spec"].get("unschedulable"):
        return "is cordoned"
    labels = node["metadata"].get("labels", {})
    if wrong := [f"{key}={value}" for key, value in selector.items() if labels.get(key) != str(value)]:
        return f"has no label {', '.join(wrong)}"
    for taint in node["spec"].get("taints", []):
        if taint["effect"] != "PreferNoSchedule" and not any(_tolerates(one, taint) for one in tolerations):
            value = f"={taint['value']}" if taint.get("value") else ""
            return f"has the taint {taint['key']}{value}:{taint['effect']}, which is not tolerated"
    return ""


def _tolerates(toleration: Toleration, taint: dict[str, Any]) -> bool:
    """As Kubernetes does: without an effect it matches all effects; without a key, and with Exists, all keys."""
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if not toleration.get("key"):
        return toleration.get("operator") == "Exists"
    if toleration["key"] != taint["key"]:
        return False
    return toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", "")
