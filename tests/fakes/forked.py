"""Programs of the project in processes of their own that need not load the libraries again: they fork from a process
that has.  Of the two seconds that a program takes to start, tests wait once.

As a program: for every line of JSON on the inherited file descriptor 3 a forked process runs a module; the answers on
descriptor 4 are its process id and, when it has ended, its exit code.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components import closure
from vgg.params import STAGES

REQUESTS, ANSWERS = 3, 4
LOADED = [
    "components.stage", "mlflow.store.tracking.sqlalchemy_workspace_store", "mlflow.pyfunc",
    "mlflow.tracing.export.utils", "opentelemetry.sdk.metrics", "sqlalchemy.dialects.sqlite", "alembic.command",
    "boto3.session", "pandas", "matplotlib.figure", "matplotlib.backends.backend_agg", "vgg.sharding.pack",
    "vgg.training.loop", "vgg.training.task", "vgg.evaluation.evaluate",
]  # fmt: skip
# a program may differ from the process that it forks from in these alone: others may be read while libraries load
READ_LATE = ("VGG_", "AWS_", "MLFLOW_TRACKING_URI", "TMPDIR", "PYTEST_")


class Programs:
    """The process to fork from, in this environment; it ends with this one."""

    def __init__(self, env: Mapping[str, str]) -> None:
        (requests, self._requests), (self._answers, answers) = os.pipe(), os.pipe()
        self._env = dict(env)
        moved = f"exec {sys.executable} {__file__} {REQUESTS}<&{requests} {ANSWERS}>&{answers}"
        self._process = subprocess.Popen(
            ["bash", "-c", moved], env=self._env, stdin=subprocess.DEVNULL, pass_fds=[requests, answers]
        )
        os.close(requests)
        os.close(answers)
        self._buffer = b""
        atexit.register(self.close)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def can_run(self, env: Mapping[str, str]) -> bool:
        changed = {name for name, _ in env.items() ^ self._env.items()}
        return all(name.startswith(READ_LATE) for name in changed)

    def run(
        self, module: str, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """As subprocess.run([python, -m, module, …]) with captured text.  Raises subprocess.TimeoutExpired."""
        with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
            request = {
                "module": module, "arguments": list(arguments), "cwd": str(cwd), "env": dict(env),
                "stdout": out.name, "stderr": err.name,
            }  # fmt: skip
            os.write(self._requests, json.dumps(request).encode() + b"\n")
            deadline = time.monotonic() + timeout
            pid = self._answer(time.monotonic() + 60)
            try:
                code = self._answer(deadline)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                self._answer(time.monotonic() + 60)
                text = Path(err.name).read_text(errors="replace")
                raise subprocess.TimeoutExpired([module, *arguments], timeout, stderr=text) from None
            output, errors = (Path(file.name).read_text(encoding="utf-8") for file in (out, err))
            return subprocess.CompletedProcess([module, *arguments], code, output, errors)

    def _answer(self, deadline: float) -> int:
        while b"\n" not in self._buffer:
            if not select.select([self._answers], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            if not (more := os.read(self._answers, 4096)):
                raise AssertionError("the process to fork from has ended")
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return int(line)


def serve() -> dict[str, Any]:
    """Fork for every request; returns the request in the forked process alone."""
    gc.disable()
    for name in LOADED:
        importlib.import_module(name)
    for stage in STAGES:
        closure.fingerprints(stage)  # remembered by content: a program of another checkout reads its own files
    gc.freeze()  # what is loaded is neither searched for garbage nor copied in the forked processes
    gc.enable()
    with os.fdopen(REQUESTS, encoding="utf-8") as requests:
        while line := requests.readline():
            request: dict[str, Any] = json.loads(line)
            if (pid := os.fork()) == 0:
                os.close(ANSWERS)
                return request
            os.write(ANSWERS, f"{pid}\n".encode())
            os.write(ANSWERS, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    raise SystemExit


if __name__ == "__main__":
    given = serve()
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(given[name], os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    os.chdir(given["cwd"])
    os.environ.clear()
    os.environ.update(given["env"])
    tempfile.tempdir = None
    sys.argv = [given["module"], *given["arguments"]]
    sys.path[0] = given["cwd"]
    runpy.run_module(given["module"], run_name="__main__", alter_sys=True)
