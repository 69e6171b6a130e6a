"""Read access to Kubernetes: objects in the namespace of the runs, and nodes."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
from typing import Any

from runtime import environment
from runtime.errors import Unreachable

TIMEOUT = (5, 20)  # seconds to connect, and of silence


class NotAllowed(Exception):
    """The submitter has no permission to read something."""


class Cluster:
    """Objects as the dicts of Kubernetes' own JSON; None for one that does not exist.

    Every method raises NotAllowed without permission, and Unreachable if the cluster does not answer.
    """

    def __init__(self, namespace: str, context: str | None = None) -> None:
        """With kubeconfig, or as a pod.  Raises Unreachable without access."""
        from kubernetes import client, config

        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it logs every retry
        self.namespace = namespace
        configuration = client.Configuration()
        try:
            try:
                if context:
                    raise config.ConfigException
                config.load_incluster_config(client_configuration=configuration)
            except config.ConfigException:
                # the library reads $KUBECONFIG only on import
                path = environment.KUBECONFIG.get() or None
                config.load_kube_config(path, context, client_configuration=configuration)
        except (config.ConfigException, OSError) as error:
            raise Unreachable(f"no Kubernetes access: {' '.join(str(error).split())[:200]}") from None
        configuration.retries = 1
        self._client = client.ApiClient(configuration)
        try:
            self._get("/version")  # allowed for everybody with access
        except NotAllowed as reason:
            raise Unreachable(f"no Kubernetes access: {reason}") from None

    def config_map(self, name: str) -> dict[str, str] | None:
        found = self._get(f"/api/v1/namespaces/{self.namespace}/configmaps/{name}")
        return None if found is None else dict(found.get("data") or {})

    def secret_keys(self, name: str) -> set[str] | None:
        """The keys with a value.  The values are not kept."""
        found = self._get(f"/api/v1/namespaces/{self.namespace}/secrets/{name}")
        if found is None:
            return None
        filled = set()
        for key, value in (found.get("data") or {}).items():
            with contextlib.suppress(ValueError):
                if base64.b64decode(value).strip():
                    filled.add(key)
        return filled

    def claim(self, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._get(f"/api/v1/namespaces/{self.namespace}/persistentvolumeclaims/{name}")
        return found

    def serves(self, group: str, version: str, resource: str) -> bool:
        found = self._get(f"/apis/{group}/{version}")
        return any(served["name"] == resource for served in (found or {}).get("resources", []))

    def has(self, group: str, version: str, resource: str, name: str) -> bool:
        """Whether an object of a custom resource exists."""
        return self._get(f"/apis/{group}/{version}/namespaces/{self.namespace}/{resource}/{name}") is not None

    def nodes(self) -> list[dict[str, Any]]:
        return list((self._get("/api/v1/nodes") or {}).get("items", []))

    def pods(self, run_id: str) -> list[dict[str, Any]]:
        """Of the steps of a pipeline run."""
        return self._pods(f"pipeline/runid={run_id}")

    def training_pods(self, run_id: str) -> list[dict[str, Any]]:
        """The nodes of a run's TrainJob."""
        return self._pods(f"vgg.pipeline-run={run_id}")

    def _pods(self, selector: str) -> list[dict[str, Any]]:
        query = [("labelSelector", selector)]
        return list((self._get(f"/api/v1/namespaces/{self.namespace}/pods", query) or {}).get("items", []))

    def pod(self, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._get(f"/api/v1/namespaces/{self.namespace}/pods/{name}")
        return found

    def pod_log(self, name: str, lines: int | None = None) -> str | None:
        """Of its container main: the last lines, or all."""
        query = [("container", "main"), *([("tailLines", str(lines))] if lines else [])]
        data = self._raw(f"/api/v1/namespaces/{self.namespace}/pods/{name}/log", query)
        return None if data is None else data.decode("utf-8", "replace")

    def _get(self, path: str, query: list[tuple[str, str]] | None = None) -> Any:
        data = self._raw(path, query or [])
        return None if data is None else json.loads(data)

    def _raw(self, path: str, query: list[tuple[str, str]]) -> bytes | None:
        from kubernetes.client import ApiException

        try:
            return self._request("GET", path, {"Accept": "*/*"}, query_params=query)
        except ApiException as error:
            if error.status == 404:
                return None
            if error.status in (401, 403):
                raise NotAllowed(f"no permission to read {path} in Kubernetes ({error.status})") from None
            raise Unreachable(f"Kubernetes answers {error.status} to {path}") from None

    def _request(self, method: str, path: str, headers: dict[str, str], **more: Any) -> bytes:
        """The answer as it is.  Raises the library's ApiException for a status that is no success."""
        from urllib3.exceptions import HTTPError

        more |= {"header_params": headers, "auth_settings": ["BearerToken"], "_preload_content": False}
        try:
            answer = self._client.call_api(path, method, _request_timeout=TIMEOUT, **more)
        except (HTTPError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise Unreachable(f"no Kubernetes access: {self._client.configuration.host}: {reason}") from None
        return bytes((answer[0] if isinstance(answer, tuple) else answer).data)
