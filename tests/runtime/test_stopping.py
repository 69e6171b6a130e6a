"""StopRequested to end: by SIGTERM, SIGHUP and Ctrl-C, at any moment, a program ends with 75, and never by a signal."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

from runtime.stopping import STOP_SIGNALS

# where a text is executed, as dataclasses do at import, CPython remembers a KeyboardInterrupt for ever
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
def test_a_program_that_is_asked_to_end_ends_with_75(kind: str, number: int, tmp_path: Path) -> None:
    (tmp_path / "asked.py").write_text(PROGRAM)
    env = environment(PYTHONPATH=f"{environment()['PYTHONPATH']}:{tmp_path}")
    command = [sys.executable, "-m", "asked", str(int(number)), kind]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 75, done.stderr
    assert done.stderr == "interrupted; run the same command again to go on\n"


TWICE = """
import os, signal, sys, time
from components import program
def end_slowly(code, message):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    sys.exit(code)
program.end = end_slowly
program.run(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(20)))
"""


def test_being_asked_twice_disturbs_no_end() -> None:
    """A group and a parent both signal a step's program."""
    done = subprocess.run([sys.executable, "-c", TWICE], env=environment(), capture_output=True, text=True, timeout=30)
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
