"""Ranks that die: a program that imports everything once and forks the ranks of many short trainings.

python tests/fakes/ranks.py SPEC: a JSON file with the parameters, shards, checkpoint directory, and `phases`, one
training attempt each: {"world": ranks, ...} and what shall happen to them.  A line of JSON is printed for every phase.

    "kill": [rank or -1 for all, seconds]   SIGKILL at that time after the first rank's first step (or start)
    "stop": {"rank": -1, "at": "update", "call": 3}   SIGTERM to that rank (-1: to each) at the n-th call of a function,
                                                      or at "batch": when the n-th batch does not come;
                                                      "signal": another one
    "directory": ...    another one than the others;
    "fresh": true       nothing is there when it begins;   "expect": a directory whose bytes shall be there after it
    "trace": {"in": "save" or "finish", "inject": "rename:signal=KILL:when=2"}   strace on the thread that saves

Every rank appends what it trains on to <directory>.journal/<rank>: rows of step and image numbers, as bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

torch.set_num_threads(1)

from runtime import checkpoint  # noqa: E402
from runtime.distributed import joined  # noqa: E402
from runtime.errors import Problem  # noqa: E402
from runtime.loader import Feed  # noqa: E402
from runtime.shardset import ShardSet  # noqa: E402
from runtime.stopping import StopSignal, die_with_parent  # noqa: E402
from vgg.network.model import CONFIGURATIONS, Architecture, blank  # noqa: E402
from vgg.params.train import TrainParams  # noqa: E402
from vgg.training import loop  # noqa: E402
from vgg.training.run import Task  # noqa: E402

# what these import inside, three seconds of every rank, comes with the fork
torch.optim.SGD(blank(Architecture("A", False, 1, 1, 32)).parameters(), 0.1, fused=True)

HUNG_SECONDS = 60

# where a signal can be raised: name -> (module or class, attribute)
PLACES: dict[str, tuple[Any, str]] = {
    "start": (loop, "start"),
    "arithmetic": (loop, "arithmetic"),  # said when all is ready for the first step
    "update": (loop, "update"),
    "validate": (loop, "validate"),
    "save": (loop, "save"),
    "write": (checkpoint, "save"),
    "finish": (checkpoint, "finish"),
}


class Silent:
    def progress(self, step: int, num_steps: int) -> None: ...
    def saved(self) -> None: ...
    def point(self, step: int, values: dict[str, float]) -> None: ...


def before(place: str, act: Callable[[int], None]) -> None:
    """Have `act` called with the number of the call before every call of a function."""
    owner, name = PLACES[place]
    function, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        act(calls)
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def journal(directory: Path, rank: int) -> None:
    """Append to the journal what every step of this rank trains on."""
    update = loop.update
    path = directory.with_name(directory.name + ".journal") / str(rank)
    path.parent.mkdir(exist_ok=True)

    def wrapped(run: Any, crops: Any) -> None:
        update(run, crops)
        with open(path, "a") as file:
            file.write(json.dumps([run.state.step, run.group.world_size, crops.numbers.tolist()]) + "\n")

    loop.update = wrapped


def rank_main(spec: dict[str, Any], phase: dict[str, Any], rank: int, port: int, tell: int) -> int:
    """What a rank does; returns its exit code."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(phase["world"]),
        "LOCAL_WORLD_SIZE": str(phase["world"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "VGG_WORKERS": str(phase.get("workers", 0)),
    }  # fmt: skip
    directory = Path(spec["directory"])
    stop = StopSignal()
    journal(directory, rank)
    before("update", lambda call: os.write(tell, b"u") if call == 1 else None)
    if (wanted := phase.get("stop")) and wanted["rank"] in (rank, -1):
        if wanted["at"] == "batch":
            stall(wanted["call"])
        else:
            number = signal.Signals[wanted.get("signal", "SIGTERM")]
            before(wanted["at"], lambda call: os.kill(os.getpid(), number) if call == wanted["call"] else None)
    if (traced := phase.get("trace")) and rank == 0:
        place = "write" if traced["in"] == "save" else "finish"
        before(place, lambda call: trace(traced["inject"], tell) if call == 1 else None)
    params = TrainParams.model_validate_json(json.dumps(spec["params"]))
    try:
        with joined(20) as group:
            task = Task(params=params, shards=ShardSet(Path(spec["shards"])), directory=directory, code={})
            loop.train(task, group, Silent(), stop)
    except Problem as problem:
        print(f"rank {rank}: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


def stall(call: int) -> None:
    """The n-th batch never comes: only the signal, which comes then, ends the wait."""
    begin = Feed.__init__

    def stalled(batches: Iterator[Any]) -> Iterator[Any]:
        for number, crops in enumerate(batches, 1):
            if number == call:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            yield crops

    def wrapped(self: Any, batches: Iterator[Any], *others: Any) -> None:
        begin(self, stalled(batches), *others)

    Feed.__init__ = wrapped  # type: ignore[method-assign]


def trace(inject: str, tell: int) -> None:
    """Have the parent attach strace to this thread, and wait until it has."""
    os.write(tell, json.dumps([os.getpid(), threading.get_native_id(), inject]).encode() + b"\n")
    os.kill(os.getpid(), signal.SIGSTOP)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def attempt(spec: dict[str, Any], phase: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks of a phase, do to them what it says, and tell how they ended."""
    spec = spec | {"directory": phase.get("directory", spec["directory"])}
    if phase.get("fresh"):
        shutil.rmtree(spec["directory"], ignore_errors=True)
    port, (ear, tell) = free_port(), os.pipe()
    children = []
    for rank in range(phase["world"]):
        child = os.fork()
        if not child:
            die_with_parent()
            os.close(ear)
            code = 70
            with contextlib.suppress(BaseException):
                try:
                    code = rank_main(spec, phase, rank, port, tell)
                except BaseException:
                    import traceback

                    traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    os.close(tell)
    tracer = None
    if kill := phase.get("kill"):
        os.read(ear, 1)  # somebody trains
        time.sleep(kill[1])
        for rank, child in enumerate(children):
            if kill[0] in (rank, -1):
                os.kill(child, signal.SIGKILL)
    elif "trace" in phase:
        tracer = attach(ear)
    asked = time.monotonic()
    codes = [ended(child, asked + HUNG_SECONDS) for child in children]
    seconds = time.monotonic() - asked
    if tracer:
        tracer.wait(20)
    os.close(ear)
    result: dict[str, Any] = {"codes": codes, "seconds": seconds}
    if "expect" in phase:
        result["same"] = content(Path(spec["directory"])) == content(Path(phase["expect"]))
    return result


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def ended(child: int, deadline: float) -> int:
    """The exit code of a child; one that hangs is killed with SIGABRT, and its code is -6."""
    while True:
        done, found = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(found)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGABRT)
            os.kill(child, signal.SIGCONT)
        time.sleep(0.005)


def attach(ear: int) -> subprocess.Popen[str] | None:
    """strace the thread that stopped itself, then let it go on."""
    heard = b""
    while not heard.endswith(b"\n"):
        piece = os.read(ear, 1000)
        if not piece:  # it has ended without coming there
            return None
        heard += piece.lstrip(b"u")
    process, thread, inject = json.loads(heard)
    while status(process, thread, "State") not in ("T", "t"):  # a signal to go on must not come before the stop
        time.sleep(0.002)
    call = inject.split(":")[0]
    tracer = subprocess.Popen(
        ["strace", "-q", "-o", "/dev/null", "-p", str(thread), "-e", f"trace={call}", "-e", f"inject={inject}"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while status(process, thread, "TracerPid") == "0" and tracer.poll() is None:
        time.sleep(0.002)
    os.kill(process, signal.SIGCONT)
    return tracer


def status(process: int, thread: int, field: str) -> str:
    """A field of a thread's status, its first word."""
    lines = Path(f"/proc/{process}/task/{thread}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith(field)).split()[1]


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    for name, stages in spec["configurations"].items():
        CONFIGURATIONS[name] = tuple(tuple(stage) for stage in stages)
    untouched = False  # once the fault is beyond the last call, the phases that follow would show nothing new
    for phase in spec["phases"]:
        result = attempt(spec, phase)
        print(json.dumps(result), flush=True)
        if untouched:
            break
        untouched = "trace" in phase and result["codes"] == [0]


if __name__ == "__main__":
    main()
