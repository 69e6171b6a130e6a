"""What all benchmarks share: a description of the machine, time limits, CPU time of competitors in turn.

`python -m benchmarks.machine` prints the description.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # functions import it: a process that benchmarks.shard measures must not hold it in memory

LIBRARIES = (
    "torch", "torchvision", "triton", "pillow", "simplejpeg", "nvidia-nvimgcodec-cu13", "webdataset",
    "nvidia-dali-cuda130", "mosaicml-streaming",
)  # fmt: skip


class TimeLimit:
    """The time that a benchmark may take, from now on."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the limit has passed."""
        return self.start + share * self.seconds - time.monotonic()


class Figures(dict[str, Any]):
    """The figures that a benchmark has measured so far.

    as_json: print new figures at once, as a line of JSON, so that they survive if the program is killed.  All lines
    together are the figures.
    """

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def add(self, **measured: Any) -> None:
        self.update(measured)
        if self.as_json:
            print(json.dumps(measured), flush=True)


def describe() -> str:
    """CPU, cores, GPU (if any) and versions of libraries, in one line."""
    libraries = ", ".join(f"{name} {found}" for name in LIBRARIES if (found := installed(name)))
    hardware = "; ".join(filter(None, (f"{cpu()}, {len(os.sched_getaffinity(0))} cores", gpu())))
    return f"{hardware}; Python {platform.python_version()}, {libraries}"


def cpu() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def gpu() -> str | None:
    """Name, memory and driver of the first GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(
            query, capture_output=True, check=True, timeout=60, encoding="utf-8", errors="backslashreplace"
        ).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return (
        f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}"
    )


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that clocks of the host include its work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Reset the peak that peak_mb reports."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_mb(device: torch.device) -> float:
    """Peak memory, MB: of tensors on a GPU, or this process's resident memory on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read_images(path: Path) -> dict[str, bytes]:
    """All JPEGs of a folder or tar, by name; the class is the name of a file's folder."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        return {str(p.relative_to(path)): p.read_bytes() for p in files}
    images = {}
    with tarfile.open(path) as tar:
        for member in tar:  # in the tar's order: a compressed one cannot be read backwards
            if member.isreg() and member.name.lower().endswith(("jpg", "jpeg")):
                file = tar.extractfile(member)
                assert file
                images[member.name] = file.read()
    return dict(sorted(images.items()))


def rates(competitors: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Images per CPU-second of every competitor: the median of some rounds in which they take turns.

    A competitor processes its images once and returns their number.  CPU time of its threads is included.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    counts: dict[str, int] = {}
    for work in competitors.values():
        work()  # the first call loads libraries and fills caches
    for _ in range(rounds):
        for name, work in competitors.items():
            start = time.process_time()
            counts[name] = work()
            seconds[name].append(time.process_time() - start)
    return {name: counts[name] / statistics.median(taken) for name, taken in seconds.items()}


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns: text in the first, numbers in the others."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


if __name__ == "__main__":
    Figures(as_json=True).add(machine=describe(), gpu=gpu())
