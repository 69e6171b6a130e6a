"""Real MLflow servers on loopback, and a reverse proxy as companies put in front of them."""

from __future__ import annotations

import datetime
import http.client
import ipaddress
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from conftest import environment
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from ending import ended
from ports import free_port

START_SECONDS = 60


@contextmanager
def mlflow_server(folder: Path, database: Path, *options: str, **env: str) -> Iterator[str]:
    """Run `mlflow server` with these options on a copy of the database; gives its address, without a prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "server.db").write_bytes(database.read_bytes())
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/server.db", *options,
    ]  # fmt: skip
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", **env),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    with ended(process, group=True):
        deadline = time.monotonic() + START_SECONDS
        while not answers(port):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status in (200, 404)
    except OSError:
        return False
    finally:
        connection.close()


class Front:
    """A reverse proxy, as a context manager that gives itself.

    path: prefix of its own that it removes.  token: the bearer token that it demands.  host: the Host header that it
    sends on.  instead: gives (status, headers, body) for a path; it then answers everything itself.
    certificate: (certificate, key) files for TLS.  seconds_for_files: how late it answers for a file.
    """

    def __init__(
        self,
        upstream: str = "",
        path: str = "",
        token: str = "",
        host: str = "",
        instead: Callable[[str], tuple[int, dict[str, str], str]] | None = None,
        certificate: tuple[Path, Path] | None = None,
        seconds_for_files: float = 0.0,
    ) -> None:
        self.seconds_for_files = seconds_for_files
        self.upstream, self.path, self.token, self.host, self.instead = upstream, path, token, host, instead
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"front": self}))
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.address = f"http{'s' if certificate else ''}://127.0.0.1:{self.server.server_port}{path}"
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that refuse the certificate

    def __enter__(self) -> Front:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    front: Front

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def forward(self) -> None:
        front, body = self.front, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if front.instead:
            status, headers, text = front.instead(self.path)
            return self.answer(status, headers, text.encode())
        if front.token and self.headers.get("Authorization") != f"Bearer {front.token}":
            return self.answer(401, {"WWW-Authenticate": "Bearer"}, b"<html><h1>Unauthorized</h1></html>")
        if not self.path.startswith(front.path):
            return self.answer(404, {}, b"<html><title>404</title><h1>nginx: not found</h1></html>")
        if "/mlflow-artifacts/artifacts/" in self.path:
            time.sleep(front.seconds_for_files)
        parts = urlsplit(front.upstream)
        connection = http.client.HTTPConnection(parts.netloc, timeout=30)
        sent = dict(self.headers) | {"Host": front.host or parts.netloc}
        connection.request(self.command, parts.path + self.path.removeprefix(front.path), body, sent)
        received = connection.getresponse()
        data = received.read()
        kind = received.getheader("Content-Type", "application/octet-stream")
        connection.close()
        return self.answer(received.status, {"Content-Type": kind}, data)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = do_PATCH = forward  # noqa: N815

    def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "text/html", **headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def private_authority(folder: Path) -> tuple[Path, tuple[Path, Path]]:
    """A certificate authority of a company: its file, and (certificate, key) of a server on 127.0.0.1."""
    now = datetime.datetime.now(datetime.UTC)
    names = {}
    for who in ("authority", "server"):
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"the company's {who}")])
        issuer, signer = names.get("authority", (name, key))
        builder = (
            x509.CertificateBuilder()
            .subject_name(name).issuer_name(issuer).public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=who == "authority", path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )  # fmt: skip
        if who == "server":
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        certificate = builder.sign(signer, hashes.SHA256())
        names[who] = (name, key)
        (folder / f"{who}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{who}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    return folder / "authority.pem", (folder / "server.pem", folder / "server.key")
