"""The launcher: restarts after crashes and hangs of ranks, and no processes are left behind."""

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

from components.launch import main
from runtime.ranks.launch import alive
from runtime.shards.shardset import ShardSet
from vgg.network.trained import Trained

HANG_SECONDS = 4
MARK = "VGG_TEST_RUN"  # environment variable of all processes of a launcher


def launch(tmp_path: Path, params_file: Path, ranks: int, restarts: int, **env: str) -> subprocess.Popen[str]:
    arguments = [*map(str, flags("train", tmp_path, params_file))]
    command = [sys.executable, "-m", "components.launch", "--max-restarts", str(restarts), str(ranks)]
    return subprocess.Popen(
        [*command, "components.train", *arguments], cwd=tmp_path,
        env=environment(**{MARK: str(tmp_path), "VGG_HANG_SECONDS": str(HANG_SECONDS), "VGG_WORKERS": "1", **env}),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("module", ["components.trian", "component.train"])
def test_a_misspelt_module_is_a_wrong_argument(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="64"):
        main(["1", module])
    assert f"no module named '{module}'" in capsys.readouterr().err


def variables(pid: int) -> dict[str, str]:
    """The initial environment of a process; empty after it has ended."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def started(tmp_path: Path) -> dict[int, dict[str, str]]:
    """Environments of the running processes of this test's launchers, including the launchers, by PID."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    found = {pid: values for pid in pids if (values := variables(pid)).get(MARK) == str(tmp_path)}
    return {pid: values for pid, values in found.items() if alive(pid)}


@pytest.mark.parametrize("stage", ["shard", "register"])
def test_stages_of_one_process_refuse_to_run_as_several(stage: str, tmp_path: Path, params_file: Path) -> None:
    """Otherwise every rank would do the whole work."""
    done = program(stage, *flags(stage, tmp_path, params_file), cwd=tmp_path, RANK="1", WORLD_SIZE="2")
    assert done.returncode == 64, done.stderr
    assert (
        f"error: components.{stage} runs as one process; start it with: python -m components.{stage} …" in done.stderr
    )


def trains(pid: int) -> bool:
    """Whether a rank has reported its first step to its launcher."""
    values = variables(pid)
    try:
        status = json.loads((Path(values["VGG_RANKS"]) / f"{values['RANK']}.json").read_text())
    except (OSError, ValueError, KeyError):
        return False
    return bool(status["trains"]) and status["pid"] == pid


def rank(tmp_path: Path, number: int) -> int:
    """Wait until a rank trains; returns its PID, the lowest with that RANK: its worker processes have it, too."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        pids = [pid for pid, values in started(tmp_path).items() if values.get("RANK") == str(number)]
        stacks = tmp_path / f"model.stacks/rank-{number}.txt"
        if pids and stacks.exists() and list(tmp_path.glob("model/step-*")) and trains(min(pids)):
            return min(pids)
        time.sleep(0.05)
    raise TimeoutError("training did not start")


def none_left(tmp_path: Path) -> bool:
    deadline = time.monotonic() + 5
    while started(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not started(tmp_path)


def shared_memory() -> set[str]:
    """Except semaphores: those of a trainer are unlinked before use, so these belong to other tests."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


@pytest.fixture
def expected(attempts: Attempts, params_file: Path, tmp_path: Path) -> str:
    """Make training long enough to be interrupted; returns the weights_sha256 of two undisturbed ranks."""
    params = json.loads(params_file.read_text())
    params["train"] |= {"epochs": 4}
    params_file.write_text(json.dumps(params))
    assert attempts(tmp_path / "undisturbed", [{"world": 2}], narrow=False, **params["train"])[0]["codes"] == [0, 0]
    return Trained.open(tmp_path / "undisturbed").weights_sha256


def read_until(child: subprocess.Popen[str], text: str) -> str:
    """The stderr of a launcher up to the line with this text."""
    assert child.stderr
    output = ""
    for line in child.stderr:
        output += line
        if text in line:
            return output
    raise AssertionError(f"{text!r} is not in:\n{output}")


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_ranks_restart_after_a_hang_or_a_crash(
    sent: signal.Signals, expected: str, params_file: Path, tmp_path: Path
) -> None:
    memory = shared_memory()
    child = launch(tmp_path, params_file, 2, 1)
    hangs = sent == signal.SIGSTOP
    os.kill(rank(tmp_path, 1), sent)
    start = time.monotonic()
    error = read_until(child, f"exit code {75 if hangs else 137}; restarting all ranks (0 restarts left)")
    assert time.monotonic() - start < 10 + (HANG_SECONDS if hangs else 0), error
    if hangs:
        assert f"no heartbeat for {HANG_SECONDS} s from rank " in error
        for number in (0, 1):
            assert "vgg/training/loop.py" in error.split(f"rank {number} hung; stacks in ")[1].split(" hung;")[0], error
    _, error = child.communicate(timeout=120)
    assert child.returncode == 0, error
    assert Trained.open(tmp_path / "model").weights_sha256 == expected
    assert none_left(tmp_path)
    assert shared_memory() <= memory


@pytest.mark.faults
def test_a_hang_without_restarts_saves_stacks_and_exits_with_75(
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
    ("sent", "seconds"),
    [
        *((sent, when) for sent in (signal.SIGKILL, signal.SIGTERM) for when in (None, 0.0, 0.7)),
        (signal.SIGHUP, 0.0),
        (signal.SIGUSR1, 0.0),
    ],
)
def test_an_ended_launcher_leaves_no_processes_behind(
    sent: signal.Signals, seconds: float | None, expected: str, params_file: Path, tmp_path: Path
) -> None:
    """While ranks start (None), at the first steps, later; the same command then ends with the same weights."""
    child = launch(tmp_path, params_file, 2, 0)
    if seconds is None:
        deadline = time.monotonic() + 60
        while len(started(tmp_path)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    else:
        rank(tmp_path, 1)
        time.sleep(seconds)
    start = time.monotonic()
    if sent == signal.SIGUSR1:  # of a batch system, to all processes of the job
        for pid in started(tmp_path):
            os.kill(pid, sent)
    else:
        child.send_signal(sent)
    _, error = child.communicate(timeout=30)
    assert time.monotonic() - start < 20
    if sent != signal.SIGKILL:
        assert child.returncode in ((0, 75) if seconds else (75,)), error
    assert none_left(tmp_path)
    child = launch(tmp_path, params_file, 2, 0, VGG_HANG_SECONDS="100")
    _, error = child.communicate(timeout=120)
    assert child.returncode == 0, error
    assert Trained.open(tmp_path / "model").weights_sha256 == expected


def test_a_refusal_is_not_retried(shards: ShardSet, params_file: Path, tmp_path: Path) -> None:
    (shards.directory / "val.index.npy").write_bytes(b"")
    child = launch(tmp_path, params_file, 1, 3)
    _, error = child.communicate(timeout=100)
    assert child.returncode == 78, error
    assert "restarting" not in error


def test_wrong_usage() -> None:
    done = program("launch", "0", "components.train", cwd=Path.cwd())
    assert done.returncode == 64
    assert "PROCESSES must be 1 or more" in done.stderr


def test_a_world_size_of_something_else_is_named(shards: ShardSet, params_file: Path, tmp_path: Path) -> None:
    """Left in the environment by another program, it would have a training wait for ranks that never come."""
    command = [sys.executable, "-m", "components.train", *map(str, flags("train", tmp_path, params_file))]
    alone = environment(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    waiting = subprocess.Popen(command, cwd=tmp_path, env=alone, stderr=subprocess.PIPE, text=True)
    try:
        assert waiting.stderr
        assert waiting.stderr.readline() == "WORLD_SIZE=2: rank 0 waits for the other ranks; unset it to train alone\n"
    finally:
        waiting.kill()
        waiting.wait(20)
