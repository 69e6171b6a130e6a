"""The services of docker/compose.yaml as processes of this machine: their commands, environment and files."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, environment
from ending import ended
from ports import free_port

BINARIES = Path("/usr/lib/postgresql")  # Debian's
VARIABLE = re.compile(r"\$\{(\w+)(?:(:[-?+])([^}]*))?\}")


def interpolated(text: str, env: dict[str, str]) -> str:
    """Compose's substitution: ${X}, ${X:-default}, ${X:?message}, ${X:+other}.  Raises KeyError with the message."""

    def value(found: re.Match[str]) -> str:
        name, operator, rest = found.groups()
        given = env.get(name, "")
        if operator == ":+":
            return rest if given else ""
        if not given and operator == ":?":
            raise KeyError(f"{name}: {rest}")
        return given or (rest if operator == ":-" else "")

    return VARIABLE.sub(value, text)


@contextlib.contextmanager
def docker_compose(folder: Path, env: dict[str, str]) -> Iterator[None]:
    """The file as it is, by Docker Compose, for the address BIND; the log of MLflow is left in the folder.

    POSTGRES_IMAGE and SEAWEEDFS_IMAGE name other images if the file's cannot be pulled; BASE that of `make images`.
    """
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))
    compose = ["docker", "compose", "--project-name", f"vgg-{folder.parent.name.replace('_', '-')}"]
    compose += ["--env-file", str(folder / ".env"), "--file", str(ROOT / "docker/compose.yaml")]

    def call(*words: str, seconds: int = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*compose, *words], capture_output=True, text=True, timeout=seconds)

    try:
        done = call("up", "--detach", "--wait", seconds=900)
        logs = call("logs", "--no-color").stdout
        assert done.returncode == 0, f"{done.stderr}\n{logs}"
        yield
    finally:
        (folder / "mlflow.log").write_text(call("logs", "--no-color", "mlflow").stdout)
        call("down", "--volumes", "--timeout", "5")


