"""The nodes of an Argo workflow, as Kubeflow Pipelines 2.17 makes it: which pods ran a task."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any


def pods(workflow: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Every node that is a pod or was left out instead of one: its task, the node, and the nodes around it."""
    nodes = workflow.get("status", {}).get("nodes", {})
    retries = {
        child: node_id
        for node_id, node in nodes.items()
        if node.get("type") == "Retry"
        for child in node.get("children", [])
    }
    for node_id, node in nodes.items():
        if node.get("type") not in ("Pod", "Skipped"):
            continue
        outer = list(_enclosing(node_id, nodes, retries))
        # the pod that runs the program is called executor; the task is the graph around it
        own = task_name(node)
        graphs = [task_name(other) for other in outer if other.get("type") == "DAG"]
        yield graphs[0] if own == "executor" and graphs else own, node, outer


def _enclosing(node_id: str, nodes: dict[str, Any], retries: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The Retry node or graph around a node, then the one around that, and so on.

    With a retry strategy for all templates, which Kubeflow 2.17 installs, Argo puts a Retry node around every pod and
    every graph.  retries: the Retry node by child.
    """
    seen = {node_id}
    while (node_id := retries.get(node_id) or nodes[node_id].get("boundaryID", "")) in nodes and node_id not in seen:
        seen.add(node_id)
        yield nodes[node_id]


def task_name(node: dict[str, Any]) -> str:
    """Without the number of the attempt: train(1) is train."""
    return re.sub(r"\(\d+\)$", "", str(node["displayName"]))


def pod_name(workflow: dict[str, Any], node: dict[str, Any]) -> str:
    """By Argo's rule: workflow, template, hash."""
    name, annotations = workflow["metadata"]["name"], workflow["metadata"].get("annotations", {})
    if annotations.get("workflows.argoproj.io/pod-name-format") == "v1":
        return str(node["id"])
    return f"{name}-{node['templateName']}-{node['id'].rpartition('-')[2]}"
