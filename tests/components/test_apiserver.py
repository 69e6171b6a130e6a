"""deploy/ and the TrainJob's step against a real API server, its controllers and its scheduler: make test-apiserver."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from controlplane import BINARIES, JOBSET, TRAINER, ControlPlane, Json
from kubeserver import labels_of, wait_for
from rendering import OVERLAYS, named, node_pod, site
from test_trainjob import Step

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(300)]
NAMESPACE = "kubeflow"
RUNNER = f"system:serviceaccount:{NAMESPACE}:pipeline-runner"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/enforce-version": "v1.34"}
PODS: dict[str, Json] = json.loads((ROOT / "tests/kubeflow/pods.json").read_text())


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """With a namespace as Kubeflow's, in which Pod Security is enforced; neither Trainer nor JobSet is installed."""
    assert BINARIES.is_dir(), f"{BINARIES} is made by tests/apiserver/build.sh: make test-apiserver"
    made = ControlPlane(tmp_path_factory.mktemp("plane"))
    try:
        made.start()
        made.create(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": RESTRICTED}},
            {
                "apiVersion": "v1",
                "kind": "ServiceAccount",
                "metadata": {"name": "pipeline-runner", "namespace": NAMESPACE},
            },
        )
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def trainer(plane: ControlPlane) -> ControlPlane:
    """With the definitions of Trainer and JobSet, and what a site with several nodes applies."""
    plane.define(*TRAINER, JOBSET)
    folder = plane.folder / "site"
    folder.mkdir()
    site(folder, "base")
    plane.kubectl("apply", "--validate=strict", "-k", str(folder))
    return plane


def applied(plane: ControlPlane, folder: Path, *words: str) -> list[str]:
    return plane.kubectl("apply", "--validate=strict", *words, "-k", str(folder)).stdout.splitlines()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_without_trainer_an_overlay_is_applied_twice(overlay: str, plane: ControlPlane, tmp_path: Path) -> None:
    namespace = "a-" + overlay.replace("/", "-")
    plane.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": RESTRICTED}})
    site(tmp_path, overlay, namespace, trainer=False)
    assert {line.split()[-1] for line in applied(plane, tmp_path)} == {"created"}
    assert {line.split()[-1] for line in applied(plane, tmp_path)} == {"unchanged"}
    # the controllers make their pods, which Pod Security admits
    wait_for(lambda: len(plane.get("pods", "-n", namespace)["items"]) >= 2, 30)
    owners = {pod["metadata"]["ownerReferences"][0]["kind"] for pod in plane.get("pods", "-n", namespace)["items"]}
    assert owners == {"ReplicaSet", "Job"}
    said = [event["message"] for event in plane.get("events", "-n", namespace)["items"]]
    assert not [message for message in said if "forbidden" in message or "violates PodSecurity" in message]


def test_with_trainers_objects_it_needs_trainer(plane: ControlPlane, tmp_path: Path) -> None:
    site(tmp_path, "base", NAMESPACE, trainer=True)
    assert plane.kubectl("get", "crd", "trainingruntimes.trainer.kubeflow.org", check=False).returncode == 1
    done = plane.kubectl("apply", "--dry-run=server", "-k", str(tmp_path), check=False)
    assert done.returncode == 1 and 'no matches for kind "TrainingRuntime"' in done.stderr


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_with_trainer_an_overlay_is_accepted(overlay: str, trainer: ControlPlane, tmp_path: Path) -> None:
    namespace = "b-" + overlay.replace("/", "-")
    trainer.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": RESTRICTED}})
    site(tmp_path, overlay, namespace)
    lines = applied(trainer, tmp_path)
    assert any(line.startswith("trainingruntime.trainer.kubeflow.org/vgg-train ") for line in lines)


