"""The HTTP side of tests/fakes/kubeserver.py: paths, watches and logs of a Kubernetes API server."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from kubeserver import KubeServer

Object = dict[str, Any]

NAMESPACE, TOKEN = "team", "a-token"
TRAINJOBS = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
JOBSETS = f"/apis/jobset.x-k8s.io/v1alpha2/namespaces/{NAMESPACE}/jobsets"
CORE = f"/api/v1/namespaces/{NAMESPACE}"
LIST = {"fieldSelector", "labelSelector", "watch", "resourceVersion", "timeoutSeconds"}
PARAMETERS = {
    ("GET", "trainjobs"): LIST, ("GET", "pods"): LIST, ("GET", "events"): LIST,
    ("GET", "jobsets"): set(),
    ("POST", "trainjobs"): {"fieldValidation"},
    ("DELETE", "trainjobs"): {"propagationPolicy"},
    ("GET", "pods/log"): {"container", "follow", "timestamps", "sinceTime", "tailLines"},
}  # fmt: skip


class Failure(Exception):
    """An error status."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        self.body = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
        self.body |= {"code": code, "reason": reason, "message": message}
        self.code = code


class Handler(BaseHTTPRequestHandler):
    server_state: KubeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        state, split = self.server_state, urlsplit(self.path)
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        query = dict(parse_qsl(split.query))
        try:
            if state.down:
                self.close_connection = True
                return
            plural, name = resource(split.path)
            verb = {"POST": "create", "DELETE": "delete"}.get(
                method, "watch" if "watch" in query else "get" if name else "list"
            )
            if not plural or not query.keys() <= PARAMETERS.get((method, plural), set()) - (
                {"watch"} if name else set()
            ):
                state.unknown.append(f"{method} {self.path}")
                raise Failure(404, "NotFound", "the server could not find the requested resource")
            state.requests[f"{verb} {plural}"] += 1
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Failure(401, "Unauthorized", "Unauthorized")
            if f"{verb} {plural}" in state.forbidden:
                who = f'User "system:serviceaccount:{NAMESPACE}:pipeline-runner"'
                raise Failure(
                    403, "Forbidden", f'{plural} is forbidden: {who} cannot {verb} resource "{plural}" in namespace'
                )
            if state.faults[f"{verb} {plural}"] > 0:
                state.faults[f"{verb} {plural}"] -= 1
                raise Failure(503, "ServiceUnavailable", "etcdserver: leader changed")
            if plural == "trainjobs" and not state.trainer:
                raise Failure(404, "NotFound", "the server could not find the requested resource")
            getattr(self, f"_{verb}")(plural, name, query, json.loads(data) if data else {})
        except Failure as failure:
            self._send(failure.code, failure.body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _send(self, code: int, body: Object) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _list(self, plural: str, _name: str, query: dict[str, str], _body: Object) -> None:
        state = self.server_state
        with state.changed:
            items = [copy.deepcopy(item) for item in state.objects[plural].values() if selected(item, query)]
            self._send(200, {"kind": "List", "metadata": {"resourceVersion": str(state.version)}, "items": items})

    def _get(self, plural: str, name: str, query: dict[str, str], _body: Object) -> None:
        if plural == "pods/log":
            self._log(name, query)
            return
        item = self.server_state.objects[plural].get(name)
        if item is None:
            raise Failure(404, "NotFound", f'{plural} "{name}" not found')
        self._send(200, item)

    def _create(self, plural: str, _name: str, query: dict[str, str], body: Object) -> None:
        state = self.server_state
        state.admit(body, query.get("fieldValidation", ""))
        with state.changed:
            if body["metadata"]["name"] in state.objects[plural]:
                raise Failure(409, "AlreadyExists", f'trainjobs "{body["metadata"]["name"]}" already exists')
            made = state.make(body)
        self._send(201, made)

    def _delete(self, plural: str, name: str, query: dict[str, str], _body: Object) -> None:
        state = self.server_state
        if name not in state.objects[plural]:
            raise Failure(404, "NotFound", f'{plural} "{name}" not found')
        self._send(200, state.begin_deletion(name, query["propagationPolicy"]))

    def _watch(self, plural: str, _name: str, query: dict[str, str], _body: Object) -> None:
        state, since = self.server_state, int(query["resourceVersion"])
        until = time.monotonic() + int(query["timeoutSeconds"])
        with self._chunks() as send:
            if since < state.oldest:
                gone = Failure(410, "Expired", f"too old resource version: {since} ({state.oldest})").body
                send(json.dumps({"type": "ERROR", "object": gone}) + "\n")
                return
            cuts = state.cut_watches
            while time.monotonic() < until:
                with state.changed:
                    new = [change for change in state.changes if change[0] > since]
                    if not new and cuts == state.cut_watches:
                        state.changed.wait(0.5)
                if cuts != state.cut_watches:
                    raise BrokenPipeError
                for version, changed, kind, item in new:
                    since = version
                    if changed == plural and selected(item, query):
                        send(json.dumps({"type": kind, "object": item}) + "\n")

    def _log(self, name: str, query: dict[str, str]) -> None:
        state = self.server_state
        log, pod = state.logs.get(name), state.objects["pods"].get(name)
        if log is None or pod is None:
            raise Failure(404, "NotFound", f'pods "{name}" not found')
        if pod["status"]["phase"] == "Pending" or query.get("container") != "node":
            raise Failure(400, "BadRequest", f'container "node" in pod "{name}" is waiting to start: ContainerCreating')
        since = query.get("sinceTime", "")
        with state.changed:  # sinceTime is in whole seconds
            first = next((n for n, (at, _) in enumerate(log.lines) if stamp(at)[:19] >= since[:19]), len(log.lines))
        if "tailLines" in query:
            first = max(first, len(log.lines) - int(query["tailLines"]))
        cuts = state.cut_watches
        with self._chunks() as send:
            while True:
                with state.changed:
                    new, ended = log.lines[first:], log.ended
                    if not new and not ended:
                        state.changed.wait(0.5)
                for at, line in new:
                    first += 1
                    if state.cut_log_after == 0:
                        state.cut_log_after = -1
                        send(f"{stamp(at)} {line[: len(line) // 2]}")
                        raise BrokenPipeError
                    state.cut_log_after -= state.cut_log_after > 0
                    send(f"{stamp(at)} {line}\n")
                if cuts != state.cut_watches:
                    raise BrokenPipeError
                if (not new and ended) or (query.get("follow") != "true" and first >= len(log.lines)):
                    return

    @contextmanager
    def _chunks(self) -> Iterator[Callable[[str], None]]:
        """A body of unknown length; its end is not sent if an exception is raised inside."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

        def send(text: str) -> None:
            data = text.encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        yield send
        self.wfile.write(b"0\r\n\r\n")


def resource(path: str) -> tuple[str, str]:
    """Plural and name of a path, '' for any other path."""
    if match := re.fullmatch(f"{re.escape(TRAINJOBS)}(?:/([^/]+))?", path):
        return "trainjobs", match[1] or ""
    if match := re.fullmatch(f"{re.escape(JOBSETS)}/([^/]+)", path):
        return "jobsets", match[1]
    if match := re.fullmatch(f"{re.escape(CORE)}/pods/([^/]+)/log", path):
        return "pods/log", match[1]
    if match := re.fullmatch(f"{re.escape(CORE)}/(pods|events)(?:/([^/]+))?", path):
        return match[1], match[2] or ""
    return "", ""


def selected(item: Object, query: dict[str, str]) -> bool:
    for selector, values in (("fieldSelector", None), ("labelSelector", item["metadata"].get("labels", {}))):
        for pair in filter(None, query.get(selector, "").split(",")):
            key, value = pair.split("=")
            if selector == "fieldSelector" and key != "metadata.name":
                raise Failure(400, "BadRequest", f"field label not supported: {key}")
            if (item["metadata"]["name"] if values is None else values.get(key)) != value:
                return False
    return True


def stamp(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.%f") + "123Z"
