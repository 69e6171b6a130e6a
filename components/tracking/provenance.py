"""The provenance record of a stage: parameters, inputs, code, image, libraries and machine."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from components.closure import ROOT, fingerprints
from runtime import environment, manifest
from runtime.parameters import read_yaml
from runtime.redaction import redacted_values
from vgg.params import load_all

log = logging.getLogger("vgg.tracking")

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
        "machine": machine(),
    }
    return dict(redacted_values(made))


def machine() -> dict[str, Any]:
    """What the bits of floating-point sums depend on: processor, GPU, threads, and number of ranks.

    GPU, CUDA and threads are None for a stage that has not loaded torch.
    """
    torch = sys.modules.get("torch")
    gpu = torch is not None and torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "cpu": _processor(),
        "threads": torch.get_num_threads() if torch else None,
        "gpu": torch.cuda.get_device_name() if torch and gpu else None,
        "cuda": torch.version.cuda if torch and gpu else None,
        "ranks": environment.WORLD_SIZE.get(),
    }


@functools.cache
def _processor() -> str:
    """The name of the processor; its architecture if the kernel does not tell the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


NOT_CODE = (":!dvc.lock", ":!metrics", ":!params.yaml")  # results, and parameters, which the record has anyway
GIT_SECONDS = 30


class GitFailed(Exception):
    """git does not answer; the message says why, and what to do."""


def git() -> dict[str, Any]:
    """Commit and uncommitted changes of the work tree, or those that the image was built from (VGG_GIT_COMMIT)."""
    if built := environment.GIT_COMMIT.get():
        return {"commit": built.removesuffix("-dirty"), "dirty": built.endswith("-dirty"), "diff_sha256": None}
    return dict(_work_tree())


@functools.cache  # so that the warning comes once
def _work_tree() -> dict[str, Any]:
    """What git does not say is None, and a warning says why: no stage fails because of git."""
    found: dict[str, Any] = {"commit": None, "dirty": None, "diff_sha256": None}
    try:
        found["commit"] = _git("rev-parse", "--verify", "HEAD").decode("ascii", "replace").strip()
        # the user's own diff program or colours would change the digest
        diff = _git("diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD", "--", ".", *NOT_CODE)
        found |= {"dirty": bool(diff), "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None}
    except GitFailed as reason:
        what = "the commit is not recorded" if found["commit"] is None else "uncommitted changes are not recorded"
        log.warning("provenance: %s: %s", what, reason)
    return found


def _git(*arguments: str) -> bytes:
    """What git prints, any bytes.  Raises GitFailed."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, env={**os.environ, "LC_ALL": "C"}, capture_output=True, timeout=GIT_SECONDS
        )
    except FileNotFoundError:
        raise GitFailed("git is not installed") from None
    except OSError as error:
        raise GitFailed(f"git cannot be started: {error}") from None
    except subprocess.TimeoutExpired:
        raise GitFailed(f"git {arguments[0]} took more than {GIT_SECONDS} s in {ROOT}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise GitFailed(_remedy(said) or f"git {arguments[0]}: {(said.splitlines() or ['it failed'])[0][:200]}")
    return done.stdout


def _remedy(said: str) -> str:
    """What to do about an error of git; '' if unknown."""
    if "dubious ownership" in said:
        return f"{ROOT} belongs to another user. To trust it: git config --global --add safe.directory '{ROOT}'"
    if "not a git repository" in said:
        return f"{ROOT} is not in a git repository. To make one: git init && git add -A && git commit -m begin"
    if "Needed a single revision" in said:
        return f"the repository of {ROOT} has no commit yet: git add -A && git commit -m begin"
    return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def lineage(source: str) -> str:
    """Key of a pipeline run, the same for all its stages: a digest of its name, or of all parameters and the code.

    source: the --params argument.  Its layout and comments do not count: dvc exp run -S rewrites the file.
    """
    if named := environment.PIPELINE_RUN.get():
        return manifest.digest_of({"pipeline_run": named})
    if source.lstrip().startswith("{"):
        params = json.loads(source)
    else:
        document, _, _ = read_yaml(Path(source))
        params = {name: section.model_dump(mode="json") for name, section in load_all(document, source).items()}
    return manifest.digest_of({"params": params, "git": git()})


def tags(provenance: dict[str, Any]) -> dict[str, str]:
    """The record as tags of a run; MLflow has a separate tag for the commit, which its UI shows."""
    found = {"vgg.provenance": manifest.canonical_json(provenance).decode()}
    found |= {f"vgg.input.{name}": digest for name, digest in provenance["inputs"].items()}
    if commit := provenance["code"]["git"]["commit"]:
        found["mlflow.source.git.commit"] = commit
    if (dirty := provenance["code"]["git"]["dirty"]) is not None:
        found["vgg.git.dirty"] = str(dirty).lower()
    return found
