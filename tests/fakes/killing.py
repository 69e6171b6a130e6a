"""A program that is killed at the n-th moment at which it changes files, or asks an object store."""

from __future__ import annotations

import subprocess
from pathlib import Path

from conftest import ROOT, environment


def killed(command: list[str], kind: str, at: int, where: Path, **env: str) -> tuple[int, int]:
    """Run a command until moment `at` (0: to its end); returns its exit code and the number of moments.

    kind: "files" or "requests".
    """
    counter = where / "counter"
    counter.unlink(missing_ok=True)
    seam = {"KILL_IN": kind, "KILL_AT": str(at), "KILL_COUNTER": str(counter)}
    path = f"{ROOT}/tests/fakes/killed:{ROOT}"
    child = subprocess.Popen(
        command,
        cwd=where,
        env=environment(**env, **seam) | {"PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return child.wait(timeout=120), counter.stat().st_size
