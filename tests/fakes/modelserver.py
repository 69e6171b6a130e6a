"""A real `mlflow models serve` on loopback."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from ending import ended
from ports import free_port

START_SECONDS = 200


@contextmanager
def serving(python: Path, model: object, directory: Path, env: dict[str, str]) -> Iterator[str]:
    """The address of /invocations of a server; ended with the context.

    python: of its environment, first on PATH.  model: folder or models:/…
    """
    port = free_port()
    command = [
        python, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    directory.mkdir(exist_ok=True)
    with open(directory / "log", "wb") as log:
        child = subprocess.Popen(command, cwd=directory, env=env, stdout=log, stderr=log, start_new_session=True)
    with ended(child, group=True):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and child.poll() is None:
            try:
                if requests.get(f"http://127.0.0.1:{port}/ping", timeout=5).ok:
                    break
            except requests.ConnectionError:
                time.sleep(0.1)
        else:
            raise AssertionError((directory / "log").read_text())
        yield f"http://127.0.0.1:{port}/invocations"
