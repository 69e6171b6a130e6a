"""How many cores this process may use: of those that it sees, a container may grant only a share of the time."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """The cores that the system and the container's limit grant together; a part of a core counts as one.

    torch starts a thread for every core that it sees: with a limit of 2 on a machine with 64 they only wait.
    """
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), _quota(cgroups))))


def _quota(cgroups: Path) -> float:
    """Cores granted by cgroups version 2 or 1; infinite without a limit."""
    try:
        if (file := cgroups / "cpu.max").exists():
            quota, period = file.read_text(encoding="ascii").split()
        else:
            files = (cgroups / f"cpu/cpu.cfs_{name}_us" for name in ("quota", "period"))
            quota, period = (file.read_text(encoding="ascii") for file in files)
        granted = float(quota) / float(period)
    except (OSError, ValueError):  # no cgroups here, or "max"
        return math.inf
    return granted if granted > 0 else math.inf  # version 1 writes -1 for no limit
