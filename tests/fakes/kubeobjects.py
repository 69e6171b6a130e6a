"""The objects of a Kubernetes cluster that a submission reads, over HTTP; and a container registry."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

TOKEN = "kubernetes-token"
TRAINER = "/apis/trainer.kubeflow.org/v1alpha1"


class Http:
    """A context manager that serves respond() on loopback."""

    def __init__(self) -> None:
        handler = type("Handler", (_Handler,), {"owner": self})
        self.seen: list[str] = []
        self.form: dict[str, str] = {}  # of the last request
        self.body = b""  # of the last request
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.host = f"127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> Any:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def respond(self, method: str, path: str, query: dict[str, str], headers: Any) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body."""
        raise NotImplementedError


class _Handler(BaseHTTPRequestHandler):
    owner: Http
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else 40 ms pass between headers and body, which are two writes

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def serve(self) -> None:
        address = urlsplit(self.path)
        self.owner.seen.append(f"{self.command} {address.path}")
        query = dict(parse_qsl(address.query))
        self.owner.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.owner.form = dict(parse_qsl(self.owner.body.decode()))
        status, headers, data = self.owner.respond(self.command, address.path, query, self.headers)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_DELETE = serve  # noqa: N815


class KubeObjects(Http):
    """objects: by path below /api/v1/namespaces/<namespace>/ (or absolute), as Kubernetes' JSON.

    forbidden: ends of paths that may not be read.
    """

    def __init__(self, namespace: str = "kubeflow") -> None:
        super().__init__()
        self.namespace, self.forbidden = namespace, set[str]()
        self.objects: dict[str, Any] = {"/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}}
        self.logs: dict[str, str] = {}

    def put(self, path: str, **content: Any) -> None:
        self.objects[path if path.startswith("/") else f"/api/v1/namespaces/{self.namespace}/{path}"] = content

    def complete(self) -> None:
        """Create everything that a run on two nodes with eight GPUs needs."""
        store = {"VGG_STORE": "/store", "MLFLOW_TRACKING_URI": "http://user:canary-in-uri@mlflow.invalid:5000"}
        self.put("configmaps/vgg-addresses", data=store)
        value = base64.b64encode(b"canary-of-a-secret").decode()
        self.put("secrets/vgg-store", data=dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), value))
        tracking = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
        self.put("secrets/vgg-tracking", data=dict.fromkeys(tracking, value))
        self.put("persistentvolumeclaims/vgg-store", spec={"accessModes": ["ReadWriteMany"]}, status={"phase": "Bound"})
        self.put(TRAINER, kind="APIResourceList", resources=[{"name": "trainjobs"}, {"name": "trainingruntimes"}])
        self.put(f"{TRAINER}/namespaces/{self.namespace}/trainingruntimes/vgg-train", metadata={"name": "vgg-train"})
        self.nodes(a={"gpus": 8}, b={"gpus": 8})

    def nodes(self, **nodes: dict[str, Any]) -> None:
        """Create nodes.  Of each: gpus, labels, taints, unschedulable, cpu, memory."""
        items = []
        for name, node in nodes.items():
            spec = {"unschedulable": node.get("unschedulable", False), "taints": node.get("taints", [])}
            status = {"allocatable": {"cpu": node.get("cpu", "64"), "memory": node.get("memory", "263856076Ki")}}
            status["allocatable"]["nvidia.com/gpu"] = str(node.get("gpus", 0))
            items.append({"metadata": {"name": name, "labels": node.get("labels", {})}, "spec": spec, "status": status})
        self.put("/api/v1/nodes", items=items)

    def kubeconfig(self, path: Path) -> Path:
        """Write it to a path."""
        named = {
            "clusters": [{"name": "test", "cluster": {"server": f"http://{self.host}"}}],
            "users": [{"name": "me", "user": {"token": TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "me"}}],
        }
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "test", **named}))
        return path

    def respond(self, method: str, path: str, query: dict[str, str], headers: Any) -> tuple[int, dict[str, str], bytes]:
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return self._status(401, "Unauthorized")
        if any(path.endswith(end) for end in self.forbidden):
            return self._status(403, f"cannot get {path}")
        if path.endswith("/log"):
            log = self.logs.get(path.split("/")[-2])
            return (200, {"Content-Type": "text/plain"}, log.encode()) if log else self._status(404, "not found")
        found = self.objects.get(path) or self._pod(path)
        if found is None or method != "GET":
            return self._status(404, f"{path} not found")
        if path.endswith("/pods"):
            key, _, value = query["labelSelector"].partition("=")
            items = [pod for pod in found["items"] if pod["metadata"]["labels"].get(key) == value]
            found = {**found, "items": items}
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def _pod(self, path: str) -> Any:
        """One pod of the list of pods."""
        folder, _, name = path.rpartition("/")
        items = self.objects.get(folder, {}).get("items", []) if folder.endswith("/pods") else []
        return next((pod for pod in items if pod["metadata"]["name"] == name), None)

    def _status(self, code: int, message: str) -> tuple[int, dict[str, str], bytes]:
        body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}
        return code, {"Content-Type": "application/json"}, json.dumps(body).encode()


