"""Ranks that are killed or stopped: a program that imports everything once and forks the ranks of many trainings.

python tests/fakes/ranks.py SPEC: a JSON file with the parameters, shards, checkpoint directory, and `phases`, one
training attempt each: {"world": ranks, ...} and the faults.  Prints a line of JSON for every phase.

    "kill": [rank or -1 for all, seconds]   SIGKILL that long after the first step of any rank
    "stop": {"rank": -1, "at": "update", "call": 3}   SIGTERM to that rank (-1: to each) at the n-th call of a function,
                                                      or, at "batch", while it waits for the n-th batch;
                                                      "signal": another signal
    "directory": ...    another checkpoint directory
    "fresh": true       delete the directory before;   "expect": compare the directory with this one after it
    "trace": {"in": "save" or "finish", "inject": "rename:signal=KILL:when=2"}   strace on the thread that saves

Every rank appends its steps to <directory>.journal/<rank>: lines of JSON, [step, ranks, image numbers].
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from ports import free_port

torch.set_num_threads(1)

from runtime import checkpoint  # noqa: E402
from runtime.distributed import joined  # noqa: E402
from runtime.errors import Problem  # noqa: E402
from runtime.shards.loader import Feed  # noqa: E402
from runtime.shards.shardset import ShardSet  # noqa: E402
from runtime.stopping import StopSignal, die_with_parent  # noqa: E402
from vgg.network.model import CONFIGURATIONS  # noqa: E402
from vgg.params.train import TrainParams  # noqa: E402
from vgg.training import loop  # noqa: E402
from vgg.training.task import Task  # noqa: E402

HUNG_SECONDS = 60

# functions at which a signal can be sent: name -> (module, attribute)
FUNCTIONS: dict[str, tuple[Any, str]] = {
    "start": (loop, "start"),
    "arithmetic": (loop, "arithmetic"),  # called just before the first step
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


def before(function_name: str, act: Callable[[int], None]) -> None:
    """Call `act` with the number of the call before every call of a function."""
    owner, name = FUNCTIONS[function_name]
    function, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        act(calls)
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def journal(directory: Path, rank: int) -> None:
    """Append every step of this rank to its journal."""
    update = loop.update
    path = directory.with_name(directory.name + ".journal") / str(rank)
    path.parent.mkdir(exist_ok=True)

    def wrapped(run: Any, crops: Any) -> None:
        update(run, crops)
        with open(path, "a") as file:
            file.write(json.dumps([run.state.step, run.group.world_size, crops.numbers.tolist()]) + "\n")

    loop.update = wrapped


def rank_main(spec: dict[str, Any], phase: dict[str, Any], rank: int, port: int, pipe: int) -> int:
    """Run a rank; returns its exit code.  pipe: for messages to the parent."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(phase["world"]),
        "LOCAL_WORLD_SIZE": str(phase["world"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "VGG_WORKERS": str(phase.get("workers", 0)),
    }  # fmt: skip
    directory = Path(spec["directory"])
    stop = StopSignal()
    journal(directory, rank)
    before("update", lambda call: os.write(pipe, b"u") if call == 1 else None)
    if (requested := phase.get("stop")) and requested["rank"] in (rank, -1):
        if requested["at"] == "batch":
            stall(requested["call"])
        else:
            number = signal.Signals[requested.get("signal", "SIGTERM")]
            before(requested["at"], lambda call: os.kill(os.getpid(), number) if call == requested["call"] else None)
    if (traced := phase.get("trace")) and rank == 0:
        function_name = "write" if traced["in"] == "save" else "finish"
        before(function_name, lambda call: trace(traced["inject"], pipe) if call == 1 else None)
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
    """Send SIGTERM while the rank waits for the n-th batch, which never arrives."""
    original = Feed.__init__

    def stalled(batches: Iterator[Any]) -> Iterator[Any]:
        for number, crops in enumerate(batches, 1):
            if number == call:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            yield crops

    def wrapped(self: Any, batches: Iterator[Any], *others: Any) -> None:
        original(self, stalled(batches), *others)

    Feed.__init__ = wrapped  # type: ignore[method-assign]


def trace(inject: str, pipe: int) -> None:
    """Have the parent attach strace to this thread; wait until it has done so."""
    os.write(pipe, json.dumps([os.getpid(), threading.get_native_id(), inject]).encode() + b"\n")
    os.kill(os.getpid(), signal.SIGSTOP)


def attempt(spec: dict[str, Any], phase: dict[str, Any]) -> dict[str, Any]:
    """Run a phase: fork the ranks, inject its faults, return exit codes and duration."""
    spec = spec | {"directory": phase.get("directory", spec["directory"])}
    if phase.get("fresh"):
        shutil.rmtree(spec["directory"], ignore_errors=True)
    port, (reader, writer) = free_port(), os.pipe()
    children = []
    for rank in range(phase["world"]):
        child = os.fork()
        if not child:
            die_with_parent()
            os.close(reader)
            code = 70
            with contextlib.suppress(BaseException):
                try:
                    code = rank_main(spec, phase, rank, port, writer)
                except BaseException:
                    import traceback

                    traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    os.close(writer)
    tracer = None
    if kill := phase.get("kill"):
        os.read(reader, 1)  # a rank has done its first step
        time.sleep(kill[1])
        for rank, child in enumerate(children):
            if kill[0] in (rank, -1):
                os.kill(child, signal.SIGKILL)
    elif "trace" in phase:
        tracer = attach(reader)
    start = time.monotonic()
    codes = [ended(child, start + HUNG_SECONDS) for child in children]
    seconds = time.monotonic() - start
    if tracer:
        tracer.wait(20)
    os.close(reader)
    result: dict[str, Any] = {"codes": codes, "seconds": seconds}
    if "expect" in phase:
        result["same"] = content(Path(spec["directory"])) == content(Path(phase["expect"]))
    return result


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def ended(child: int, deadline: float) -> int:
    """Wait for a child; returns its exit code.  After the deadline it is killed with SIGABRT, exit code -6."""
    while True:
        done, found = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(found)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGABRT)
            os.kill(child, signal.SIGCONT)
        time.sleep(0.005)


def attach(reader: int) -> subprocess.Popen[str] | None:
    """Attach strace to the thread that stopped itself, then continue it.  None: it ended before."""
    message = b""
    while not message.endswith(b"\n"):
        piece = os.read(reader, 1000)
        if not piece:
            return None
        message += piece.lstrip(b"u")
    process, thread, inject = json.loads(message)
    while status(process, thread, "State") not in ("T", "t"):  # SIGCONT must not be sent before SIGSTOP took effect
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
    """The first word of a field in the status of a thread."""
    lines = Path(f"/proc/{process}/task/{thread}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith(field)).split()[1]


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    for name, stages in spec["configurations"].items():
        CONFIGURATIONS[name] = tuple(tuple(stage) for stage in stages)
    if any(phase["world"] > 1 for phase in spec["phases"]):
        importlib.import_module("torch._dynamo")  # DistributedDataParallel takes three seconds for it; forks have it
    gc.freeze()
    untouched = False  # whether the fault was after the last call; then the remaining phases are not needed
    for phase in spec["phases"]:
        result = attempt(spec, phase)
        print(json.dumps(result), flush=True)
        if untouched:
            break
        untouched = "trace" in phase and result["codes"] == [0]


if __name__ == "__main__":
    main()
