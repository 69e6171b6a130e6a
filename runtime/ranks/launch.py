"""Starts one rank per GPU with torchrun and monitors the ranks.  components.launch is the program.

In addition to torchrun: if a rank sends no heartbeat for VGG_HANG_SECONDS, the stacks of all ranks are saved and all
ranks are killed; and the exit code of the program is passed on, because orchestrators decide by it whether to retry.
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
from runtime.ranks.nodes import Nodes, rendezvous
from runtime.wording import some

log = logging.getLogger("vgg.launch")

GRACE_SECONDS = 20  # for ranks to end by themselves after one has ended: they may be saving
START_PATIENCE = 5  # factor before the first step: libraries load, shards are verified, the network is compiled
POLL_SECONDS = 0.5  # interval at which the ranks are checked
DUMP_SECONDS = 3  # for ranks to write their stacks


def run_once(processes: int, module: str, arguments: list[str], nodes: Nodes | None) -> tuple[int, bool]:
    """Start the ranks, monitor them and wait for them.  Returns the exit code and whether a stop was requested."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    with (
        rendezvous(nodes, START_PATIENCE * environment.HANG_SECONDS.get()) if nodes else contextlib.nullcontext(),
        tempfile.TemporaryDirectory(prefix="vgg-ranks-") as folder,
        Watchdog(Path(folder)) as watchdog,
    ):
        os.environ |= {environment.RANKS_FOLDER.name: folder, environment.LAUNCHER.name: str(os.getpid())}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup; by default torchrun handles SIGHUP anyway
            os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGQUIT"
        # torchrun would pass SIGUSR1 on, at which ranks write their stacks
        signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        flags = nodes.flags() if nodes else ["--standalone"]
        try:
            torchrun([*flags, f"--nproc-per-node={processes}", "-m", module, *arguments])
        except ChildFailedError as failed:
            if watchdog.found_hang:
                return Preempted.exit_code, False
            _, first = failed.get_first_failure()
            if nodes and first.exitcode == -signal.SIGABRT:
                # possible after losing a rank on another node: nccl's watchdog aborts, gloo's threads are not joined
                return Preempted.exit_code, False
            # torchrun ends the others with SIGTERM, and they exit with 75; the first failure is the cause
            return first.exitcode if first.exitcode > 0 else 128 - first.exitcode, False
        except SignalException as stopped:
            requested = stopped.sigval in stopping.STOP_SIGNALS
            return Preempted.exit_code if requested else 128 + stopped.sigval, True
    return 0, False


@dataclass
class Rank:
    """The status of a rank, from its file (runtime.ranks.watched)."""

    number: str
    pid: int
    trains: bool
    stacks: Path | None
    mtime: int  # of the file, ns; only used to detect a change
    last_heartbeat: float  # when mtime last changed, by time.monotonic()


class Watchdog:
    """A thread that checks the heartbeats of the ranks.

    After a rank sent none for VGG_HANG_SECONDS, stacks are saved and all ranks are killed.  After a rank was killed,
    the others have GRACE_SECONDS to end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._ranks, self._patience = folder, dict[str, Rank](), environment.HANG_SECONDS.get()
        self._crashed_at: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.found_hang = False

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self._read_status()
            now = time.monotonic()
            living = [rank for rank in self._ranks.values() if alive(rank.pid)]
            silent = [rank for rank in living if now - rank.last_heartbeat > self._patience_with(rank)]
            if silent:
                self.found_hang = True
                names = some([f"{rank.number} (process {rank.pid})" for rank in silent])
                patience = self._patience_with(silent[0])
                log.error("no heartbeat for %d s from rank %s; killing all ranks", patience, names)
                self._save_stacks()
                self._kill()
            elif len(living) < len(self._ranks):
                self._crashed_at = self._crashed_at or now
                if now - self._crashed_at > GRACE_SECONDS:
                    self._kill()

    def _patience_with(self, rank: Rank) -> float:
        return self._patience if rank.trains else START_PATIENCE * self._patience

    def _read_status(self) -> None:
        """Read the files of the ranks; a rank that ends regularly deletes its own."""
        found = {}
        for path in self._folder.glob("*.json"):
            with contextlib.suppress(
                OSError, ValueError, KeyError, TypeError, RecursionError
            ):  # half written, or on a full disk
                mtime, status = path.stat().st_mtime_ns, json.loads(path.read_text(encoding="utf-8"))
                stacks = Path(status["stacks"]) if status["stacks"] else None
                known = self._ranks.get(path.stem)
                last = known.last_heartbeat if known and known.mtime == mtime else time.monotonic()
                found[path.stem] = Rank(path.stem, status["pid"], status["trains"], stacks, mtime, last)
        self._ranks = found

    def _save_stacks(self) -> None:
        """Have every rank write the stacks of its threads.  A stopped process does so when it is continued."""
        for rank in self._ranks.values():
            if rank.stacks:
                send(rank.pid, signal.SIGUSR1)
                send(rank.pid, signal.SIGCONT)
        time.sleep(DUMP_SECONDS)
        for rank in self._ranks.values():
            if rank.stacks and rank.stacks.exists() and not rank.stacks.stat().st_size:
                rank.stacks.write_text(f"no answer; state in the kernel: {kernel_wait(rank.pid)}\n", encoding="utf-8")
            if rank.stacks and rank.stacks.exists():
                log.error(
                    "rank %s hung; stacks in %s:\n%s",
                    rank.number,
                    rank.stacks,
                    rank.stacks.read_text(encoding="utf-8", errors="replace")[-4000:],
                )

    def _kill(self) -> None:
        for rank in self._ranks.values():
            send(rank.pid, signal.SIGKILL)
            (self._folder / f"{rank.number}.json").unlink(missing_ok=True)
        self._ranks, self._crashed_at = {}, None


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def state(pid: int) -> str:
    """The state of a process, a letter of proc(5).  Raises OSError if the process does not exist."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return stat.rsplit(")", 1)[1].split()[0]  # the name may contain spaces and ')'


def alive(pid: int) -> bool:
    """Whether a process is running; False for a zombie."""
    try:
        return state(pid) not in "ZX"
    except OSError:
        return False


def kernel_wait(pid: int) -> str:
    """The state of a process and the kernel function in which it waits, if known."""
    try:
        return f"state {state(pid)}, in {Path(f'/proc/{pid}/wchan').read_text(encoding='utf-8') or 'user space'}"
    except OSError as error:
        return str(error)
