"""The launcher: ranks that crash or hang are torn down and start again, and nothing outlives them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environment, flags, program
from test_survival import Attempts, attempts  # noqa: F401  # a fixture

from runtime.ranks.launch import alive
from runtime.shardset import ShardSet
from vgg.network.trained import Trained

HANG_SECONDS = 4
MARK = "VGG_TEST_RUN"  # in the environment of all that a launcher starts


def launch(tmp_path: Path, params_file: Path, ranks: int, restarts: int, **env: str) -> subprocess.Popen[str]:
    arguments = [*map(str, flags("train", tmp_path, params_file))]
    command = [sys.executable, "-m", "components.launch", "--max-restarts", str(restarts), str(ranks)]
    return subprocess.Popen(
        [*command, "components.train", *arguments], cwd=tmp_path,
        env=environment(**{MARK: str(tmp_path), "VGG_HANG_SECONDS": str(HANG_SECONDS), "VGG_WORKERS": "1", **env}),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def variables(pid: int) -> dict[str, str]:
    """The environment a process was started with; empty once it has ended."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def started(tmp_path: Path) -> dict[int, dict[str, str]]:
    """Processes that a launcher of this test started, itself included: their environments."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    found = {pid: values for pid in pids if (values := variables(pid)).get(MARK) == str(tmp_path)}
    return {pid: values for pid, values in found.items() if alive(pid)}


@pytest.mark.parametrize("stage", ["shard", "register"])
def test_what_is_one_process_says_so(stage: str, tmp_path: Path, params_file: Path) -> None:
    """Every rank that torchrun starts would do all of it."""
    done = program(stage, *flags(stage, tmp_path, params_file), cwd=tmp_path, RANK="1", WORLD_SIZE="2")
    assert done.returncode == 64, done.stderr
    assert f"error: components.{stage} is one process; start it with: python -m components.{stage} …" in done.stderr


def trains(pid: int) -> bool:
    """Whether a rank has told its launcher that it is past its first step."""
    values = variables(pid)
    try:
        about = json.loads((Path(values["VGG_RANKS"]) / f"{values['RANK']}.json").read_text())
    except (OSError, ValueError, KeyError):
        return False
    return bool(about["trains"]) and about["pid"] == pid


def rank(tmp_path: Path, number: int) -> int:
    """The process of a rank, once it trains: the eldest with that number; its decoding processes have it too."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        pids = [pid for pid, values in started(tmp_path).items() if values.get("RANK") == str(number)]
        stacks = tmp_path / f"model.stacks/rank-{number}.txt"
        if pids and stacks.exists() and list(tmp_path.glob("model/step-*")) and trains(min(pids)):
            return min(pids)
        time.sleep(0.05)
    raise TimeoutError("training did not begin")


def none_left(tmp_path: Path) -> bool:
    deadline = time.monotonic() + 5
    while started(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not started(tmp_path)


def shared_memory() -> set[str]:
    """But semaphores: a trainer's have lost their names before they are used, so these are of tests beside this one."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


@pytest.fixture
def expected(attempts: Attempts, params_file: Path, tmp_path: Path) -> str:
    """Parameters long enough to be caught in the act; the weights that two undisturbed ranks end with."""
    text = json.loads(params_file.read_text())
    text["train"] |= {"epochs": 4}
    params_file.write_text(json.dumps(text))
    assert attempts(tmp_path / "undisturbed", [{"world": 2}], narrow=False, **text["train"])[0]["codes"] == [0, 0]
    return Trained.open(tmp_path / "undisturbed").weights_sha256


def heard(child: subprocess.Popen[str], words: str) -> str:
    """What a launcher says until it has said these words."""
    assert child.stderr
    said = ""
    for line in child.stderr:
        said += line
        if words in line:
            return said
    raise AssertionError(f"never heard {words!r} in:\n{said}")


@pytest.mark.long
@pytest.mark.parametrize("blow", [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=pytest.mark.faults)])
def test_a_rank_that_hangs_or_crashes_starts_again(
    blow: signal.Signals, expected: str, params_file: Path, tmp_path: Path
) -> None:
    memory = shared_memory()
    child = launch(tmp_path, params_file, 2, 1)
    hangs = blow == signal.SIGSTOP
    os.kill(rank(tmp_path, 1), blow)
    began = time.monotonic()
    error = heard(child, f"ended with {75 if hangs else 137}; all ranks start again (0 restarts left)")
    assert time.monotonic() - began < 10 + (HANG_SECONDS if hangs else 0), error
    if hangs:
        assert f"no sign of life for {HANG_SECONDS} s from rank " in error
        for number in (0, 1):
            assert "vgg/training/loop.py" in error.split(f"rank {number} hung; stacks in ")[1].split(" hung;")[0], error
    _, error = child.communicate(timeout=120)
    assert child.returncode == 0, error
    assert Trained.open(tmp_path / "model").weights_sha256 == expected
    assert none_left(tmp_path)
    assert shared_memory() <= memory


@pytest.mark.faults
def test_stacks_of_a_hang_are_saved_and_without_restarts_the_end_is_75(
    shards: ShardSet, params_file: Path, tmp_path: Path
) -> None:
    params_file.write_text(params_file.read_text().replace('"epochs": 2', '"epochs": 500'))
    child = launch(tmp_path, params_file, 2, 0)
    os.kill(rank(tmp_path, 0), signal.SIGSTOP)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 75, error
    for number in (0, 1):
        assert "most recent call first" in (tmp_path / f"model.stacks/rank-{number}.txt").read_text()
    assert none_left(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("blow", "seconds"),
    [*((blow, when) for blow in (signal.SIGKILL, signal.SIGTERM) for when in (None, 0.0, 0.7)), (signal.SIGHUP, 0.0)],
)
def test_a_launcher_that_is_ended_leaves_nobody_behind(
    blow: signal.Signals, seconds: float | None, expected: str, params_file: Path, tmp_path: Path
) -> None:
    """While ranks start (None), at their first steps, later; the same command goes on to the same weights."""
    child = launch(tmp_path, params_file, 2, 0)
    if seconds is None:
        deadline = time.monotonic() + 60
        while len(started(tmp_path)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    else:
        rank(tmp_path, 1)
        time.sleep(seconds)
    began = time.monotonic()
    child.send_signal(blow)
    _, error = child.communicate(timeout=30)
    assert time.monotonic() - began < 20
    if blow != signal.SIGKILL:
        assert child.returncode in ((0, 75) if seconds else (75,)), error
    assert none_left(tmp_path)
    child = launch(tmp_path, params_file, 2, 0, VGG_HANG_SECONDS="100")
    _, error = child.communicate(timeout=120)
    assert child.returncode == 0, error
    assert Trained.open(tmp_path / "model").weights_sha256 == expected


def test_a_refusal_is_not_tried_again(shards: ShardSet, params_file: Path, tmp_path: Path) -> None:
    (shards.directory / "val.index.npy").write_bytes(b"")
    child = launch(tmp_path, params_file, 1, 3)
    _, error = child.communicate(timeout=100)
    assert child.returncode == 78, error
    assert "start again" not in error


def test_wrong_usage() -> None:
    done = program("launch", "0", "components.train", cwd=Path.cwd())
    assert done.returncode == 64
    assert "PROCESSES must be 1 or more" in done.stderr