ALLOWED = [
    *(f"{verb} trainjobs.trainer.kubeflow.org" for verb in ("create", "get", "list", "watch", "delete")),
    "get jobsets.jobset.x-k8s.io", "get pods", "list pods", "watch pods", "get pods --subresource=log",
    "list events", "watch events",
]  # fmt: skip
FORBIDDEN = [
    *(f"{verb} trainjobs.trainer.kubeflow.org" for verb in ("patch", "update", "deletecollection")),
    "list jobsets.jobset.x-k8s.io", "delete jobsets.jobset.x-k8s.io", "create pods", "delete pods",
    "create pods --subresource=exec", "get secrets", "list secrets", "get configmaps", "create jobs.batch",
]  # fmt: skip


@pytest.mark.parametrize(("requests", "answer"), [(ALLOWED, "yes"), (FORBIDDEN, "no")])
def test_the_steps_account_may_do_what_it_needs_and_nothing_else(
    requests: list[str], answer: str, trainer: ControlPlane
) -> None:
    def may(request: str, namespace: str = NAMESPACE) -> str:
        words = ("auth", "can-i", *request.split(), f"--as={RUNNER}", "-n", namespace)
        return trainer.kubectl(*words, check=False).stdout.strip()

    assert {request: may(request) for request in requests} == dict.fromkeys(requests, answer)
    assert may("create trainjobs.trainer.kubeflow.org", "default") == "no"


def pod_of(name: str, spec: Json, **metadata: Any) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, **metadata},
        "spec": spec,
    }


def test_pod_security_admits_the_pods_of_the_package(trainer: ControlPlane) -> None:
    """Those that Kubeflow's driver has made of it, and the nodes of a TrainJob; the check itself refuses others."""
    runtime = named("TrainingRuntime", "vgg-train")["spec"]["template"]["spec"]["replicatedJobs"][0]
    pods = {**PODS, "node": node_pod(runtime)}
    for name, spec in pods.items():
        words = ("create", "--dry-run=server", "--validate=strict", "-f", "-")
        done = trainer.kubectl(*words, text=json.dumps(pod_of(f"admitted-{name}", spec)), check=False)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        root = json.loads(json.dumps(spec))
        for container in root["containers"]:
            container["securityContext"] = {"runAsUser": 0}
        done = trainer.kubectl(*words, text=json.dumps(pod_of(f"refused-{name}", root)), check=False)
        assert done.returncode == 1 and 'violates PodSecurity "restricted:v1.34"' in done.stderr, name


