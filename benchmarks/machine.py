"""What a figure was measured on, and how: CPU time, one core, competitors taking turns."""

from __future__ import annotations

import os
import platform
import statistics
import tarfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = (
    "torch", "pillow", "simplejpeg", "nvidia-nvimgcodec-cu13", "webdataset",
    "nvidia-dali-cuda130", "mosaicml-streaming",
)  # fmt: skip


def describe() -> str:
    """CPU, cores and versions in a line."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    libraries = ", ".join(f"{name} {found}" for name in LIBRARIES if (found := installed(name)))
    return (
        f"{names[0] if names else platform.machine()}, {cores} cores; Python {platform.python_version()}, {libraries}"
    )


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read_images(path: Path) -> dict[str, bytes]:
    """All JPEGs of a folder or tar, by name; the class is the folder a file stands in."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        return {str(p.relative_to(path)): p.read_bytes() for p in files}
    with tarfile.open(path) as tar:
        found = {m.name: tar.extractfile(m) for m in tar.getmembers() if m.isreg()}
        return {
            name: file.read() for name, file in sorted(found.items()) if file and name.lower().endswith(("jpg", "jpeg"))
        }


def rates(competitors: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Images per CPU-second of each, the median of some rounds in which all take turns.

    A competitor works through its images once and returns how many there were.  Its helper threads count too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    counts: dict[str, int] = {}
    for work in competitors.values():
        work()  # first calls load libraries and fill caches
    for _ in range(rounds):
        for name, work in competitors.items():
            began = time.process_time()
            counts[name] = work()
            seconds[name].append(time.process_time() - began)
    return {name: counts[name] / statistics.median(taken) for name, taken in seconds.items()}


def table(rows: list[tuple[str, ...]]) -> str:
    """Aligned columns; the first is text, the others numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
