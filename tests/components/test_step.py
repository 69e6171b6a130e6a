"""A program as a step: retried only after certain exit codes; stopped by a signal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environment

PROGRAM = """
import json, os, signal, sys, time
codes = json.loads(sys.argv[1])
with open("runs", "a") as file:
    file.write(f"{os.getpid()} {os.environ.get('VGG_IMAGE')}\\n")
done = len(open("runs").readlines())
if codes[0] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    open("ready", "w").close()
    time.sleep(60)
if codes[done - 1] < 0:
    os.kill(os.getpid(), -codes[done - 1])
sys.exit(codes[done - 1])
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "program.py").write_text(PROGRAM)
    return [sys.executable, "-m", "components.step", "--attempts", "3", "--backoff-seconds", "0.05"]


def runs(tmp_path: Path) -> list[str]:
    return (tmp_path / "runs").read_text().splitlines()


@pytest.mark.parametrize(
    ("codes", "last", "attempts"),
    [
        ([0], 0, 1),
        ([64], 64, 1),
        ([65], 65, 1),
        ([78], 78, 1),
        ([1], 1, 1),
        ([-9], 137, 1),
        ([69, 0], 0, 2),
        ([74, 75, 0], 0, 3),
        ([75, 78], 78, 2),
        ([69, 69, 69, 0], 69, 3),
    ],
)
def test_only_failures_that_a_retry_may_help_are_retried(
    codes: list[int], last: int, attempts: int, command: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [*command, "--image", "registry/vgg@sha256:1", "program", json.dumps(codes)],
        cwd=tmp_path, env=environment(PYTHONPATH=f"{environment()['PYTHONPATH']}:{tmp_path}"),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == last, done.stderr
    assert len(runs(tmp_path)) == attempts
    assert all(line.endswith("registry/vgg@sha256:1") for line in runs(tmp_path))
    assert done.stderr.count("retrying in") == attempts - 1


def test_a_stop_signal_is_forwarded_and_ends_the_step(command: list[str], tmp_path: Path) -> None:
    env = environment(PYTHONPATH=f"{environment()['PYTHONPATH']}:{tmp_path}")
    running = subprocess.Popen([*command, "program", '["wait"]'], cwd=tmp_path, env=env)
    wait_for(tmp_path / "ready")
    running.terminate()
    assert running.wait(20) == 75
    assert len(runs(tmp_path)) == 1


def test_a_stop_signal_between_two_attempts_ends_the_step(command: list[str], tmp_path: Path) -> None:
    env = environment(PYTHONPATH=f"{environment()['PYTHONPATH']}:{tmp_path}")
    running = subprocess.Popen(
        [*command, "--backoff-seconds", "60", "program", "[69, 0]"], cwd=tmp_path, env=env, stderr=subprocess.PIPE
    )
    assert running.stderr and b"retrying in" in running.stderr.readline()
    running.terminate()
    assert running.wait(20) == 69
    assert len(runs(tmp_path)) == 1


def test_the_program_dies_with_its_step(command: list[str], tmp_path: Path) -> None:
    env = environment(PYTHONPATH=f"{environment()['PYTHONPATH']}:{tmp_path}")
    running = subprocess.Popen([*command, "program", '["wait"]'], cwd=tmp_path, env=env)
    wait_for(tmp_path / "ready")
    pid = int(runs(tmp_path)[0].split()[0])
    running.send_signal(signal.SIGKILL)
    running.wait(20)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("the program still runs")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


REFUSING = """
import os, sys
from components.program import run
from runtime.errors import Refused, Unreachable
def main():
    if not os.path.exists("once"):
        open("once", "w").close()
        raise Unreachable("the store cannot be reached")
    open(os.environ["VGG_LAST_WORDS"], "a").write('{"exit_code": 7\\n')
    raise Refused("e.json: lacks modes. " + "é" * 3000)
run(main)
"""


def test_the_last_words_of_the_last_attempt_are_written_for_kubernetes(command: list[str], tmp_path: Path) -> None:
    """Code and message; a long one is cut between characters.  Without a cluster nothing is written."""
    (tmp_path / "refusing.py").write_text(REFUSING)
    env = environment(PYTHONPATH=f"{environment()['PYTHONPATH']}:{tmp_path}")
    log = tmp_path / "termination-log"
    for exists in (False, True):
        if exists:
            log.touch()
        done = subprocess.run(
            [*command, "--last-words", str(log), "refusing"],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 78
        assert done.stderr.splitlines()[-1] == "refusing: exit code 78"
        assert log.exists() == exists
    message = log.read_bytes()
    assert message.decode().startswith("refusing: exit code 78: error: e.json: lacks modes. é")
    assert 2000 < len(message) <= 2048
