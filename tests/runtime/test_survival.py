"""Training after kills at random times and at every system call of saving, after stops, and on other worlds.

`make faults` sets VGG_KILLS and runs the tests marked faults; the others are part of every suite.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NARROW, ROOT, environment, train_params

from runtime.shards.shardset import ShardSet
from vgg.data.stream import Order
from vgg.network.trained import Trained
from vgg.training.run import samples_digest

KILLS = int(os.environ.get("VGG_KILLS", "4"))
PARAMS = {"epochs": 3, "precision": "fp32", "checkpoint_steps": 2}
Attempts = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def attempts(shards: ShardSet, tmp_path: Path) -> Attempts:
    """A function (directory, phases, **parameters) that runs tests/fakes/ranks.py and returns a result per phase."""

    def run(directory: Path, phases: list[dict[str, Any]], narrow: bool = True, **changes: Any) -> list[dict[str, Any]]:
        params = train_params(**{**PARAMS, **changes})
        spec = {
            "configurations": NARROW if narrow else {}, "params": params.model_dump(mode="json"),
            "shards": str(shards.directory), "directory": str(directory), "phases": phases,
        }  # fmt: skip
        path = tmp_path / f"{directory.name}.spec.json"
        path.write_text(json.dumps(spec))
        command = [sys.executable, str(ROOT / "tests/fakes/ranks.py"), str(path)]
        timeout = 60 + 25 * len(phases)
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stderr
        results = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(results) == len(phases) or "trace" in phases[-2], done.stderr
        for result in results:
            result["stderr"] = done.stderr
        return results

    return run


def trained(directory: Path) -> dict[str, bytes]:
    """The content of all files of a finished training, by path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def journal(directory: Path) -> list[list[int]]:
    """Image numbers of every global batch in order, combined from the journals of the ranks; the last entry counts."""
    entries: dict[int, dict[int, list[int]]] = {}
    folder = directory.with_name(directory.name + ".journal")
    lines = []
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            step, world, numbers = json.loads(line)
            lines.append((path.stat().st_mtime_ns, step, world, int(path.name), numbers))
    for _, step, world, rank, numbers in lines:
        entries.setdefault(step, {})[(world, rank)] = numbers  # type: ignore[index]
    batches = []
    for step in sorted(entries):
        worlds = {world for world, _ in entries[step]}  # type: ignore[misc]
        found = []
        for world in worlds:
            shares = [entries[step].get((world, rank)) for rank in range(world)]  # type: ignore[call-overload]
            if all(share is not None for share in shares):
                batch = [0] * sum(map(len, shares))
                for rank, share in enumerate(shares):
                    batch[rank::world] = share
                found.append(batch)
        assert found, f"step {step}: no world trained on the complete batch"
        assert all(batch == found[0] for batch in found), f"step {step}: the worlds had different images"
        batches.append(found[0])
    return batches


def planned(shards: ShardSet, num_steps: int) -> list[list[int]]:
    params = train_params(**PARAMS)
    order = Order(shards.split("train").rows["shard"], params.seed)
    return [numbers.tolist() for numbers, _ in order.batches(params.batch_size, 0, num_steps)]


def digest(batches: list[list[int]]) -> str:
    total = sum(samples_digest(step, np.arange(len(batch)), np.array(batch)) for step, batch in enumerate(batches))
    return f"{total % 2**64:016x}"


