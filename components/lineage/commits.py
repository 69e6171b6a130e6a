"""Which commit holds the code of a training: the recorded one, or another with the same science."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from components.closure import fingerprint_of
from runtime.errors import Refused
from runtime.wording import some

GIT_SECONDS = 120


def choose(repository: Path, git: dict[str, Any], code: dict[str, str], wanted: str = "") -> tuple[str, str]:
    """The commit to train with, and a remark, '' if it is the recorded one without changes.

    git: of the provenance record.  code: recorded fingerprints of the science, by file.  wanted: a commit that the user
    names.  A commit counts if its files have the recorded fingerprints; without them, only a recorded clean one does.
    Raises Refused, naming what no commit holds.
    """
    recorded, dirty = git.get("commit") or "", git.get("dirty")
    if wanted:
        return _named(repository, wanted, code)
    here = bool(recorded) and _exists(repository, recorded)
    if here and (dirty is False if not code else not _differences(repository, recorded, code)):
        return recorded, "" if dirty is False else "it had uncommitted changes, none of them in the code of training"
    for commit in _lines(repository, "log", "--all", "--format=%H", "--", *code) if code else ():
        if not _differences(repository, commit, code):
            return commit, f"{_why(recorded, here)}; {commit[:12]} has the same code of training, file by file"
    if not here:
        raise Refused(
            f"{_why(recorded, here)}, nor is another commit with the same code of training. Fetch it from the "
            "repository that it was trained in (git fetch), then run again."
        )
    changed = _differences(repository, recorded, code)
    raise Refused(
        f"the code of training was never committed: {some(changed or ['unknown files'])} had changes beside commit "
        f"{recorded[:12]} (sha256 of the diff: {git.get('diff_sha256')}). If you still have them, commit them and give "
        "--commit; otherwise these weights cannot be trained again.",
        changed,
    )


def _why(recorded: str, here: bool) -> str:
    if not recorded:
        return "the commit was not recorded"
    return f"commit {recorded[:12]} {'had changes in the code of training' if here else 'is not in this repository'}"


def _named(repository: Path, wanted: str, code: dict[str, str]) -> tuple[str, str]:
    if not _exists(repository, wanted):
        raise Refused(f"--commit {wanted}: no such commit in {repository}.")
    [commit] = _lines(repository, "rev-parse", f"{wanted}^{{commit}}")
    if changed := _differences(repository, commit, code):
        raise Refused(f"--commit {wanted}: other code of training: {some(changed)} differ from what was used.", changed)
    return commit, "named with --commit"


def _differences(repository: Path, commit: str, code: dict[str, str]) -> list[str]:
    """Files of the science that a commit has not, or with another fingerprint."""
    blobs = {}
    for line in _lines(repository, "ls-tree", "-r", commit, "--", *code) if code else ():
        description, _, name = line.partition("\t")
        blobs[name] = description.split()[2]
    return [name for name in code if name not in blobs or _fingerprint(repository, blobs[name]) != code[name]]


@cache
def _fingerprint(repository: Path, blob: str) -> str:
    try:
        return fingerprint_of(_git(repository, "cat-file", "blob", blob))
    except SyntaxError:
        return ""


def _exists(repository: Path, commit: str) -> bool:
    try:
        _git(repository, "cat-file", "-e", f"{commit}^{{commit}}")
        return True
    except Refused:
        return False


def show(repository: Path, commit: str, path: str) -> str:
    """A file of a commit.  Raises Refused if it has none."""
    return _git(repository, "show", f"{commit}:{path}").decode(errors="replace")


def _lines(repository: Path, *arguments: str) -> list[str]:
    return _git(repository, "-c", "core.quotePath=false", *arguments).decode(errors="replace").splitlines()


def _git(repository: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"git {arguments[0]} in {repository}: {error}. Run this in the git repository.") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise Refused(f"git {arguments[0]} in {repository}: {(said or ['it failed'])[0]}. Run this in the repository.")
    return done.stdout
