"""The Kubernetes API as the training step needs it: asked patiently, watched without end, its refusals explained.

One loop for every request, the client's own is off: two loops multiply, and only one knows how long it has been.

    VGG_KUBERNETES_PATIENCE_SECONDS   how long the API may not answer (600)
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client import ApiException
from kubernetes.watch import Watch
from urllib3.exceptions import HTTPError

from components.patience import seconds
from components.train.trainjob import GROUP, PLURAL, VERSION
from vgg.errors import Problem, Refused, Unreachable, WrongParameters

log = logging.getLogger("vgg.cluster")

Object = dict[str, Any]  # as JSON has it

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two tries; doubled in between
TIMEOUT = (10, 30)  # seconds: to connect, and between two bytes
WATCH_SECONDS = 60  # after which a watch begins anew, so that one whose connection died in silence is not trusted long
QUIET_SECONDS = 2.0  # between two watches that end at once, as one does whose server is going away
GONE = 410


class Cluster:
    """A namespace of a cluster.  Several threads may ask at once."""

    def __init__(self, configuration: client.Configuration, namespace: str) -> None:
        configuration.retries = False
        self.namespace = namespace
        self.api = client.ApiClient(configuration)
        self.core, self.objects = client.CoreV1Api(self.api), client.CustomObjectsApi(self.api)
        self.patience = seconds("VGG_KUBERNETES_PATIENCE_SECONDS", 600)
        self._lock, self._silent_since = threading.Lock(), 0.0  # 0: it answers

    # -- TrainJobs

    def trainjob(self, name: str) -> Object | None:
        call = self.objects.get_namespaced_custom_object
        found: Object | None = self.ask("get trainjobs", call, *self._plural, name, absent=(404,))
        return found

    def create(self, body: Object) -> Object | None:
        """None if there is one of that name."""
        call = self.objects.create_namespaced_custom_object
        made: Object | None = self.ask(
            "create trainjobs", call, *self._plural, body, field_validation="Strict", absent=(409,)
        )
        return made

    def delete(self, name: str) -> None:
        """Begin to delete a TrainJob: it is gone when its pods are.  One that is not there is well deleted."""
        self.ask(
            "delete trainjobs", self.objects.delete_namespaced_custom_object, *self._plural, name,
            propagation_policy="Foreground", absent=(404, 409),
        )  # fmt: skip

    def pod_owners(self, name: str) -> list[Object]:
        """Of a pod of this namespace; none if it is not there."""
        answer = self.ask(
            "get pods", self.core.read_namespaced_pod, name, self.namespace, _preload_content=False, absent=(404,)
        )
        return list(json.loads(answer.data)["metadata"].get("ownerReferences") or []) if answer else []

    @property
    def _plural(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.namespace, PLURAL

    # -- what is watched: each yields all there is, now and after every change

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
            there = {item["metadata"]["uid"]: item for item in listed["items"]}
            yield dict(there)
            for change, item in self._changes(what, call, where, listed["metadata"]["resourceVersion"]):
                if change == "DELETED":
                    there.pop(item["metadata"]["uid"], None)
                else:
                    there[item["metadata"]["uid"]] = item
                yield dict(there)

    def _changes(
        self, what: str, call: Callable[..., Any], where: dict[str, Any], version: str
    ) -> Iterator[tuple[str, Object]]:
        """All changes since a version, over as many connections as it takes.  Ends when the version is too old."""
        limits = {"timeout_seconds": WATCH_SECONDS, "_request_timeout": (TIMEOUT[0], WATCH_SECONDS + TIMEOUT[1])}
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            try:
                for event in Watch("object").stream(call, **where, **limits, resource_version=version):
                    self.answered()
                    pause = FIRST_PAUSE
                    item = event["raw_object"]
                    version = item["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        yield event["type"], item
                self.answered()
            except (ApiException, HTTPError, OSError) as error:
                if isinstance(error, ApiException) and error.status == GONE:
                    time.sleep(FIRST_PAUSE)
                    return
                if isinstance(error, ApiException) and not passes(error):
                    raise explain(error, f"watch {what}", self.namespace) from None
                pause = self.wait(f"watch {what}", error, pause)
            time.sleep(max(0.0, QUIET_SECONDS - (time.monotonic() - began)))

    # -- asking

    def ask(self, what: str, call: Callable[..., Any], *args: Any, absent: tuple[int, ...] = (), **kwargs: Any) -> Any:
        """Do a request until it is answered; None for a status in `absent`.

        Raises Refused or WrongParameters with the reason of an answer that will not change, Unreachable.
        """
        pause = FIRST_PAUSE
        while True:
            try:
                answer = call(*args, **kwargs, _request_timeout=TIMEOUT)
            except (ApiException, HTTPError, OSError) as error:
                if isinstance(error, ApiException) and not passes(error):
                    self.answered()
                    if error.status in absent:
                        return None
                    raise explain(error, what, self.namespace) from None
                pause = self.wait(what, error, pause)
            else:
                self.answered()
                return answer

    def answered(self) -> None:
        with self._lock:
            if self._silent_since:
                log.info("the Kubernetes API answers again")
            self._silent_since = 0.0

    def wait(self, what: str, error: Exception, pause: float) -> float:
        """Sleep before the next try; returns the pause after that.  Raises Unreachable if it has been long enough."""
        with self._lock:
            if not self._silent_since:
                self._silent_since = time.monotonic()
                log.warning("the Kubernetes API: %s: %s; trying for %.0f s", what, brief(error), self.patience)
            silent = time.monotonic() - self._silent_since
        if silent > self.patience:
            raise Unreachable(
                f"the Kubernetes API has not answered for {silent:.0f} s ({what}: {brief(error)}). A TrainJob that has "
                "been made goes on by itself; run again to follow it."
            )
        time.sleep(min(pause, max(0.1, self.patience - silent)) * random.uniform(0.5, 1))  # noqa: S311
        return min(2 * pause, LONGEST_PAUSE)


def connect() -> Cluster:
    """The cluster of KUBECONFIG if that is set, else the one this pod runs in.  Raises WrongParameters."""
    configuration = client.Configuration()
    try:
        if os.environ.get("KUBECONFIG"):
            config.load_kube_config(client_configuration=configuration)
            context = config.list_kube_config_contexts()[1]["context"]
            return Cluster(configuration, context.get("namespace", "default"))
        config.load_incluster_config(configuration)
        return Cluster(configuration, NAMESPACE_FILE.read_text().strip())
    except (config.ConfigException, OSError) as error:
        raise WrongParameters(
            f"training on several nodes makes a TrainJob, but there is no Kubernetes to make it in ({error}). Run this "
            "in a pod with a service account, or set KUBECONFIG."
        ) from None


def passes(error: ApiException) -> bool:
    """Whether the next try may be answered otherwise.  0: no HTTP answer at all."""
    return error.status in (0, 408, 429) or error.status >= 500


def explain(error: ApiException, what: str, namespace: str) -> Problem:
    """The message of an answer that will not change by asking again."""
    said = brief(error)
    if error.status == 401:
        return Refused(f"{what}: the Kubernetes API does not know who is asking ({said}). Check the service account.")
    if error.status == 403 and "admission webhook" not in said and "quota" not in said:
        return Refused(
            f"{what}, in namespace {namespace}: {said}. deploy/ ships the Role and RoleBinding that the step's service "
            "account needs; apply them to this namespace."
        )
    if error.status == 404 and what.endswith("trainjobs"):
        return Refused(
            f"{what}: {said}. Kubeflow Trainer 2.2 or later has to be installed in the cluster: training on several "
            "nodes makes a TrainJob."
        )
    if re.search(r"unknown field.*runtimePatches", said):
        return Refused(f"{what}: {said}. This needs Kubeflow Trainer 2.2 or later; the cluster has an older one.")
    if "must be created before the TrainJob" in said:
        return Refused(f"{what}: {said}. deploy/ ships the TrainingRuntime; apply it to namespace {namespace}.")
    if error.status in (400, 422):
        return WrongParameters(f"{what}: {said}. Check what the step was told of nodes, CPU, memory and GPUs.")
    return Refused(f"{what}: {said}")


def brief(error: Exception) -> str:
    """What the API said, or what the network did."""
    if not isinstance(error, ApiException):
        return str(error).rstrip(".")
    text = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or ""
    try:
        message = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        message = text.strip()[:300]
    return f"{error.status} {error.reason}{': ' if message else ''}{message}".rstrip(".")