@pytest.mark.timeout(3600)
def test_killed_at_random_times(shards: ShardSet, attempts: Attempts, tmp_path: Path) -> None:
    """kill -9 of one of two ranks, or of both, until training is finished: the files of the undisturbed run."""
    straight, random_ = tmp_path / "straight", random.Random(4)
    (undisturbed,) = attempts(straight, [{"world": 2}], epochs=5)
    assert undisturbed["codes"] == [0, 0], undisturbed["stderr"]
    longest = undisturbed["seconds"] / 3  # so that a training is killed several times before it is finished
    kills = 0
    while kills < KILLS:
        rounds = []
        for _ in range(-(-min(100, KILLS - kills) // 4)):
            attempt = [
                {"world": 2, "kill": [random_.choice([-1, 0, 1]), random_.uniform(0, longest)]} for _ in range(4)
            ]
            rounds += [{**attempt[0], "fresh": True}, *attempt[1:], {"world": 2, "expect": str(straight)}]
        shutil.rmtree(tmp_path / "killed.journal", ignore_errors=True)
        results = attempts(tmp_path / "killed", rounds, epochs=5)
        killed = sum(-9 in result["codes"] for result in results)
        assert killed, "every kill was too late"
        kills += killed
        for number, result in enumerate(results):
            assert set(result["codes"]) <= {0, -9, 75}, result["stderr"]
            if "same" in result:
                assert result["codes"] == [0, 0], result["stderr"]
                assert result["same"], f"attempt {number}: files differ from the undisturbed run"
        batches = journal(tmp_path / "killed")
        assert batches == planned(shards, len(batches))


@pytest.mark.faults
def test_another_world_at_every_restart(narrow: None, shards: ShardSet, attempts: Attempts, tmp_path: Path) -> None:
    """4 ranks, then 2, 1 and 3: every image at its position, and the network of one process to float tolerance."""
    stop = {"rank": 1, "at": "update", "call": 3}
    phases = [
        {"world": 4, "stop": stop}, {"world": 2, "stop": stop}, {"world": 1, "stop": {**stop, "rank": 0}}, {"world": 3},
    ]  # fmt: skip
    results = attempts(tmp_path / "elastic", phases)
    assert [result["codes"] for result in results] == [[75] * 4, [75] * 2, [75], [0] * 3], results[0]["stderr"]
    attempts(tmp_path / "alone", [{"world": 1}])
    ours, alone = Trained.open(tmp_path / "elastic").step, Trained.open(tmp_path / "alone").step
    plan = planned(shards, ours.step)
    assert journal(tmp_path / "elastic") == plan
    assert ours.state["samples"] == alone.state["samples"] == digest(plan)
    for name, tensor in ours.weights().items():
        torch.testing.assert_close(tensor, alone.weights()[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"micro_batch_size": 3}, 2e-5),
        ({"gradient_compression": "bf16"}, 1e-3),
    ],
)
@pytest.mark.faults
def test_micro_batches_and_compressed_gradients_on_several_ranks(
    changes: dict[str, Any], tolerance: float, narrow: None, attempts: Attempts, tmp_path: Path
) -> None:
    """Shares of 4 in parts of 3 and 1 with one exchange of gradients; gradients exchanged in bf16."""
    assert attempts(tmp_path / "ranks", [{"world": 2}], **changes)[0]["codes"] == [0, 0]
    attempts(tmp_path / "alone", [{"world": 1}])
    ours, alone = (Trained.open(tmp_path / name).step.weights() for name in ("ranks", "alone"))
    difference = max(float((ours[name] - alone[name]).abs().max()) for name in alone)
    assert 0 < difference < tolerance  # 0: the parameter would have no effect


def test_a_lost_repeated_or_moved_image_is_detected() -> None:
    plan = [[3, 1, 2], [0, 5, 4]]
    others = [[[3, 1], [0, 5, 4]], [[3, 1, 1], [0, 5, 4]], [[1, 3, 2], [0, 5, 4]], [[0, 5, 4], [3, 1, 2]]]
    assert len({digest(batches) for batches in [plan, *others]}) == 5


POSITIONS = [("update", 5), ("write", 2), ("validate", 1), ("update", 1), ("batch", 3), ("save", 1)]


@pytest.mark.parametrize(
    ("world", "positions"),
    [(2, POSITIONS[:3]), *(pytest.param(n, POSITIONS, marks=pytest.mark.faults) for n in (1, 2))],
    ids=["quick", "alone", "two"],
)
def test_sigterm_at_any_phase(world: int, positions: list[tuple[str, int]], attempts: Attempts, tmp_path: Path) -> None:
    """All ranks exit with 75 in time and leave a valid checkpoint; the next start ends with the undisturbed files."""
    straight = str(tmp_path / "straight")
    phases: list[dict[str, Any]] = [{"world": world, "directory": straight}]
    for at, call in positions:
        rank = 0 if at == "write" else world - 1  # only the last rank gets the signal; only the first rank writes
        stop = {"rank": rank, "at": at, "call": call}
        phases.append({"world": world, "stop": stop, "workers": 1, "fresh": True})
        phases.append({"world": world, "expect": straight})
    results = attempts(tmp_path / "stopped", phases)
    for position, stopped, finished in zip(positions, results[1::2], results[2::2], strict=True):
        assert stopped["codes"] == [75] * world, f"{position}: {stopped['stderr']}"
        assert stopped["seconds"] < 20, position
        assert finished["codes"] == [0] * world, f"{position}: {finished['stderr']}"
        assert finished["same"], f"{position}: files differ from the undisturbed run"


