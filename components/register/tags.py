"""Tags of a model version: facts for people, and records for programs that MLflow's pages do not show.

Records are JSON.  MLflow's pages leave out tags whose name begins with "mlflow.", so the records have such names.
"""

from __future__ import annotations

import json

HIDDEN = "mlflow.vgg."


def stored(tags: dict[str, str]) -> dict[str, str]:
    """The tags of a version, with records under names that MLflow's pages do not show."""
    return {f"{HIDDEN}{name}" if _is_record(text) else name: text for name, text in tags.items()}


def read(tags: dict[str, str]) -> dict[str, str]:
    """The inverse of stored; versions whose records are shown are read as well."""
    return {**tags, **{name.removeprefix(HIDDEN): text for name, text in tags.items() if name.startswith(HIDDEN)}}


def _is_record(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False
