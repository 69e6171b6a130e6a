"""Load of the machine during a stage, in the names of MLflow's system metrics: processors, memory, GPUs.

The samples go through the journal like all events.  MLflow's own monitor asks the server for every sample, and ends for
good after one failure.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("vgg.tracking")

SAMPLE_SECONDS = 60.0
QUERY_SECONDS = 10.0  # limit for nvidia-smi, which hangs with a broken driver
QUERY = "index,utilization.gpu,memory.used,memory.total,power.draw"


class Monitor:
    """A thread that passes on a sample every SAMPLE_SECONDS: its minute since 1970, and values by name.

    The minute is the step of the points, so an attempt that continues a run continues its curves.  Whatever fails
    is left out; nothing waits for the thread, except that after stop() it passes on nothing.
    """

    def __init__(self, receive: Callable[[int, dict[str, float]], None]) -> None:
        self._receive, self._stopped, self._lock = receive, threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="machine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._lock:
            self._stopped.set()

    def _run(self) -> None:
        before = _processor_times()
        while not self._stopped.wait(SAMPLE_SECONDS):
            try:
                now = _processor_times()
                values = {**_processors(before, now), **_memory(), **_gpus()}
                before = now
                with self._lock:
                    if not self._stopped.is_set():
                        self._receive(int(time.time() // 60), values)
            except Exception as error:  # of whatever the system does not tell
                log.debug("tracking: no sample of the machine: %s", error)


def _processor_times() -> tuple[float, float]:
    """(busy, all) time of all processors since the start, in ticks."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = [float(word) for word in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # without idle and iowait
    return 0.0, 0.0


def _processors(before: tuple[float, float], now: tuple[float, float]) -> dict[str, float]:
    busy, total = now[0] - before[0], now[1] - before[1]
    return {"system/cpu_utilization_percentage": 100 * busy / total} if total > 0 else {}


def _memory() -> dict[str, float]:
    """Memory in use, of the machine and of this process, in MB."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        kib = {words[0].rstrip(":"): float(words[1]) for words in lines}
        used = kib["MemTotal"] - kib["MemAvailable"]
        found["system/system_memory_usage_megabytes"] = used * 1024 / 1e6
        found["system/system_memory_usage_percentage"] = 100 * used / kib["MemTotal"]
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        found["system/process_memory_megabytes"] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return found


def _gpus() -> dict[str, float]:
    """Load, memory (MB) and power (W) of every GPU; {} without nvidia-smi, which comes with the driver."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True, encoding="utf-8", errors="replace", timeout=QUERY_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    found: dict[str, float] = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        number, *words = [word.strip() for word in line.split(",")]
        with contextlib.suppress(ValueError):  # [N/A]
            load, used, total, power = (float(word) if word[:1].isdigit() else float("nan") for word in words)
            gpu = f"system/gpu_{int(number)}"
            found[f"{gpu}_utilization_percentage"] = load
            found[f"{gpu}_memory_usage_megabytes"] = used * 1024**2 / 1e6
            found[f"{gpu}_memory_usage_percentage"] = 100 * used / total
            found[f"{gpu}_power_usage_watts"] = power
    return found