PLATEAU = {
    "rule": "plateau", "warmup_epochs": 0, "drop_factor": 10, "patience": 1, "min_improvement": 0.0, "max_drops": 3,
}  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"momentum": 0.0}, {"schedule": PLATEAU}])
def test_stopped_at_the_start(changes: dict[str, Any], world: int, attempts: Attempts, tmp_path: Path) -> None:
    """At step 0, two times at the same validation, and without momentum; then the same files."""
    straight = str(tmp_path / "straight")
    last = {"rank": world - 1}
    stops = {
        "while it starts": [{"at": "start", "call": 1}],
        "ready": [{"at": "arithmetic", "call": 1}],
        "the terminal is closed": [{"at": "arithmetic", "call": 1, "signal": "SIGHUP"}],
        "no batch comes": [{"at": "batch", "call": 1}],
        "two starts in turn": [{"at": "arithmetic", "call": 1}] * 2,
        "the first save": [{"at": "save", "call": 1}],
        "validating before the first step": [{"at": "validate", "call": 1}] * 2,
    }
    phases: list[dict[str, Any]] = [{"world": world, "directory": straight}]
    for in_turn in stops.values():
        phases += [{"world": world, "stop": {**last, **stop}, "fresh": not n} for n, stop in enumerate(in_turn)]
        phases.append({"world": world, "expect": straight})
    results = iter(attempts(tmp_path / "stopped", phases, **changes)[1:])
    for name, in_turn in stops.items():
        for result in (next(results) for _ in in_turn):
            assert result["codes"] == [75] * world, f"{name}: {result['stderr']}"
        finished = next(results)
        assert finished["codes"] == [0] * world, f"{name}: {finished['stderr']}"
        assert finished["same"], f"{name}: files differ from the undisturbed run"


@pytest.mark.faults
def test_three_ranks_end_with_the_same_files_after_a_stop(attempts: Attempts, tmp_path: Path) -> None:
    """The sum of three numbers depends on their order, which DDP chooses at every start (see warmup.regroup)."""
    straight, stop = str(tmp_path / "straight"), {"rank": 2, "at": "update", "call": 3}
    phases = [{"world": 3, "directory": straight}, {"world": 3, "stop": stop}, {"world": 3, "expect": straight}]
    _, stopped, finished = attempts(tmp_path / "stopped", phases)
    assert stopped["codes"] == [75] * 3, stopped["stderr"]
    assert finished["codes"] == [0] * 3, finished["stderr"]
    assert finished["same"], "files differ from the undisturbed run"


def every_call(attempts: Attempts, directory: Path, inject: str, function: str, expected: int) -> int:
    """Inject a fault at the first, second, … call in the thread that saves, until none is reached.

    After every fault the next start ends with the files of the undisturbed run.  Returns the number of calls.
    """
    straight, number = str(directory.parent / "straight"), 0
    while True:
        block = range(number + 1, number + 16)
        phases = [{"world": 1, "directory": straight}]
        for when in block:
            trace = {"in": function, "inject": inject.format(when=when)}
            phases += [{"world": 1, "fresh": True, "trace": trace}, {"world": 1, "expect": straight}]
        results = attempts(directory, phases)
        for when, faulty, finished in zip(block, results[1::2], results[2::2], strict=False):
            assert finished["codes"] == [0], f"{inject} {when}: {finished['stderr']}"
            assert finished["same"], f"{inject} {when}: files differ from the undisturbed run"
            if faulty["codes"] == [0]:
                return when - 1
            assert faulty["codes"] == [expected], f"{inject} {when}: {faulty}"
        number = block[-1]


needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
QUICK = [("rename", "finish")]
CALLS = ("openat", "write", "fsync", "unlink", "unlinkat", "rmdir", "mkdir")
FULL = [pytest.param(call, function, marks=pytest.mark.faults) for call in CALLS for function in ("save", "finish")]
FULL.append(pytest.param("rename", "save", marks=pytest.mark.faults))


@needs_strace
@pytest.mark.parametrize(("call", "function"), [*QUICK, *FULL])
@pytest.mark.timeout(1800)
def test_killed_at_every_system_call_of_saving(call: str, function: str, attempts: Attempts, tmp_path: Path) -> None:
    calls = every_call(attempts, tmp_path / "model", call + ":signal=KILL:when={when}", function, -9)
    print(f"{call} in {function}: {calls}")
    if call in ("rename", "openat", "write", "fsync"):
        assert calls >= 1


@needs_strace
@pytest.mark.faults
@pytest.mark.parametrize("call", ["write", "mkdir"])
@pytest.mark.timeout(1800)
def test_a_disk_that_becomes_full(call: str, attempts: Attempts, tmp_path: Path) -> None:
    """Exit code 74; earlier checkpoints stay good, and with free space the result is the same."""
    calls = every_call(attempts, tmp_path / "model", call + ":error=ENOSPC:when={when}+", "save", 74)
    print(f"{call}: {calls}")
    assert calls >= 3
