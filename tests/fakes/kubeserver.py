"""The part of a Kubernetes API server that a TrainJob needs, over HTTP; tests take the role of the controllers.

Strict: an unknown path, parameter or token is refused as by the real server, and recorded in `unknown`; a TrainJob is
validated by the models of the published API (kubeflow-trainer-api) and by the rules of its webhook.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from kubehttp import NAMESPACE, TOKEN, Failure, Handler, stamp

Object = dict[str, Any]

RUNTIME = "vgg-train"
RESERVED = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}


class Log:
    """The log of a container: lines with their times."""

    def __init__(self) -> None:
        self.lines: list[tuple[datetime, str]] = []
        self.ended = False


class KubeServer:
    """State and faults; every change wakes the watches."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.version, self.oldest = 100, 0
        self.objects: dict[str, dict[str, Object]] = {"trainjobs": {}, "jobsets": {}, "pods": {}, "events": {}}
        self.changes: list[tuple[int, str, str, Object]] = []  # version, plural, type, object
        self.logs: dict[str, Log] = {}
        self.unknown: list[str] = []
        self.requests: Counter[str] = Counter()  # "verb resource"
        self.forbidden: set[str] = set()
        self.faults: Counter[str] = Counter()  # "verb resource": how many of the next are answered with 503
        self.down = False  # every connection is cut
        self.cut_log_after = -1  # lines, then half a line, then nothing
        self.cut_watches = 0  # when it grows, all open watches and logs are cut
        self.trainer, self.lenient = "2.3", False  # lenient: an API server without strict validation
        self.runtimes = {RUNTIME}
        self.end_seconds = 0.3  # from SIGTERM to the end of a pod
        self.ghosts = 0  # pods made for a TrainJob that is being deleted
        self.mixed: list[str] = []  # TrainJobs created before the pods of an earlier one were gone
        self.clients: list[subprocess.Popen[bytes]] = []  # killed by close()
        handler = type("Handler", (Handler,), {"server_state": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def kubeconfig(self, path: Path) -> str:
        return write_kubeconfig(path, {"server": self.url}, TOKEN, NAMESPACE)

    # -- objects

    def put(self, plural: str, item: Object) -> Object:
        """A new object, or a new version of one."""
        with self.changed:
            self.version += 1
            metadata = item["metadata"]
            known = metadata.get("name") in self.objects[plural]
            metadata["resourceVersion"] = str(self.version)
            metadata.setdefault("uid", str(uuid.uuid4()))
            metadata.setdefault("creationTimestamp", stamp(datetime.now(UTC))[:19] + "Z")
            self.objects[plural][metadata["name"]] = item
            self.changes.append((self.version, plural, "MODIFIED" if known else "ADDED", copy.deepcopy(item)))
            self.changed.notify_all()
            return item

    def remove(self, plural: str, name: str) -> None:
        with self.changed:
            item = self.objects[plural].pop(name, None)
            if item is not None:
                self.version += 1
                item["metadata"]["resourceVersion"] = str(self.version)
                self.changes.append((self.version, plural, "DELETED", copy.deepcopy(item)))
                self.changed.notify_all()

    def compact(self) -> None:
        """Forget history, as etcd does: older watches get 410."""
        with self.changed:
            self.oldest = self.version + 1
            self.cut_watches += 1
            self.version += 1
            self.changed.notify_all()

    def cut(self) -> None:
        with self.changed:
            self.cut_watches += 1
            self.changed.notify_all()

    # -- the roles of Trainer, JobSet, scheduler and kubelet

    def made(self, timeout: float = 20, count: int = 1) -> Object:
        """The TrainJob, once it has been created (for the count-th time)."""
        wait_for(lambda: self.requests["made trainjobs"] >= count and self.objects["trainjobs"], timeout)
        return next(iter(self.objects["trainjobs"].values()))

    def pod(self, node: int, attempt: int = 0, job: str = "") -> Object:
        """A pod of a TrainJob, pending.  job: its name; '' for the only one."""
        if not job:
            (job,) = self.objects["trainjobs"]
        metadata = {"name": f"{job}-node-0-{node}-{uuid.uuid4().hex[:5]}", "labels": labels_of(job, node, attempt)}
        made = self.put("pods", {"metadata": metadata, "spec": {}, "status": {"phase": "Pending"}})
        self.logs[made["metadata"]["name"]] = Log()
        return made

    def run(self, pod: Object) -> None:
        self._status(pod, "Running", {"running": {"startedAt": "2026-01-01T00:00:00Z"}})

    def say(self, pod: Object, *lines: str, ago: float = 0.0) -> None:
        with self.changed:
            log = self.logs[pod["metadata"]["name"]]
            log.lines += [(datetime.now(UTC) - timedelta(seconds=ago), line) for line in lines]
            self.changed.notify_all()

    def end(self, pod: Object, code: int, **status: Any) -> None:
        """End its container.  status: more fields of the pod, such as reason='Evicted'."""
        said = "Error" if code else "Completed"
        self._status(pod, "Failed" if code else "Succeeded", {"terminated": {"exitCode": code, "reason": said}}, status)
        with self.changed:
            self.logs[pod["metadata"]["name"]].ended = True
            self.changed.notify_all()

    def _status(self, pod: Object, phase: str, state: Object, more: Object | None = None) -> None:
        pod["status"] |= {"phase": phase, "containerStatuses": [{"name": "node", "state": state}], **(more or {})}
        self.put("pods", pod)

    def delete_pod(self, pod: Object) -> None:
        self.remove("pods", pod["metadata"]["name"])
        with self.changed:
            if log := self.logs.pop(pod["metadata"]["name"], None):
                log.ended = True
            self.changed.notify_all()

    def event(self, about: Object, reason: str, message: str, kind: str = "Pod", warning: bool = True) -> None:
        about = {"kind": kind, "name": about["metadata"]["name"], "namespace": NAMESPACE}
        body = {"metadata": {"name": f"{about['name']}.{uuid.uuid4().hex[:8]}"}, "involvedObject": about}
        body |= {"type": "Warning" if warning else "Normal", "reason": reason, "message": message}
        self.put("events", {**body, "lastTimestamp": stamp(datetime.now(UTC))[:19] + "Z"})

    def condition(self, kind: str, reason: str, message: str = "") -> None:
        """Set a condition of the TrainJob: Complete, Failed, Suspended."""
        (job,) = self.objects["trainjobs"].values()
        known = job.setdefault("status", {}).setdefault("conditions", [])
        new = {"type": kind, "status": "True", "reason": reason, "message": message}
        known.append({**new, "lastTransitionTime": "2026-01-01T00:00:00Z"})
        self.put("trainjobs", job)

    def make(self, job: Object) -> Object:
        """A new TrainJob, with its JobSet."""
        name = job["metadata"]["name"]
        if name in self.objects["jobsets"] or self._pods_of(name):
            self.mixed.append(name)
        made = self.put("trainjobs", job)
        self.put("jobsets", {"metadata": {"name": name}})
        self.requests["made trainjobs"] += 1
        return made

    def begin_deletion(self, name: str, policy: str) -> Object:
        """As the API server, the garbage collector and Trainer 2.3 do; returns the TrainJob.

        Background: the TrainJob is gone at once, then its JobSet, and its pods when they have ended.
        Foreground: it stays until its JobSet is gone, but Trainer makes that anew, with pods.  A later deletion in the
        background takes the finalizer away.
        """
        job = self.objects["trainjobs"][name]
        if policy == "Background":
            self.remove("trainjobs", name)
            threading.Timer(self.end_seconds / 3, self.remove, ("jobsets", name)).start()
            threading.Timer(self.end_seconds, self._remove_pods, (name,)).start()
        elif not job["metadata"].get("deletionTimestamp"):
            assert policy == "Foreground"
            job["metadata"] |= {"deletionTimestamp": stamp(datetime.now(UTC))[:19] + "Z"}
            job["metadata"] |= {"finalizers": ["foregroundDeletion"]}
            self.put("trainjobs", job)
            threading.Thread(target=self._make_anew, args=(name, len(self._pods_of(name))), daemon=True).start()
        return job

    def _make_anew(self, name: str, pods: int) -> None:
        """For real every two seconds, for half a minute or longer."""
        while name in self.objects["trainjobs"] and not self.down:
            self.remove("jobsets", name)
            self._remove_pods(name)
            if name in self.objects["trainjobs"]:
                self.put("jobsets", {"metadata": {"name": name}})
                self.ghosts += len([self.pod(node, job=name) for node in range(pods)])
            time.sleep(self.end_seconds)

    def _pods_of(self, name: str) -> list[Object]:
        return [
            pod for pod in list(self.objects["pods"].values())
            if pod["metadata"].get("labels", {}).get("jobset.sigs.k8s.io/jobset-name") == name
        ]  # fmt: skip

    def _remove_pods(self, name: str) -> None:
        for pod in self._pods_of(name):
            self.delete_pod(pod)

    # -- admission

    def admit(self, job: Object, validation: str) -> None:
        """Raises Failure as the API server and the webhook do."""
        name, spec = job["metadata"]["name"], job["spec"]
        if self.trainer < "2.2":
            if validation == "Strict" and not self.lenient:
                said = 'strict decoding error: unknown field "spec.runtimePatches"'
                raise Failure(
                    400, "BadRequest", f'TrainJob in version "v1alpha1" cannot be handled as a TrainJob: {said}'
                )
            spec.pop("runtimePatches", None)
            return
        known = TrainerV1alpha1TrainJob.from_dict(job).to_dict()
        metadata = {key: value for key, value in job["metadata"].items() if key != "ownerReferences"}
        if without(known, "metadata") != without(job, "metadata") or not metadata.items() <= known["metadata"].items():
            raise Failure(400, "BadRequest", f"strict decoding error: unknown fields: {known} is not {job}")
        for quantity in spec["trainer"]["resourcesPerNode"]["limits"].values():
            if not re.fullmatch(r"[0-9.]+(m|k|Ki|M|Mi|G|Gi|T|Ti)?", quantity):
                raise Failure(422, "Invalid", f'TrainJob.trainer.kubeflow.org "{name}" is invalid: {quantity!r}')
        if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 63:
            raise Failure(422, "Invalid", "metadata.name must match RFC 1035 DNS label format")
        if spec["runtimeRef"]["kind"] != "TrainingRuntime" or spec["runtimeRef"]["name"] not in self.runtimes:
            raise self.denied(
                "spec.runtimeRef: specified trainingRuntime must be created before the TrainJob is created"
            )
        env = [variable["name"] for variable in spec["trainer"]["env"]]
        if len(env) != len(set(env)) or RESERVED & set(env):
            raise self.denied(f"spec.trainer.env: {env}")
        for patch in spec["runtimePatches"]:
            if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-\w./]+", patch["manager"]):
                raise self.denied("spec.runtimePatches.manager: must be a domain-prefixed path")
            for replicated in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
                containers = replicated["template"]["spec"]["template"].get("spec", {}).get("containers", [])
                if replicated["name"] != "node" or any(c["name"] != "node" or c.get("env") for c in containers):
                    raise self.denied("spec.runtimePatches: not in the runtime's template")

    @staticmethod
    def denied(reason: str) -> Failure:
        webhook = "validator.trainjob.trainer.kubeflow.org"
        return Failure(403, "Forbidden", f'admission webhook "{webhook}" denied the request: {reason}')

    def close(self) -> None:
        for client in self.clients:
            client.kill()
            client.wait(10)
        self.down = True
        self.cut()
        self.http.shutdown()
        self.http.server_close()


def labels_of(job: str, node: int, attempt: int = 0) -> dict[str, str]:
    """Those that JobSet gives to the pods of a TrainJob."""
    return {
        "jobset.sigs.k8s.io/jobset-name": job, "jobset.sigs.k8s.io/replicatedjob-name": "node",
        "jobset.sigs.k8s.io/restart-attempt": str(attempt), "batch.kubernetes.io/job-completion-index": str(node),
    }  # fmt: skip


def write_kubeconfig(path: Path, cluster: Object, token: str, namespace: str) -> str:
    """cluster: server and, for TLS, certificate-authority.  Returns the path."""
    user, context = {"name": "u", "user": {"token": token}}, {"cluster": "c", "user": "u", "namespace": namespace}
    body = {
        "apiVersion": "v1", "kind": "Config", "clusters": [{"name": "c", "cluster": cluster}], "users": [user],
        "contexts": [{"name": "x", "context": context}], "current-context": "x",
    }  # fmt: skip
    path.write_text(json.dumps(body))  # JSON is YAML
    return str(path)


def without(item: Object, key: str) -> Object:
    return {name: value for name, value in item.items() if name != key}


def wait_for(true: Callable[[], Any], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
