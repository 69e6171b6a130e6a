"""A rank under a launcher: it dies with it, gives signs of life, and shows where it hangs.

The launcher (components.launch) names a folder in VGG_RANKS.  A rank puts a file there, <rank>.json, and touches it
again and again; the file says who it is and where its stacks go when SIGUSR1 comes.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vgg.errors import WrongParameters

PR_SET_PDEATHSIG = 1
BEAT_SECONDS = 0.5  # between two touches, at least


def hang_seconds() -> int:
    """After how long without a sign of life a rank is given up (VGG_HANG_SECONDS); longer than data is waited for."""
    chosen = os.environ.get("VGG_HANG_SECONDS", "1200")
    if not chosen.isdigit() or not int(chosen):
        raise WrongParameters(f"VGG_HANG_SECONDS: {chosen!r} is no number of seconds")
    return int(chosen)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def sign_of_life() -> Callable[[], None]:
    """A function for the rank to call as it goes on; does nothing without a launcher that watches."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    if "VGG_RANKS" not in os.environ:
        return lambda: None
    path = Path(os.environ["VGG_RANKS"]) / f"{os.environ.get('RANK', '0')}.json"
    path.write_text(json.dumps({"pid": os.getpid()}))
    last = 0.0

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > BEAT_SECONDS:
            last = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(path)

    return beat


@contextlib.contextmanager
def stacks_beside(directory: Path) -> Iterator[None]:
    """While inside, SIGUSR1 writes the stacks of all threads to <directory>.stacks/rank-<n>.txt.

    Whoever leaves, by whatever exception, ends in order: the launcher need not look after it any more.
    """
    if "VGG_RANKS" not in os.environ:
        yield
        return
    rank = os.environ.get("RANK", "0")
    about = Path(os.environ["VGG_RANKS"]) / f"{rank}.json"
    path = directory.resolve().with_name(directory.resolve().name + ".stacks") / f"rank-{rank}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        about.write_text(json.dumps({"pid": os.getpid(), "stacks": str(path)}))
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            about.unlink(missing_ok=True)
    if not path.stat().st_size:  # nobody asked
        path.unlink()
        with contextlib.suppress(OSError):
            path.parent.rmdir()
