"""What a check finds: what is wrong, and its cure.  A check reads; it repairs nothing."""

from __future__ import annotations

import contextlib
import fcntl
from dataclasses import dataclass, field
from pathlib import Path

from components.lineage.places import Locator, outputs
from runtime import environment, manifest
from runtime.errors import Preempted, Refused


@dataclass(frozen=True)
class Finding:
    """exit_code: of the contract.  78 for what a person must cure; 69, 74 and 75 for what may pass or be retried."""

    what: str
    cure: str
    exit_code: int = Refused.exit_code


@dataclass
class Patient:
    """A project and what belongs to it.  deep: hash everything.  at_work: outputs and journals that a process writes.

    notes: what was not judged, and why.
    """

    project: Path
    deep: bool
    at_work: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.locator = Locator(self.project)
        self.outputs = [name for name in outputs(self.project) if not Path(name).suffix]  # folders
        self.journals = environment.JOURNAL.get()

    def shown(self, path: Path) -> str:
        return str(path.relative_to(self.project) if path.is_relative_to(self.project) else path)


def holder(path: Path) -> str | None:
    """The process that holds the lock of a file, in words; None if it is free.

    It is asked with a shared lock, for an instant: what begins to write at that instant would have to run again.
    """
    with contextlib.suppress(OSError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            number = file.read(20).decode(errors="replace")
            return f"process {number}" if number.isdecimal() else "a process"
    return None


def writer(what: str, who: str) -> Finding:
    number = who.removeprefix("process ")
    stop = f", or stop it: kill {number}" if number.isdecimal() else ""
    return Finding(f"{what}: {who} is at work there", f"wait for it{stop}", Preempted.exit_code)


def lock_of(output: Path) -> Path:
    return manifest.sibling(output, ".lock")
