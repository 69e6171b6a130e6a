"""The file with all items of a message that names only some: <output>.findings.txt beside the output of a stage."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from runtime import manifest
from runtime.errors import Problem, StorageFailure
from runtime.store import storage
from runtime.wording import SHOWN

_file: Path | None = None  # of this process; None for a program without an output, whose list goes to a new folder


def beside(location: str, metrics: str) -> None:
    """Choose the file: beside a local output, or beside the metrics if the output is in an object store.

    Deletes that of an earlier run.
    """
    global _file
    _file = Path(f"{metrics}.findings.txt")
    if not storage.is_remote(location):
        _file = manifest.sibling(Path(location), ".findings.txt")
    clear()


def clear() -> None:
    """Delete the file, since the stage has succeeded."""
    if _file is not None:
        with contextlib.suppress(OSError):  # it helps people; no stage fails for it
            _file.unlink(missing_ok=True)


def rest(problem: Problem) -> str:
    """Write everything that a problem is about to the file.  A line that names it, or nothing if all was said."""
    if len(problem.everything) <= SHOWN:
        return ""
    text = "".join(f"{item}\n" for item in problem.everything)
    try:
        path = _file or Path(tempfile.mkdtemp(prefix="vgg-")) / "findings.txt"
        manifest.write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))
    except (OSError, StorageFailure) as error:
        return f"\n(The whole list could not be written: {error})"
    return f"\nAll {len(problem.everything):,} are listed in {path}"
