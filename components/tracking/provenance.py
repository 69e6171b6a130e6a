"""The provenance record of a stage: parameters, inputs, code, image and libraries."""

from __future__ import annotations

import hashlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from components.closure import ROOT, fingerprints
from runtime import environment, manifest
from runtime.redaction import redacted_values

LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "mlflow")


def record(stage: str, params: dict[str, Any], inputs: dict[str, str]) -> dict[str, Any]:
    """inputs: digests of the stage's inputs, by name.  Passwords in addresses are left out."""
    made = {
        "stage": stage,
        "params": params,
        "inputs": inputs,
        "code": {"git": git(), "closure_sha256": manifest.digest_of(fingerprints(stage))},
        "image": environment.IMAGE.get() or None,
        "pipeline_run": environment.PIPELINE_RUN.get() or None,
        "libraries": {name: _version(name) for name in LIBRARIES},
    }
    return dict(redacted_values(made))


def git() -> dict[str, Any]:
    """Commit and uncommitted changes of the work tree, or those that the image was built from (VGG_GIT_COMMIT)."""
    if built := environment.GIT_COMMIT.get():
        return {"commit": built.removesuffix("-dirty"), "dirty": built.endswith("-dirty"), "diff_sha256": None}
    commit, diff = _git("rev-parse", "HEAD"), _git("diff", "HEAD", "--", ".", ":!dvc.lock", ":!metrics")
    if commit is None:
        return {"commit": None, "dirty": None, "diff_sha256": None}
    return {
        "commit": commit.strip(),
        "dirty": bool(diff),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, timeout=30, encoding="utf-8", errors="backslashreplace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def lineage(source: str) -> str:
    """Key of a pipeline run, the same for all its stages: a digest of its name, or of all parameters and the code.

    source: the --params argument.
    """
    if named := environment.PIPELINE_RUN.get():
        return manifest.digest_of({"pipeline_run": named})
    params = source if source.lstrip().startswith("{") else Path(source).read_text(encoding="utf-8")
    return manifest.digest_of({"params": params, "git": git()})


def tags(provenance: dict[str, Any]) -> dict[str, str]:
    """The record as tags of a run; MLflow has a separate tag for the commit, which its UI shows."""
    found = {"vgg.provenance": manifest.canonical_json(provenance).decode()}
    found |= {f"vgg.input.{name}": digest for name, digest in provenance["inputs"].items()}
    if commit := provenance["code"]["git"]["commit"]:
        found["mlflow.source.git.commit"] = commit
        found["vgg.git.dirty"] = str(provenance["code"]["git"]["dirty"]).lower()
    return found
