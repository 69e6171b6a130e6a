"""A fake of Kubeflow Pipelines' API over real HTTP: the part that our client and kfp.Client use.

Routes, queries, bodies and answers are those of server 2.17.0: from its sources and from requests of the real client.
It is strict: an unknown route, query parameter or field is recorded in `surprises`, which a test must keep empty.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from kfprules import NotInApi, Wrong
from kfpstate import Ask, Frame, KfpState

__all__ = ["Fault", "Frame", "KfpServer"]

PAGE = {"page_token", "page_size", "sort_by", "filter"}
V1, V2 = "/apis/v1beta1", "/apis/v2beta1"
ROUTES: list[tuple[str, str, Callable[[KfpState, Ask], Any], set[str]]] = [  # with the query parameters of each
    ("GET", f"{V2}/healthz", KfpState.healthz, set()),
    ("GET", f"{V2}/experiments", KfpState.list_experiments, PAGE | {"namespace"}),
    ("POST", f"{V2}/experiments", KfpState.create_experiment, set()),
    ("GET", f"{V2}/pipelines/names/([^/]+)", KfpState.pipeline_by_name, {"namespace"}),
    ("GET", f"{V2}/pipelines", KfpState.list_pipelines, PAGE | {"namespace"}),
    ("POST", f"{V2}/pipelines", KfpState.create_pipeline, set()),
    ("POST", f"{V2}/pipelines/upload", KfpState.upload_pipeline, {"name", "description", "namespace"}),
    ("POST", f"{V2}/pipelines/upload_version", KfpState.upload_version, {"name", "description", "pipelineid"}),
    ("GET", f"{V2}/pipelines/([^/]+)/versions", KfpState.list_versions, PAGE),
    ("POST", f"{V2}/runs", KfpState.create_run, set()),
    ("GET", f"{V2}/runs", KfpState.list_runs, PAGE | {"experiment_id", "namespace"}),
    ("GET", f"{V2}/runs/([^/:]+)", KfpState.get_run, set()),
    ("DELETE", f"{V2}/runs/([^/:]+)", KfpState.delete_run, set()),
    ("POST", f"{V2}/runs/([^/:]+):terminate", KfpState.terminate_run, set()),
    ("DELETE", f"{V2}/experiments/([^/]+)", KfpState.delete_experiment, set()),
    ("DELETE", f"{V2}/pipelines/([^/]+)/versions/([^/]+)", KfpState.delete_version, set()),
    ("DELETE", f"{V2}/pipelines/([^/]+)", KfpState.delete_pipeline, set()),
    ("POST", f"{V2}/runs/([^/:]+):retry", KfpState.retry_run, set()),
    ("POST", f"{V2}/runs/([^/:]+):terminate", KfpState.terminate_run, set()),
    ("POST", f"{V2}/recurringruns", KfpState.create_recurring, set()),
    ("GET", f"{V2}/recurringruns", KfpState.list_recurring, PAGE | {"experiment_id", "namespace"}),
    ("GET", f"{V1}/runs/([^/:]+)", KfpState.run_v1, set()),
    ("GET", "/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log", KfpState.read_log, set()),
]


@dataclass
class Fault:
    """Replaces an answer, `times` times: an HTTP status, or 'late' (applied, then 500), or 'reset'."""

    method: str
    path: str
    kind: int | str
    times: int = 1


@dataclass
class KfpServer(KfpState):
    """A context manager.  token, cookie: required of a request.  login: redirect without them."""

    token: str = ""
    cookie: str = ""
    login: str = ""
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seen: list[str] = []  # GET /runs/…, without /apis/<version>
        self.surprises: list[str] = []
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"kfp": self}))
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> KfpServer:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fault(self, method: str, path: str) -> int | str | None:
        """The fault for this request, if any."""
        for one in self.faults:
            if one.times and one.method == method and re.search(one.path, path):
                one.times -= 1
                return one.kind
        return None

    def respond(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        """Raises Wrong."""
        for served, pattern, serve, known in ROUTES:
            if served == method and (match := re.fullmatch(pattern, path)):
                if unknown := set(query) - known:
                    self.surprises.append(f"{method} {path}: {', '.join(sorted(unknown))}")
                    raise Wrong(3, f"unknown query parameters: {unknown}")
                try:
                    return serve(self, Ask(match.groups(), query, body))
                except NotInApi as wrong:
                    self.surprises.append(f"{method} {path}: {wrong}")
                    raise
        self.surprises.append(f"{method} {path}")
        raise Wrong(5, "Not Found")


class _Handler(BaseHTTPRequestHandler):
    kfp: KfpServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, else 40 ms apart

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        with self.kfp.lock:
            self.kfp.seen.append(f"{self.command} {re.sub(r'^/apis/[^/]+', '', address.path)}")
            fault = self.kfp.fault(self.command, address.path)
            if fault == "reset":
                self.close_connection = True
            elif isinstance(fault, int):
                self.answer(fault, {"code": 14, "message": "upstream connect error"})
            else:
                self.respond(address.path, dict(parse_qsl(address.query)), body, late=fault == "late")

    do_GET = do_POST = do_DELETE = serve  # noqa: N815

    def respond(self, path: str, query: dict[str, str], body: bytes, late: bool) -> None:
        kfp = self.kfp
        try:
            if kfp.token and self.headers.get("authorization") != f"Bearer {kfp.token}":
                raise Wrong(16, f"Request header error: {self.headers.get('authorization')} is not a valid token")
            if kfp.cookie and self.headers.get("Cookie") != kfp.cookie and not kfp.login:
                # some proxies repeat the cookie
                raise Wrong(7, f"RBAC: access denied to {self.headers.get('Cookie')}")
            if kfp.cookie and self.headers.get("Cookie") != kfp.cookie:
                self.answer(302, "", {"Location": kfp.login})
                return
            answer = kfp.respond(self.command, path, query, self.content(body))
        except Wrong as wrong:
            self.answer(wrong.status, wrong.body())
            return
        if late:
            self.answer(500, {"code": 13, "message": "connection to the database was lost"})
        else:
            self.answer(200, answer)

    def content(self, body: bytes) -> Any:
        """JSON, or the only file of a form."""
        kind = self.headers.get("Content-Type", "")
        if not kind.startswith("multipart/form-data"):
            return json.loads(body) if body else None
        (part,) = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + body).get_payload()
        if part.get_param("name", header="content-disposition") != "uploadfile":
            raise Wrong(3, "Failed to read pipeline from file: unknown field of the form")
        return part.get_payload(decode=True)

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        if isinstance(content, dict):  # protojson omits empty fields
            content = {name: value for name, value in content.items() if value not in ([], "", 0)}
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        kind = "text/plain" if isinstance(content, str) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
