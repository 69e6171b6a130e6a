"""What a proof makes and deletes in Kubernetes: pods and a ConfigMap, all with its label."""

from __future__ import annotations

import json
from typing import Any

from pipelines.preflight.cluster import Cluster, NotAllowed
from runtime.errors import Refused, Unreachable

LABEL = "vgg.prove"  # on everything that a proof makes; value: its name
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
Object = dict[str, Any]


class Objects(Cluster):
    """As Cluster, with changes: objects of the core API in the namespace of the runs, by plural."""

    def __init__(self, namespace: str, context: str | None = None) -> None:
        super().__init__(namespace, context)
        self._answers: dict[tuple[str, str], bool] = {}

    @property
    def version(self) -> str:
        return str((self._get("/version") or {}).get("gitVersion", "unknown"))

    @property
    def address(self) -> str:
        return str(self._client.configuration.host)

    def may(self, verb: str, resource: str) -> bool:
        """Whether this user may; resource: a plural, or plural/subresource.  As `kubectl auth can-i`, asked once."""
        if (verb, resource) not in self._answers:
            plural, _, part = resource.partition("/")
            what = {"namespace": self.namespace, "verb": verb, "resource": plural, "subresource": part}
            body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
            answer = self._send("POST", REVIEWS, {**body, "spec": {"resourceAttributes": what}})
            self._answers[verb, resource] = bool((answer or {}).get("status", {}).get("allowed"))
        return self._answers[verb, resource]

    def create(self, plural: str, body: Object) -> None:
        """Raises Refused if there is one of that name, or the cluster does not admit it."""
        self._send("POST", self._path(plural), body)

    def delete(self, plural: str, name: str) -> bool:
        """Begin to delete it.  Returns whether it was there."""
        return self._send("DELETE", f"{self._path(plural)}/{name}") is not None

    def made_by(self, proof: str) -> list[Object]:
        """Its pods that are not steps of runs."""
        return self._pods(f"{LABEL}={proof}")

    def _path(self, plural: str) -> str:
        return f"/api/v1/namespaces/{self.namespace}/{plural}"

    def _send(self, method: str, path: str, body: Object | None = None) -> Object | None:
        """The answer; None for 404 and for a conflict of a deletion."""
        from kubernetes.client import ApiException

        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        try:
            return dict(json.loads(self._request(method, path, headers, body=body)))
        except ApiException as error:
            if method == "DELETE" and error.status in (404, 409):
                return None
            if error.status in (401, 403):
                raise NotAllowed(f"Kubernetes: {method} {path}: {_message(error)}") from None
            kind = Refused if 400 <= error.status < 500 else Unreachable
            raise kind(f"Kubernetes: {method} {path}: {error.status}: {_message(error)}") from None


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
