"""Set one field of a Kubernetes object wrong."""

from __future__ import annotations

from typing import Any


def change(document: dict[str, Any], path: str, value: Any) -> None:
    """Set a field ('spec.rules.0.verbs'), or, with None, remove it."""
    place: Any = document
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in parents:
        place = place[key] if isinstance(place, list) else place.setdefault(key, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
