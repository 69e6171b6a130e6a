"""What a figure was measured on, and how: CPU time, one core, competitors taking turns.

python -m benchmarks.machine prints it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tarfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = (
    "torch", "torchvision", "triton", "pillow", "simplejpeg", "nvidia-nvimgcodec-cu13", "webdataset",
    "nvidia-dali-cuda130", "mosaicml-streaming",
)  # fmt: skip


class Ends:
    """When the time that was given is over."""

    def __init__(self, seconds: float) -> None:
        self.began, self.seconds = time.monotonic(), seconds

    def left(self, share: float = 1.0) -> float:
        return self.began + share * self.seconds - time.monotonic()


class Figures(dict[str, Any]):
    """What a benchmark has found so far.

    aloud: print what is new as a line of JSON the moment it is known, so that whoever ends the program has that much.
    The lines together are the figures.
    """

    def __init__(self, aloud: bool) -> None:
        super().__init__()
        self.aloud = aloud

    def know(self, **found: Any) -> None:
        self.update(found)
        if self.aloud:
            print(json.dumps(found), flush=True)


def describe() -> str:
    """CPU, cores, GPU if there is one, and versions in a line."""
    libraries = ", ".join(f"{name} {found}" for name in LIBRARIES if (found := installed(name)))
    hardware = "; ".join(filter(None, (f"{cpu()}, {len(os.sched_getaffinity(0))} cores", gpu())))
    return f"{hardware}; Python {platform.python_version()}, {libraries}"


def cpu() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def gpu() -> str | None:
    """Name, memory and driver of the first GPU."""
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return (
        f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}"
    )


def synchronise(device: torch.device) -> None:
    """Wait for the device's work: host clocks know nothing of it otherwise."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    """Begin the peak of peak_mb anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float:
    """Memory at most, MB: tensors on a GPU, on a CPU what this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


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
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:  # in the tar's order: what is compressed cannot be read backwards
            if member.isreg() and member.name.lower().endswith(("jpg", "jpeg")):
                file = tar.extractfile(member)
                assert file
                found[member.name] = file.read()
    return dict(sorted(found.items()))


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


if __name__ == "__main__":
    Figures(aloud=True).know(machine=describe(), gpu=gpu())
