"""What a run needs around it: disk space, the packages of the lock file, results that DVC knows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from components.doctor.finding import Finding, Patient
from runtime import environment, filesystem
from runtime.errors import Preempted, StorageFailure
from runtime.wording import some

LEAST_BYTES = 10**9  # free on a disk that is written to
STATUS_SECONDS = 20  # for dvc status, which hashes what has changed; with --deep it has no limit
PINNED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*])?==([^\s;\\]+)", re.MULTILINE)


def disk(patient: Patient) -> Iterator[Finding]:
    """Disks with less free space than two more checkpoints of the size of the largest here, and 1 GB."""
    needed = max(LEAST_BYTES, 2 * max(map(_bytes_below, patient.project.glob("models/*/step-*")), default=0))
    seen = set()
    for path in (
        patient.project,
        patient.project / "models",
        patient.project / "data",
        patient.journals,
        environment.cache(),
    ):
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        device = existing.stat().st_dev
        free = None if device in seen else filesystem.free_bytes(existing)
        seen.add(device)
        if free is not None and free < needed:
            yield Finding(
                f"{existing}: {free:,} bytes free on its disk, {needed:,} are needed",
                "free some: dvc gc -w, rm -r models/*.previous, or another disk for VGG_CACHE",
                StorageFailure.exit_code,
            )


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def packages(patient: Patient) -> Iterator[Finding]:
    """Packages of .venv, or of this Python without one, that differ from requirements.lock."""
    lock = patient.project / "requirements.lock"
    if not lock.is_file():
        patient.notes.append("requirements.lock: not here, so the packages were not compared")
        return
    folders = [str(path) for path in (patient.project / ".venv").glob("lib/python*/site-packages")]
    found = distributions(path=folders) if folders else distributions()
    installed = {_normal(one.metadata["Name"]): one.version for one in found if one.metadata["Name"]}
    wrong = [
        f"{name} {installed.get(_normal(name), 'missing')} (lock: {version})"
        for name, version in PINNED.findall(lock.read_text(encoding="utf-8"))
        if installed.get(_normal(name)) != version
    ]
    if wrong:
        where = ".venv" if folders else sys.prefix
        yield Finding(
            f"{where} differs from requirements.lock: {some(wrong)}", "rm -f .venv/bin/.installed && make install"
        )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def dvc(patient: Patient) -> Iterator[Finding]:
    """Stages whose inputs or outputs differ from dvc.lock."""
    if not (patient.project / ".dvc").is_dir() or "dvc" in patient.at_work:
        return
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    limit = None if patient.deep else STATUS_SECONDS
    try:
        done = subprocess.run(
            command, cwd=patient.project, capture_output=True, encoding="utf-8", errors="replace", timeout=limit
        )
    except subprocess.TimeoutExpired:
        patient.notes.append(f"dvc status takes more than {STATUS_SECONDS} s (it hashes new data): --deep waits for it")
        return
    if "lock" in done.stderr and done.returncode:
        yield Finding(f"DVC: {done.stderr.strip().splitlines()[-1]}", "wait for it", Preempted.exit_code)
        return
    try:
        status = json.loads(done.stdout)
    except ValueError:
        said = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        yield Finding(f"dvc status fails: {said}", "see the message")
        return
    if status:
        yield Finding(f"DVC: results are not those of their inputs: {some(_changes(status))}", "make run")


def _changes(status: dict[str, list[dict[str, dict[str, str]] | str]]) -> list[str]:
    """'stage: what has changed' of every stage."""
    found = []
    for stage, reasons in status.items():
        names = []
        for reason in reasons:
            if isinstance(reason, str):
                names.append(reason)
                continue
            for kind, changed in reason.items():
                words = (
                    [f"{name} {how}" for name, how in changed.items()] if isinstance(changed, dict) else [str(changed)]
                )
                names += [f"{word} ({kind.removeprefix('changed ')})" for word in words]
        found.append(f"{stage}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}")
    return found
