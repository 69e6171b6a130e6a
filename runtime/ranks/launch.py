"""One process a GPU, watched: python -m components.launch [--nodes N | --max-restarts N] PROCESSES MODULE ARGUMENTS…

With --nodes N it runs on N machines at once, each with so many processes: in the pods of a TrainJob.

torchrun starts the ranks.  What it does not do is done here: a rank that hangs (VGG_HANG_SECONDS without a sign of
life, 1200 by default) has its stacks and those of all others written down, then all are ended; the exit code is the one
of the contract that the program gave, because an orchestrator retries by it; and after a crash or a hang (never after
a refusal) all start again, at most N times, and go on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from runtime import environment, stopping
from runtime.errors import Preempted
from runtime.ranks.nodes import Nodes, met

log = logging.getLogger("vgg.launch")

GRACE_SECONDS = 20  # for ranks to end by themselves once one has ended: they may be saving
START_PATIENCE = 5  # times longer until the first step: libraries load, shards are verified, the network is compiled
LOOK_SECONDS = 0.5  # between two looks at the ranks
DUMP_SECONDS = 3  # for ranks to write down their stacks


def run_once(processes: int, module: str, arguments: list[str], nodes: Nodes | None) -> tuple[int, bool]:
    """Start the ranks, watch them, wait for them.  Returns the exit code and whether it was told to stop."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    with (
        met(nodes, START_PATIENCE * environment.HANG_SECONDS.get()) if nodes else contextlib.nullcontext(),
        tempfile.TemporaryDirectory(prefix="vgg-ranks-") as folder,
        Watchdog(Path(folder)) as watchdog,
    ):
        os.environ |= {environment.RANKS_FOLDER.name: folder, environment.LAUNCHER.name: str(os.getpid())}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup; torchrun would listen all the same
            os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGQUIT"
        where = nodes.flags() if nodes else ["--standalone"]
        try:
            torchrun([*where, f"--nproc-per-node={processes}", "-m", module, *arguments])
        except ChildFailedError as failed:
            if watchdog.found_hang:
                return Preempted.exit_code, False
            _, first = failed.get_first_failure()
            if nodes and first.exitcode == -signal.SIGABRT:
                # so may end who has lost a rank elsewhere: nccl's watchdog aborts it, gloo's threads are not joined
                return Preempted.exit_code, False
            # the launcher ends the others with SIGTERM, which they answer with 75: the first is the one that counts
            return first.exitcode if first.exitcode > 0 else 128 - first.exitcode, False
        except SignalException as stopped:
            asked = stopped.sigval in stopping.STOP_SIGNALS
            return Preempted.exit_code if asked else 128 + stopped.sigval, True
    return 0, False


@dataclass
class Rank:
    """What is known of a rank by its file (runtime.ranks.watched)."""

    number: str
    pid: int
    trains: bool
    stacks: Path | None
    touched: int  # the file's mtime, which only has to change
    heard: float  # when it last did, by our own clock


class Watchdog:
    """A thread that looks after the ranks' signs of life.

    A rank that gives none for VGG_HANG_SECONDS: stacks are saved, all ranks are killed.  A rank that was killed: the
    others have GRACE_SECONDS to notice.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._ranks, self._patience = folder, dict[str, Rank](), environment.HANG_SECONDS.get()
        self._crashed_at: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.found_hang = False

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self._look()
            now = time.monotonic()
            living = [rank for rank in self._ranks.values() if alive(rank.pid)]
            silent = [rank for rank in living if now - rank.heard > self._patience_with(rank)]
            if silent:
                self.found_hang = True
                names = ", ".join(f"{rank.number} (process {rank.pid})" for rank in silent)
                patience = self._patience_with(silent[0])
                log.error("no sign of life for %d s from rank %s; all ranks are ended", patience, names)
                self._save_stacks()
                self._kill()
            elif len(living) < len(self._ranks):
                self._crashed_at = self._crashed_at or now
                if now - self._crashed_at > GRACE_SECONDS:
                    self._kill()

    def _patience_with(self, rank: Rank) -> float:
        return self._patience if rank.trains else START_PATIENCE * self._patience

    def _look(self) -> None:
        """Read the files; a rank that ended in order has taken its own away."""
        found = {}
        for path in self._folder.glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                touched, about = path.stat().st_mtime_ns, json.loads(path.read_text())
                stacks = Path(about["stacks"]) if about["stacks"] else None
                known = self._ranks.get(path.stem)
                heard = known.heard if known and known.touched == touched else time.monotonic()
                found[path.stem] = Rank(path.stem, about["pid"], about["trains"], stacks, touched, heard)
        self._ranks = found

    def _save_stacks(self) -> None:
        """Where every thread of every rank is.  A stopped process writes it as soon as it is continued."""
        for rank in self._ranks.values():
            if rank.stacks:
                send(rank.pid, signal.SIGUSR1)
                send(rank.pid, signal.SIGCONT)
        time.sleep(DUMP_SECONDS)
        for rank in self._ranks.values():
            if rank.stacks and rank.stacks.exists() and not rank.stacks.stat().st_size:
                rank.stacks.write_text(f"no answer; the kernel says: {kernel_wait(rank.pid)}\n")
            if rank.stacks and rank.stacks.exists():
                log.error("rank %s hung; stacks in %s:\n%s", rank.number, rank.stacks, rank.stacks.read_text()[-4000:])

    def _kill(self) -> None:
        for rank in self._ranks.values():
            send(rank.pid, signal.SIGKILL)
            (self._folder / f"{rank.number}.json").unlink(missing_ok=True)
        self._ranks, self._crashed_at = {}, None


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def state(pid: int) -> str:
    """A process's state, a letter of proc(5).  Raises OSError when there is none."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]  # a name may hold spaces and ')'


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return state(pid) not in "ZX"
    except OSError:
        return False


def kernel_wait(pid: int) -> str:
    """State and place in the kernel where a process waits, as far as the kernel tells."""
    try:
        return f"state {state(pid)}, in {Path(f'/proc/{pid}/wchan').read_text() or 'user space'}"
    except OSError as error:
        return str(error)