class ImageRegistry(Http):
    """Manifests by name:tag, for clients with a token, which they get for a password.

    silent: sends no digests.  password: '' for anonymous access.
    """

    def __init__(self, password: str = "canary-of-a-password", silent: bool = False) -> None:
        super().__init__()
        self.password, self.silent = password, silent
        self.manifests: dict[str, bytes] = {}
        self.realm = f"http://{self.host}/token"

    def push(self, reference: str, content: str = "") -> str:
        """Add an image by its reference without a host; returns its reference by digest."""
        name, _, tag = reference.partition(":")
        data = json.dumps({"schemaVersion": 2, "image": content or reference}).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.manifests |= {f"{name}/{tag}": data, f"{name}/{digest}": data}
        return f"{self.host}/{name}@{digest}"

    def auth_file(self, path: Path) -> Path:
        """Write the file of docker login."""
        auth = base64.b64encode(f"me:{self.password}".encode()).decode()
        path.write_text(json.dumps({"auths": {self.host: {"auth": auth}}}))
        return path

    def respond(self, method: str, path: str, query: dict[str, str], headers: Any) -> tuple[int, dict[str, str], bytes]:
        shown = headers.get("Authorization", "")
        if path == "/token" and method == "POST":  # OAuth 2, with a refresh token
            wanted = {"grant_type": "refresh_token", "refresh_token": self.password, "service": "test"}
            if not wanted.items() <= self.form.items():
                return 401, {}, b"{}"
            return 200, {}, json.dumps({"access_token": f"for {self.form['scope']}"}).encode()
        if path == "/token":
            password = "Basic " + base64.b64encode(f"me:{self.password}".encode()).decode()
            if shown != password or query.get("service") != "test" or not query.get("scope", "").endswith(":pull"):
                return 401, {}, b"{}"
            return 200, {}, json.dumps({"token": f"for {query['scope']}"}).encode()
        name, _, tag = path.removeprefix("/v2/").partition("/manifests/")
        scope = f"repository:{name}:pull"
        if self.password and shown != f"Bearer for {scope}":
            realm = f'Bearer realm="{self.realm}",service="test",scope="{scope}"'
            return 401, {"WWW-Authenticate": realm}, b""
        data = self.manifests.get(f"{name}/{tag}")
        if data is None:
            return 404, {}, b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}'
        if "application/vnd.oci.image.index.v1+json" not in headers.get("Accept", ""):
            return 404, {}, b"an index is not accepted"
        said = {} if self.silent else {"Docker-Content-Digest": f"sha256:{hashlib.sha256(data).hexdigest()}"}
        return 200, said, data
