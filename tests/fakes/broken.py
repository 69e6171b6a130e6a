"""Change one field of a Kubernetes object, to make it invalid."""

from __future__ import annotations

from typing import Any


def change(document: dict[str, Any], path: str, value: Any) -> None:
    """Set a field ('spec.rules.0.verbs'), or, with None, remove it."""
    parent: Any = document
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in parents:
        parent = parent[key] if isinstance(parent, list) else parent.setdefault(key, {})
    if value is None:
        del parent[last]
    else:
        parent[last] = value