class Roles:
    """What test_trainjob.Step wants of a cluster, and the roles of Trainer, JobSet and kubelet for one TrainJob."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane, self.clients = plane, list[Any]()
        words = ("create", "token", "pipeline-runner", "-n", NAMESPACE)
        self.token = plane.kubectl(*words).stdout.strip()

    def kubeconfig(self, path: Path) -> str:
        return self.plane.kubeconfig(path, self.token)

    def trainjobs(self) -> list[Json]:
        found: list[Json] = self.plane.get("trainjobs", "-n", NAMESPACE)["items"]
        return found

    def made(self) -> Json:
        wait_for(self.trainjobs, 60)
        [job] = self.trainjobs()
        return job

    def make_nodes(self, job: Json) -> list[str]:
        """Its JobSet, which it owns, and two pods, which that owns."""
        name = job["metadata"]["name"]
        kind = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet"}
        self.plane.create({**kind, "metadata": {"name": name, "namespace": NAMESPACE, "ownerReferences": [owner(job)]}})
        jobset = self.plane.get("jobset", name, "-n", NAMESPACE)
        runtime = named("TrainingRuntime", "vgg-train")["spec"]["template"]["spec"]["replicatedJobs"][0]
        names = [f"{name}-node-0-{node}" for node in range(2)]
        for node, pod in enumerate(names):
            self.plane.create(
                pod_of(pod, node_pod(runtime), labels=labels_of(name, node), ownerReferences=[owner(jobset)])
            )
        return names

    def set_pod(self, name: str, phase: str, state: Json) -> None:
        container = {"name": "node", "state": state, "ready": False, "restartCount": 0, "image": "", "imageID": ""}
        self.plane.set_status("pod", name, {"phase": phase, "containerStatuses": [container]})

    def condition(self, name: str, kind: str, reason: str) -> None:
        made = {
            "type": kind,
            "status": "True",
            "reason": reason,
            "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
        self.plane.set_status("trainjob", name, {"conditions": [made]})


def owner(of: Json) -> Json:
    metadata = of["metadata"]
    return {
        "apiVersion": of["apiVersion"], "kind": of["kind"], "name": metadata["name"], "uid": metadata["uid"],
        "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip


@pytest.fixture
def roles(trainer: ControlPlane) -> Iterator[Roles]:
    made = Roles(trainer)
    yield made
    for client in made.clients:
        client.kill()
        client.wait(10)
    trainer.kubectl("delete", "trainjobs,jobsets", "--all", "-n", NAMESPACE, "--cascade=background")
    trainer.kubectl("delete", "pods", "--all", "-n", NAMESPACE, "--force", "--grace-period=0")


RUNNING = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}


def ended(code: int) -> Json:
    return {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed"}}


def test_a_trainjob_from_waiting_to_complete_through_a_kill_and_a_restart_of_the_server(
    roles: Roles, tmp_path: Path
) -> None:
    first = Step(roles, tmp_path)  # type: ignore[arg-type]
    job = roles.made()
    pods = roles.make_nodes(job)
    first.prints("no nodes available to schedule pods", 60)  # the scheduler's own event
    first.process.kill()
    step = Step(roles, tmp_path)  # type: ignore[arg-type]
    step.prints("exists: following it", 60)
    roles.plane.stop_server()
    step.prints("trying for 600 s", 60)
    roles.plane.start_server()
    step.prints("answers again", 60)
    for pod in pods:
        roles.set_pod(pod, "Running", RUNNING)
    for pod in pods:
        roles.set_pod(pod, "Succeeded", ended(0))
    roles.condition(job["metadata"]["name"], "Complete", "AllJobsCompleted")
    assert step.ended(60) == 0, step.text()
    assert [found["metadata"]["uid"] for found in roles.trainjobs()] == [job["metadata"]["uid"]]
    assert "Traceback" not in step.text() and "the end:" in step.text()


def test_two_steps_at_once_make_one_trainjob(roles: Roles, tmp_path: Path) -> None:
    steps = [Step(roles, tmp_path) for _ in range(2)]  # type: ignore[arg-type]
    job = roles.made()
    wait_for(lambda: sum("exists: following it" in step.text() for step in steps) == 1, 60)
    for pod in roles.make_nodes(job):
        roles.set_pod(pod, "Succeeded", ended(0))
    roles.condition(job["metadata"]["name"], "Complete", "AllJobsCompleted")
    assert [step.ended(60) for step in steps] == [0, 0]


def test_a_stopped_step_leaves_nothing(roles: Roles, tmp_path: Path) -> None:
    """The garbage collector takes the JobSet and the pods, which are of nodes that never started them."""
    step = Step(roles, tmp_path)  # type: ignore[arg-type]
    roles.make_nodes(roles.made())
    step.prints("no nodes available to schedule pods", 60)
    step.process.send_signal(signal.SIGTERM)
    assert step.ended(90) == 75, step.text()
    assert "is gone with its pods" in step.text() and "Traceback" not in step.text()
    assert [roles.plane.get(kind, "-n", NAMESPACE)["items"] for kind in ("trainjobs", "jobsets")] == [[], []]


def test_a_failure_ends_with_the_exit_code_of_its_pod(roles: Roles, tmp_path: Path) -> None:
    step = Step(roles, tmp_path)  # type: ignore[arg-type]
    job = roles.made()
    first, second = roles.make_nodes(job)
    roles.set_pod(first, "Failed", ended(75))
    roles.set_pod(second, "Failed", ended(78))
    step.prints("node 1, has failed: exit code 78", 60)
    roles.condition(job["metadata"]["name"], "Failed", "FailJobSetFailurePolicyAction")
    began = time.monotonic()
    assert step.ended(90) == 78, step.text()
    assert time.monotonic() - began < 60 and "Traceback" not in step.text()
