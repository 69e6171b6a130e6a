"""The part of the Kubernetes API that the training step uses: requests with retries, watches, refusals explained."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client import ApiException
from kubernetes.watch import Watch
from urllib3.exceptions import HTTPError

from components.trainjob.body import GROUP, PLURAL, VERSION
from runtime import environment
from runtime.errors import Problem, Refused, Unreachable, WrongParameters
from runtime.retry import Outage, Retry

log = logging.getLogger("vgg.cluster")

Object = dict[str, Any]  # parsed JSON

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
TIMEOUT = (10, 30)  # seconds: to connect, and between two bytes
WATCH_SECONDS = 60  # after which a watch is opened again, because a dead connection may go unnoticed
QUIET_SECONDS = 2.0  # between two watches at least: those of a server that shuts down end at once
EXPIRED = 410  # the status of a watch whose resource version is too old
EXPIRED_SECONDS = 1.0  # before listing again

# Refusals that share their status with others, so that only the text tells them apart.
# tests/components/test_trainjob.py has the whole messages with their sources.
TEXTS = {
    # 403, kube-apiserver, written for any authorizer.  Quotas and admission webhooks answer 403 with other texts.
    "not authorized": re.compile(r'User ".*" cannot \S+ (resource|path) '),
    # 400, kube-apiserver with strict field validation (stable in 1.27), if the CRD is that of Trainer 2.0 or 2.1
    "no runtimePatches": re.compile(r'unknown field "spec\.runtimePatches'),
    # 403 or 422, validating webhook of Trainer 2.0.0-2.3.0
    "no runtime": re.compile(r"must be created before the TrainJob"),
}


class Cluster:
    """A namespace of a cluster.  Thread-safe.  patience: seconds without an answer after which a request fails."""

    def __init__(self, configuration: client.Configuration, namespace: str) -> None:
        configuration.retries = False
        self.namespace = namespace
        self.api = client.ApiClient(configuration)
        self.core, self.objects = client.CoreV1Api(self.api), client.CustomObjectsApi(self.api)
        self.patience = environment.KUBERNETES_PATIENCE_SECONDS.get()
        self._outage = Outage("the Kubernetes API", log, TIMEOUT[1])

    # -- TrainJobs

    def trainjob(self, name: str) -> Object | None:
        call = self.objects.get_namespaced_custom_object
        found: Object | None = self.ask("get trainjobs", call, *self._plural, name, absent=(404,))
        return found

    def create(self, body: Object) -> Object | None:
        """None if one of that name exists."""
        call = self.objects.create_namespaced_custom_object
        made: Object | None = self.ask(
            "create trainjobs", call, *self._plural, body, field_validation="Strict", absent=(409,)
        )
        return made

    def delete(self, name: str) -> None:
        """Start to delete a TrainJob, if it exists: it is gone when its pods are."""
        self.ask(
            "delete trainjobs", self.objects.delete_namespaced_custom_object, *self._plural, name,
            propagation_policy="Foreground", absent=(404, 409),
        )  # fmt: skip

    def pod_owners(self, name: str) -> list[Object]:
        """The owners of a pod in this namespace; none if it does not exist."""
        answer = self.ask(
            "get pods", self.core.read_namespaced_pod, name, self.namespace, _preload_content=False, absent=(404,)
        )
        return list(json.loads(answer.data)["metadata"].get("ownerReferences") or []) if answer else []

    @property
    def _plural(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.namespace, PLURAL

    # -- watches: each yields all objects by their uid, now and after every change

    def trainjobs(self, name: str) -> Iterator[dict[str, Object]]:
        call, (group, version, namespace, plural) = self.objects.list_namespaced_custom_object, self._plural
        where = {"group": group, "version": version, "namespace": namespace, "plural": plural}
        return self._watched("trainjobs", call, **where, field_selector=f"metadata.name={name}")

    def pods(self, trainjob: str) -> Iterator[dict[str, Object]]:
        selector = f"jobset.sigs.k8s.io/jobset-name={trainjob}"  # a TrainJob's JobSet has its name
        return self._watched("pods", self.core.list_namespaced_pod, namespace=self.namespace, label_selector=selector)

    def events(self) -> Iterator[dict[str, Object]]:
        return self._watched("events", self.core.list_namespaced_event, namespace=self.namespace)

    def _watched(self, what: str, call: Callable[..., Any], **where: Any) -> Iterator[dict[str, Object]]:
        """Raises Refused, and Unreachable when the API has not answered for too long."""
        while True:
            answer = self.ask(f"list {what}", call, **where, _preload_content=False)
            listed = json.loads(answer.data)
            found = {item["metadata"]["uid"]: item for item in listed["items"]}
            yield dict(found)
            for change, item in self._changes(what, call, where, listed["metadata"]["resourceVersion"]):
                if change == "DELETED":
                    found.pop(item["metadata"]["uid"], None)
                else:
                    found[item["metadata"]["uid"]] = item
                yield dict(found)

    def _changes(
        self, what: str, call: Callable[..., Any], where: dict[str, Any], version: str
    ) -> Iterator[tuple[str, Object]]:
        """All changes since a version, over any number of connections.  Ends when the version is too old."""
        limits = {"timeout_seconds": WATCH_SECONDS, "_request_timeout": (TIMEOUT[0], WATCH_SECONDS + TIMEOUT[1])}
        retry = self.operation(f"watch {what}")
        while True:
            began = time.monotonic()
            try:
                for event in Watch("object").stream(call, **where, **limits, resource_version=version):
                    retry.progress()
                    item = event["raw_object"]
                    version = item["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        yield event["type"], item
                retry.progress()
            except ApiErrors.errors as error:
                if isinstance(error, ApiException) and error.status == EXPIRED:
                    time.sleep(EXPIRED_SECONDS)
                    return
                retry.failed(error)
            time.sleep(max(0.0, QUIET_SECONDS - (time.monotonic() - began)))

    # -- requests

    def ask(self, what: str, call: Callable[..., Any], *args: Any, absent: tuple[int, ...] = (), **kwargs: Any) -> Any:
        """The answer of a request, repeated as needed; None for a status in `absent`.

        Raises Refused or WrongParameters with the reason of a refusal, Unreachable.
        """

        def request() -> Any:
            try:
                return call(*args, **kwargs, _request_timeout=TIMEOUT)
            except ApiException as error:
                if error.status in absent:
                    return None
                raise

        return self.operation(what).call(request)

    def operation(self, what: str) -> Retry:
        """A retry of one operation.  what: verb and resource, for messages."""
        return Retry(ApiErrors(what, self.namespace), self.patience, self._outage)


class ApiErrors:
    """A runtime.retry.Classifier."""

    errors: tuple[type[Exception], ...] = (ApiException, HTTPError, OSError)

    def __init__(self, what: str, namespace: str) -> None:
        self.what, self.namespace = what, namespace

    def is_temporary(self, error: Exception) -> bool:
        # status 0: no HTTP answer
        return not isinstance(error, ApiException) or error.status in (0, 408, 429) or error.status >= 500

    def refusal(self, error: Exception) -> Problem:
        return explain(error, self.what, self.namespace)

    def gave_up(self, error: Exception, seconds: float) -> Problem:
        return Unreachable(
            f"the Kubernetes API has not answered for {seconds:.0f} s ({self.brief(error)}). A TrainJob that exists "
            "continues; run again to follow it."
        )

    def brief(self, error: Exception) -> str:
        return f"{self.what}: {brief(error)}"


def connect() -> Cluster:
    """The cluster of KUBECONFIG if that is set, else the one this pod runs in.  Raises WrongParameters."""
    configuration = client.Configuration()
    try:
        if environment.KUBECONFIG.get():
            config.load_kube_config(client_configuration=configuration)
            context = config.list_kube_config_contexts()[1]["context"]
            return Cluster(configuration, context.get("namespace", "default"))
        config.load_incluster_config(configuration)
        return Cluster(configuration, NAMESPACE_FILE.read_text(encoding="utf-8").strip())
    except (config.ConfigException, OSError) as error:
        raise WrongParameters(
            f"training on several nodes needs Kubernetes, for a TrainJob ({error}). Run this in a pod with a service "
            "account, or set KUBECONFIG."
        ) from None


def explain(error: Any, what: str, namespace: str) -> Problem:
    """The message of a refusal (an ApiException)."""
    reason = brief(error)
    if error.status == 401:
        return Refused(f"{what}: the Kubernetes API does not accept the credentials ({reason}). Check the account.")
    if error.status == 403 and TEXTS["not authorized"].search(reason):
        return Refused(
            f"{what}, in namespace {namespace}: {reason}. deploy/ ships the Role and RoleBinding that the step's "
            "service account needs; apply them to this namespace."
        )
    if error.status == 404 and what.endswith("trainjobs"):
        return Refused(
            f"{what}: {reason}. Kubeflow Trainer 2.2 or later has to be installed in the cluster: training on several "
            "nodes creates a TrainJob."
        )
    if TEXTS["no runtimePatches"].search(reason):
        return Refused(f"{what}: {reason}. This needs Kubeflow Trainer 2.2 or later; the cluster has an older one.")
    if TEXTS["no runtime"].search(reason):
        return Refused(f"{what}: {reason}. deploy/ ships the TrainingRuntime; apply it to namespace {namespace}.")
    if error.status in (400, 422):
        return WrongParameters(f"{what}: {reason}. Check the step's arguments for nodes, CPU, memory and GPUs.")
    return Refused(f"{what}: {reason}")


def brief(error: Exception) -> str:
    """The message of the API, or the error of the network."""
    if not isinstance(error, ApiException):
        return str(error).rstrip(".")
    text = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or ""
    try:
        message = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        message = text.strip()[:300]
    return f"{error.status} {error.reason}{': ' if message else ''}{message}".rstrip(".")
