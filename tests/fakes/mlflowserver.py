"""A real `mlflow server` on loopback."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import environment
from ending import ended


@contextmanager
def server(directory: Path, port: int, database: Path | None = None, **env: str) -> Iterator[None]:
    """A server with its database in a folder; ended with the context.  database: to begin with, a copy is used."""
    if database:
        shutil.copy(database, directory / "server.db")
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{directory}/server.db",
        "--artifacts-destination", str(directory / "artifacts"),
    ]  # fmt: skip
    child = subprocess.Popen(
        command,
        cwd=directory,
        env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", **env),  # as components.tracking ui and deploy/
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with ended(child, group=True):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield
