"""Stopping a program with SIGTERM, SIGHUP or Ctrl-C: it exits with 75 and is never killed by the signal."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

from runtime.stopping import STOP_SIGNALS

# CPython remembers a KeyboardInterrupt raised in exec() of a string, which dataclasses use on import
PROGRAM = """
import os, signal, sys, time
from components.program import run
def main():
    text = "os.kill(os.getpid(), int(sys.argv[1])); time.sleep(20)"
    exec(text) if sys.argv[2] == "text" else eval(compile(text, "code", "exec"))
run(main)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("kind", ["text", "code"])
def test_a_stopped_program_exits_with_75(kind: str, number: int, tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(PROGRAM)
    env = environment(PYTHONPATH=f"{environment()['PYTHONPATH']}:{tmp_path}")
    command = [sys.executable, "-m", "stopped", str(int(number)), kind]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 75, done.stderr
    assert done.stderr == "interrupted; run the same command again to continue\n"


STOPPED_AGAIN = """
import os, signal, sys, time
from components import program
def end_slowly(code, message):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    sys.exit(code)
program.end = end_slowly
program.run(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(20)))
"""


def test_a_second_signal_does_not_interrupt_the_end() -> None:
    """Both the process group and the parent signal the program of a step."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_AGAIN], env=environment(), capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 75, done.stderr


def test_nohup_is_respected() -> None:
    script = """
import os, signal
from components.program import run
from runtime.stopping import StopSignal
def main():
    os.kill(os.getpid(), signal.SIGHUP)
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    print("alive", stop())
run(main)
"""
    done = subprocess.run(
        ["nohup", sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (0, "alive False\n"), done.stderr