@dataclass
class Composed:
    """The file with its variables replaced, and host names and ports by those of this machine.

    env: content of .env.  folder: for data, files and logs.
    """

    folder: Path
    env: dict[str, str]
    ports: dict[str, int] = field(default_factory=lambda: {name: free_port() for name in ("postgres", "s3", "mlflow")})

    def __post_init__(self) -> None:
        text = interpolated((ROOT / "docker/compose.yaml").read_text(), self.env)
        self.file = yaml.safe_load(text)
        self.services: dict[str, dict[str, Any]] = self.file["services"]

    def local(self, text: str) -> str:
        """A text of the file, for this machine."""
        for host, port in (("postgres", 5432), ("s3", 8333)):
            text = re.sub(rf"\b{host}:{port}\b", f"127.0.0.1:{self.ports[host]}", text)
        text = re.sub(r"(--port=|\blocalhost:|\b127\.0\.0\.1:|\bmlflow:)5000\b", rf"\g<1>{self.ports['mlflow']}", text)
        text = text.replace("localhost:8333", f"localhost:{self.ports['s3']}")
        return text.replace("--host=0.0.0.0", "--host=127.0.0.1").replace("/etc/mlflow", str(self.folder / "mlflow"))

    def environment(self, service: str) -> dict[str, str]:
        return environment(**{k: self.local(v) for k, v in self.services[service]["environment"].items()})

    def command(self, service: str) -> list[str]:
        first, *rest = map(self.local, self.services[service]["command"])
        assert first == "python"
        return [sys.executable, *rest]

    @contextlib.contextmanager
    def postgres(self) -> Iterator[None]:
        """A new PostgreSQL with the service's user, password and database, as Debian's user postgres."""
        versions = sorted(BINARIES.glob("*/bin"), key=lambda path: int(path.parent.name))
        if not versions or os.getuid():
            pytest.skip("needs PostgreSQL (apt-get install postgresql) and root")
        given, data, port = self.services["postgres"]["environment"], self.folder / "postgres", self.ports["postgres"]
        data.mkdir()
        (password := self.folder / "password").write_text(given["POSTGRES_PASSWORD"])
        for path in (data, password):
            shutil.chown(path, "postgres")
        for parent in data.parents:  # pytest's folders are for their owner only
            if parent.stat().st_mode & 0o001 == 0:
                parent.chmod(parent.stat().st_mode | 0o011)
        path = {"PATH": f"{versions[-1]}:/usr/bin:/bin", "LC_ALL": "C"}
        as_postgres: dict[str, Any] = {"user": "postgres", "cwd": "/", "env": path}
        subprocess.run(
            ["initdb", "--pgdata", data, "--username", given["POSTGRES_USER"], "--pwfile", password,
             "--auth=scram-sha-256", "--encoding=UTF8", "--no-sync"],
            executable=versions[-1] / "initdb", check=True, capture_output=True, timeout=120, **as_postgres,
        )  # fmt: skip
        with open(self.folder / "postgres.log", "wb") as log:
            process = subprocess.Popen(
                ["postgres", "-D", data, "-p", str(port), "-k", data, "-c", "listen_addresses=127.0.0.1",
                 "-c", "fsync=off"],
                executable=versions[-1] / "postgres", stdout=log, stderr=log, **as_postgres,
            )  # fmt: skip
        try:
            sql = ["psql", "--host=127.0.0.1", f"--port={port}", f"--username={given['POSTGRES_USER']}", "postgres",
                   "--command", f"CREATE DATABASE {given['POSTGRES_DB']}"]  # fmt: skip
            until = time.monotonic() + 60
            while subprocess.run(
                sql, env={**os.environ, "PGPASSWORD": given["POSTGRES_PASSWORD"]}, capture_output=True, timeout=30
            ).returncode:
                assert process.poll() is None and time.monotonic() < until, (self.folder / "postgres.log").read_text()
                time.sleep(0.2)
            yield
        finally:
            process.send_signal(signal.SIGINT)  # ends open sessions
            process.wait(30)

    @contextlib.contextmanager
    def s3(self, kind: str) -> Iterator[None]:
        """The store: 'seaweedfs' with the file's command, or 'rclone'."""
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        binary = shutil.which({"seaweedfs": "weed"}.get(kind, kind), path=programs)
        if not binary:
            pytest.skip(f"needs {kind}")
        data, port, key = self.folder / "s3", self.ports["s3"], self.services["mlflow"]["environment"]
        data.mkdir()
        if kind == "rclone":
            login = f"{key['AWS_ACCESS_KEY_ID']},{key['AWS_SECRET_ACCESS_KEY']}"
            command = ["serve", "s3", str(data), "--addr", f"127.0.0.1:{port}", "--auth-key", login]
            command += ["--config", "/dev/null", "--cache-dir", str(self.folder / "rclone")]
        else:
            (self.folder / "s3.json").write_text(self.file["configs"]["identities"]["content"])
            local = {"-dir=/data": f"-dir={data}", "-ip=s3": "-ip=127.0.0.1", "-ip.bind=0.0.0.0": "-ip.bind=127.0.0.1",
                     "-s3.port=8333": f"-s3.port={port}",
                     "-s3.config=/etc/seaweedfs/s3.json": f"-s3.config={self.folder}/s3.json"}  # fmt: skip
            command = [local.pop(word, word) for word in self.services["s3"]["command"]]
            assert not local
            command += [f"-{part}.port={free_port()}" for part in ("master", "volume", "filer")]
        with open(self.folder / "s3.log", "wb") as log:
            process = subprocess.Popen([binary, *command], cwd=self.folder, env=environment(), stdout=log, stderr=log)
        with ended(process):
            until = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert process.poll() is None and time.monotonic() < until, (self.folder / "s3.log").read_text()
                time.sleep(0.2)
            yield

    @contextlib.contextmanager
    def mlflow(self) -> Iterator[None]:
        """The tracking server; begins when the service's health check passes."""
        (self.folder / "mlflow").mkdir(exist_ok=True)
        auth = ROOT / "docker" / self.file["configs"]["auth"]["file"]
        (self.folder / "mlflow/auth.ini").write_text(self.local(auth.read_text()))
        check = self.services["mlflow"]["healthcheck"]["test"]
        assert check[:2] == ["CMD", "python"]
        with open(self.folder / "mlflow.log", "wb") as log:
            process = subprocess.Popen(
                self.command("mlflow"), cwd=self.folder, env=self.environment("mlflow"), stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        with ended(process, group=True):
            until = time.monotonic() + 180
            while subprocess.run(
                [sys.executable, *map(self.local, check[2:])], capture_output=True, timeout=30
            ).returncode:
                assert process.poll() is None and time.monotonic() < until, (self.folder / "mlflow.log").read_text()
                time.sleep(0.5)
            yield
