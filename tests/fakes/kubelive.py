"""A Kubernetes API server in which pods and ConfigMaps are made and deleted; a test takes the role of the kubelet.

Strict: pods keep to the published schemas and to the rules of security.manifests; any other path or verb is recorded
in `surprises`.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from kubeobjects import TOKEN, KubeObjects

from security.manifests import faults

REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
FIRST = datetime(2026, 11, 28, tzinfo=UTC)
Object = dict[str, Any]


class LiveObjects(KubeObjects):
    """denied: "verb resource" that this user may not.  created, deleted: told of pods.  look: called before a read."""

    def __init__(self, namespace: str = "kubeflow") -> None:
        super().__init__(namespace)
        self.pods: dict[str, Object] = {}
        self.denied: set[str] = set()
        self.surprises: list[str] = []
        self.made: list[str] = []  # kind/name of everything that was created through the API
        self.created: Callable[[Object], None] = lambda pod: None
        self.deleted: Callable[[Object], None] = lambda pod: None
        self.look: Callable[[], None] = lambda: None
        self.lock = threading.RLock()
        self._count = 0

    def add(self, name: str, phase: str, labels: dict[str, str], **status: Any) -> Object:
        """A pod that a controller makes."""
        self._count += 1
        stamp = f"{FIRST + timedelta(seconds=self._count):%Y-%m-%dT%H:%M:%SZ}"
        metadata = {"name": name, "labels": labels, "uid": str(uuid.uuid4()), "creationTimestamp": stamp}
        self.pods[name] = {"metadata": metadata, "spec": {}, "status": {"phase": phase, **status}}
        return self.pods[name]

    def config_maps(self) -> dict[str, Object]:
        start = f"/api/v1/namespaces/{self.namespace}/configmaps/"
        return {path.removeprefix(start): one for path, one in self.objects.items() if path.startswith(start)}

    def respond(self, method: str, path: str, query: dict[str, str], headers: Any) -> tuple[int, dict[str, str], bytes]:
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return super().respond(method, path, query, headers)
        with self.lock:
            body = json.loads(self.body) if self.body else {}
            if path == REVIEWS and method == "POST":
                what = body["spec"]["resourceAttributes"]
                resource = "/".join(filter(None, (what["resource"], what.get("subresource"))))
                allowed = what["namespace"] == self.namespace and f"{what['verb']} {resource}" not in self.denied
                return self._json(201, {**body, "status": {"allowed": allowed}})
            match = re.fullmatch(rf"/api/v1/namespaces/{self.namespace}/(pods|configmaps)(?:/([^/]+))?(/log)?", path)
            if not match:
                if method != "GET":
                    self.surprises.append(f"{method} {path}")
                return super().respond(method, path, query, headers)
            plural, name, log = match[1], match[2] or "", bool(match[3])
            verb = {"GET": "get" if name else "list", "POST": "create", "DELETE": "delete"}[method]
            if f"{verb} {plural}{'/log' * log}" in self.denied:
                return self._status(403, f"{plural} is forbidden: User me cannot {verb} resource {plural}")
            if verb == "create":
                return self._create(plural, body, path)
            if verb == "delete":
                return self._delete(plural, name, path)
            if plural == "configmaps":
                return super().respond(method, path, query, headers)
            return self._pods(name, log, query)

    def _create(self, plural: str, body: Object, path: str) -> tuple[int, dict[str, str], bytes]:
        name = body["metadata"]["name"]
        wrong = faults({**body, "metadata": {"namespace": self.namespace, **body["metadata"]}})
        if wrong or not re.fullmatch("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
            self.surprises.append(f"{name}: {wrong}")
            return self._status(422, f"invalid: {wrong}")
        if name in self.pods or f"{path}/{name}" in self.objects:
            return self._status(409, f'{plural} "{name}" already exists')
        self.made.append(f"{plural}/{name}")
        if plural == "configmaps":
            self.objects[f"{path}/{name}"] = body
        else:
            made = self.add(name, "Pending", body["metadata"]["labels"])
            made["spec"] = body["spec"]
            self.created(made)
        return self._json(201, body)

    def _delete(self, plural: str, name: str, path: str) -> tuple[int, dict[str, str], bytes]:
        found = self.pods.pop(name, None) if plural == "pods" else self.objects.pop(path, None)
        if found is None:
            return self._status(404, f'{plural} "{name}" not found')
        if plural == "pods":
            self.deleted(found)
        return self._json(200, found)

    def _pods(self, name: str, log: bool, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        self.look()
        if not name:
            key, _, value = query["labelSelector"].partition("=")
            found = [pod for pod in self.pods.values() if pod["metadata"]["labels"].get(key) == value]
            return self._json(200, {"kind": "PodList", "items": found})
        pod = self.pods.get(name)
        if pod is None:
            return self._status(404, f'pods "{name}" not found')
        if not log:
            return self._json(200, pod)
        if pod["status"]["phase"] == "Pending":
            return self._status(400, f'container "main" in pod "{name}" is waiting to start: ContainerCreating')
        return 200, {"Content-Type": "text/plain"}, self.logs.get(name, "").encode()

    @staticmethod
    def _json(code: int, body: Object) -> tuple[int, dict[str, str], bytes]:
        return code, {"Content-Type": "application/json"}, json.dumps(body).encode()
