"""The part of the Kubernetes API that the training step uses: requests with retries, watches."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client import ApiException
from kubernetes.watch import Watch

from components.trainjob.body import GROUP, PLURAL, VERSION
from components.trainjob.refusals import ApiErrors
from runtime import environment
from runtime.errors import WrongParameters
from runtime.retry import Outage, Retry

log = logging.getLogger("vgg.cluster")

Object = dict[str, Any]  # parsed JSON

JOBSETS = ("jobset.x-k8s.io", "v1alpha2", "jobsets")
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
TIMEOUT = (10, 30)  # seconds: to connect, and between two bytes
WATCH_SECONDS = 60  # after which a watch is opened again, because a dead connection may go unnoticed
QUIET_SECONDS = 2.0  # between two watches at least: those of a server that shuts down end at once
EXPIRED = 410  # the status of a watch whose resource version is too old
EXPIRED_SECONDS = 1.0  # before listing again


class Cluster:
    """A namespace of a cluster.  Thread-safe.  patience: seconds without an answer after which a request fails."""

    def __init__(self, configuration: client.Configuration, namespace: str) -> None:
        configuration.retries = False
        self.namespace = namespace
        self.api = client.ApiClient(configuration)
        self.core, self.objects = client.CoreV1Api(self.api), client.CustomObjectsApi(self.api)
        self.patience = environment.KUBERNETES_PATIENCE_SECONDS.get()
        self.granted: set[str] = set()  # a refusal of what was allowed before is a fault of the moment
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
        """Start to delete a TrainJob, if it exists; remains() tells what of it is left.

        Not in the foreground, where it waits for its JobSet: Trainer (2.3), which does not look at deletionTimestamp,
        makes that anew every two seconds, with pods.  This also ends a deletion in the foreground.
        """
        self.ask(
            "delete trainjobs", self.objects.delete_namespaced_custom_object, *self._plural, name,
            propagation_policy="Background", absent=(404, 409),
        )  # fmt: skip

    def remains(self, name: str) -> list[str]:
        """What exists of a TrainJob: the object, its JobSet, its pods.  [] when it has given its nodes back."""
        group, version, plural = JOBSETS
        found = [f"TrainJob {name}"] if self.trainjob(name) else []  # first: it may be about to make the others
        if self.ask(
            "get jobsets", self.objects.get_namespaced_custom_object, group, version, self.namespace, plural, name,
            absent=(404,),
        ):  # fmt: skip
            found.append(f"JobSet {name}")
        answer = self.ask(
            "list pods", self.core.list_namespaced_pod, self.namespace, label_selector=_of(name), _preload_content=False
        )
        return [*found, *(f"pod {pod['metadata']['name']}" for pod in json.loads(answer.data)["items"])]

    def pod(self, name: str) -> Object | None:
        """A pod in this namespace; None if it does not exist."""
        call = self.core.read_namespaced_pod
        answer = self.ask("get pods", call, name, self.namespace, _preload_content=False, absent=(404,))
        return dict(json.loads(answer.data)) if answer else None

    @property
    def _plural(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self.namespace, PLURAL

    # -- watches: each yields all objects by their uid, now and after every change

    def trainjobs(self, name: str) -> Iterator[dict[str, Object]]:
        call, (group, version, namespace, plural) = self.objects.list_namespaced_custom_object, self._plural
        where = {"group": group, "version": version, "namespace": namespace, "plural": plural}
        return self._watched("trainjobs", call, **where, field_selector=f"metadata.name={name}")

    def pods(self, trainjob: str) -> Iterator[dict[str, Object]]:
        where = {"namespace": self.namespace, "label_selector": _of(trainjob)}
        return self._watched("pods", self.core.list_namespaced_pod, **where)

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

        @functools.wraps(call)  # Watch reads its docstring
        def opened(*args: Any, **kwargs: Any) -> Any:
            answer = call(*args, **kwargs)
            self.granted.add(f"watch {what}")
            return answer

        while True:
            began = time.monotonic()
            try:
                for event in Watch("object").stream(opened, **where, **limits, resource_version=version):
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
                answer = call(*args, **kwargs, _request_timeout=TIMEOUT)
            except ApiException as error:
                if error.status not in absent:
                    raise
                answer = None
            self.granted.add(what)
            return answer

        return self.operation(what).call(request)

    def operation(self, what: str) -> Retry:
        """A retry of one operation.  what: verb and resource, for messages."""
        return Retry(ApiErrors(what, self.namespace, self.granted), self.patience, self._outage)


def _of(trainjob: str) -> str:
    """The label of its pods: its JobSet has its name."""
    return f"jobset.sigs.k8s.io/jobset-name={trainjob}"


def connect() -> Cluster:
    """The cluster of KUBECONFIG if that is set, else the one this pod runs in.  Raises WrongParameters."""
    configuration = client.Configuration()
    try:
        if path := environment.KUBECONFIG.get():  # the library itself reads it only on import
            config.load_kube_config(path, client_configuration=configuration)
            context = config.list_kube_config_contexts(path)[1]["context"]
            return Cluster(configuration, context.get("namespace", "default"))
        config.load_incluster_config(configuration)
        return Cluster(configuration, NAMESPACE_FILE.read_text(encoding="utf-8").strip())
    except (config.ConfigException, OSError) as error:
        raise WrongParameters(
            f"training on several nodes needs Kubernetes, for a TrainJob ({error}). Run this in a pod with a service "
            "account, or set KUBECONFIG."
        ) from None
