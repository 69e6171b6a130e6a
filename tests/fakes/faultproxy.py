"""A proxy in front of an S3 or MLflow server that injects faults of networks and stores, reproducible by a seed.

unavailable   503 instead of an answer          short   half of the body, then the connection is closed
reset         the connection is reset           flip    one bit of a body is changed
stall         no answer within the timeout      late    a write is applied and answered with 500
spoil         one bit of an upload is changed   unknown conditional writes are answered with 501
Only if asked for, since they fit every request:
applied       applied and answered with 500     dropped applied, and the connection closed without an answer
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

KINDS = ("unavailable", "reset", "stall", "short", "flip", "late", "spoil")
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}


@dataclass(frozen=True)
class Seen:
    """A request."""

    method: str
    path: str
    headers: Mapping[str, str]


class FaultProxy:
    """A context manager.  probability: of a fault, per request.  kinds: of faults.  writes: methods of `late`.

    Path-style addresses only: the Host header is passed on unchanged, since it is part of the signature.
    """

    def __init__(
        self, upstream: str, seed: int = 0, probability: float = 0.0, kinds: tuple[str, ...] = KINDS, stall: float = 10,
        writes: tuple[str, ...] = ("PUT", "DELETE"),
    ) -> None:  # fmt: skip
        self.writes = writes
        self.upstream, self.seed, self.probability, self.kinds, self.stall = upstream, seed, probability, kinds, stall
        self.injected: Counter[str] = Counter()
        self.seen: list[Seen] = []
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    def draw(self, seen: Seen) -> tuple[str, random.Random]:
        """The fault of this request, '' for none; a function of seed and number of the request."""
        with self.lock:
            self.seen.append(seen)
            chance = random.Random(f"{self.seed}:{len(self.seen)}")
            if chance.random() >= self.probability:
                return "", chance
            # a listing has no checksum, so a changed byte in it cannot be noticed
            is_object, reads = "?" not in seen.path, seen.method == "GET"
            fits = {
                "late": seen.method in self.writes,
                "short": reads,
                "flip": reads and is_object,
                "spoil": seen.method == "PUT",
                "unknown": seen.method == "PUT" and bool({"If-Match", "If-None-Match"} & set(seen.headers)),
            }
            possible = [kind for kind in self.kinds if fits.get(kind, True)]
            fault = chance.choice(possible) if possible else ""
            self.injected[fault] += 1
            return fault, chance


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault, chance = self.proxy.draw(Seen(self.command, self.path, dict(self.headers)))
        if fault == "stall":
            self.proxy.stopped.wait(self.proxy.stall)
        if fault == "reset":
            # a linger time of 0 makes close() send RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if fault in ("stall", "reset"):
            self.close_connection = True
        elif fault in ("unavailable", "unknown"):
            self.answer(503 if fault == "unavailable" else 501, [], b"")
        else:
            status, headers, data = self.ask(_flipped(body, chance) if fault == "spoil" else body)
            if fault == "late":
                self.answer(500, [], b"")
            elif fault == "applied":
                self.answer(500, [], b"lost")
            elif fault == "dropped":
                self.close_connection = True
            elif fault == "flip" and status < 300:
                self.answer(status, headers, _flipped(data, chance))
            elif fault == "short" and data:
                self.answer(status, headers, data[: len(data) // 2], len(data))
                self.close_connection = True
            else:
                self.answer(status, headers, data)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = do_PATCH = forward  # noqa: N815

    def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.proxy.upstream).netloc, timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, promised: int | None = None) -> None:
        """promised: the Content-Length, if not that of the data."""
        length = str(len(data) if promised is None else promised)
        if self.command == "HEAD":
            length = next((value for name, value in headers if name.lower() == "content-length"), length)
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data)


def _flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    if changed:
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)
