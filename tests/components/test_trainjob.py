"""The training step on several nodes: the real program as a process, with a fake API server over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import TRAIN, environment, executor_input, flags, program
from kubehttp import stamp
from kubeserver import KubeServer, wait_for

from components.trainjob import __main__ as trainjob
from components.trainjob.body import body
from components.trainjob.cluster import ApiException, connect
from components.trainjob.ended import end, exit_code
from components.trainjob.podlog import Position
from components.trainjob.refusals import explain
from runtime.errors import WrongParameters
from runtime.shards.shardset import ShardSet

CANARY = "canary-5ecre7"
RUN = "1f0e3dad-1234-4cde-9876-0123456789ab"
LAST = "import sys; print('the end:', sys.argv[1:])"  # a program instead of the training
ARGUMENTS = ["--params", '{"epochs": 2.0}', "--curves", "/s3/b/curves", "--metrics=/s3/b/metrics"]
FLAGS = [
    *("--nodes", "2", "--gpus", "4", "--cpu", "16", "--memory", "64Gi", "--claim", "vgg-store"),
    *("--image", "r/vgg@sha256:1"),
    *("--node-selector", '{"pool": "gpu"}', "--tolerations", '[{"key": "gpu", "tolerationSeconds": 300.0}]'),
    *("--addresses", "vgg-addresses", "--store-secret", "vgg-store", "--tracking-secret", "vgg-tracking"),
]  # fmt: skip


@pytest.fixture
def cluster() -> Iterator[KubeServer]:
    made = KubeServer()
    try:
        yield made
    finally:
        made.close()
    assert made.unknown == [] and made.mixed == [] and made.ghosts == 0


class Step:
    """The program of the step and its output."""

    def __init__(self, cluster: KubeServer, folder: Path, *more: str, **env: str) -> None:
        (folder / "last.py").write_text(LAST)
        command = [sys.executable, "-m", "components.trainjob", *FLAGS]
        values = {"KUBECONFIG": cluster.kubeconfig(folder / "kubeconfig"), "VGG_PIPELINE_RUN": RUN, "HOSTNAME": "step"}
        values |= {"AWS_SECRET_ACCESS_KEY": CANARY, "MLFLOW_TRACKING_PASSWORD": CANARY}
        env = environment(**{**values, **env})
        env["PYTHONPATH"] += f":{folder}"
        arguments = more or ("last", *ARGUMENTS, "--executor-input", executor_input("/out.json"))
        self.output = folder / f"said-{time.monotonic_ns()}"
        with open(self.output, "w") as file:
            self.process = subprocess.Popen([*command, *arguments], cwd=folder, env=env, stdout=file, stderr=file)
        cluster.clients.append(self.process)

    def text(self) -> str:
        return self.output.read_text()

    def prints(self, words: str, timeout: float = 20) -> None:
        wait_for(lambda: words in self.text() or self.process.poll() is not None, timeout)
        assert words in self.text(), self.text()

    def ended(self, timeout: float = 30) -> int:
        return self.process.wait(timeout)


def both_run(cluster: KubeServer, attempt: int = 0) -> list[dict[str, Any]]:
    pods = [cluster.pod(node, attempt) for node in (0, 1)]
    for pod in pods:
        cluster.run(pod)
    return pods


def under_way(cluster: KubeServer, folder: Path, **env: str) -> tuple[Step, list[dict[str, Any]]]:
    """A step that has made its TrainJob and shows the log of node 0; and the pods of both nodes."""
    step = Step(cluster, folder, **env)
    cluster.made()
    pods = both_run(cluster)
    cluster.say(pods[0], "under way")
    step.prints("under way")
    return step, pods


def complete(cluster: KubeServer, pods: list[dict[str, Any]]) -> None:
    for pod in pods:
        cluster.end(pod, 0)
    cluster.condition("Complete", "AllJobsCompleted")


WORKFLOW = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run", "uid": "u1", "controller": True}


def own_pod(cluster: KubeServer) -> dict[str, Any]:
    """The pod of the step, which the run's workflow owns."""
    metadata = {"name": "step", "ownerReferences": [WORKFLOW]}
    return cluster.put("pods", {"metadata": metadata, "status": {"phase": "Running"}})


def test_from_pending_to_complete(cluster: KubeServer, tmp_path: Path) -> None:
    own_pod(cluster)
    step = Step(cluster, tmp_path)
    made = cluster.made()
    first, second = cluster.pod(0), cluster.pod(1)
    for _ in range(2):
        cluster.event(first, "FailedScheduling", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    cluster.event(second, "Pulling", "Pulling image r/vgg", warning=False)
    cluster.event({"metadata": {"name": "another"}}, "FailedScheduling", "of somebody else")
    cluster.event(made, "FailedCreate", "exceeded quota", kind="Job")
    for words in ("3 Insufficient nvidia.com/gpu", "Pulling image r/vgg", "exceeded quota"):
        step.prints(words)
    for pod in (first, second):
        cluster.run(pod)
    cluster.say(first, "epoch 1", "epoch 2")
    cluster.say(second, "of node 1")
    step.prints("epoch 2")
    complete(cluster, [first, second])
    assert step.ended() == 0, step.text()
    said = step.text()
    name = first["metadata"]["name"]
    assert said.count("0/3 nodes") == 1 and "somebody else" not in said and "of node 1" not in said
    assert f"--- log of pod {name}, node 0" in said
    # only the step gets the arguments for Kubeflow
    assert f"the end: {['--finished', *ARGUMENTS, '--executor-input', executor_input('/out.json')]}" in said
    assert made["metadata"]["ownerReferences"] == [
        {key: WORKFLOW[key] for key in ("apiVersion", "kind", "name", "uid")}
    ]
    trainer = made["spec"]["trainer"]
    assert trainer["args"] == [
        *("--nodes", "2", "4", "last", *ARGUMENTS[:2], "--curves", "/tmp/curves", "--metrics", "/tmp/metrics")
    ]
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "4"}
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    (patched,) = made["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert patched["template"]["spec"]["template"]["metadata"]["labels"]["vgg.pipeline-run"] == RUN  # --wait finds it
    pod_spec = patched["template"]["spec"]["template"]["spec"]
    assert pod_spec["volumes"][0]["persistentVolumeClaim"] == {"claimName": "vgg-store"}
    assert pod_spec["nodeSelector"] == {"pool": "gpu"} and pod_spec["tolerations"][0]["tolerationSeconds"] == 300
    secrets = [
        one["valueFrom"]["secretKeyRef"]["name"] for one in trainer["env"] if "secretKeyRef" in one.get("valueFrom", ())
    ]
    assert sorted(secrets) == ["vgg-store"] * 2 + ["vgg-tracking"] * 2
    assert CANARY not in json.dumps(made)
    assert len(name.removesuffix(name.rpartition("-")[2])) < 50  # pods have the TrainJob's name as prefix


def test_a_killed_step_adopts_its_trainjob_through_an_api_that_fails(cluster: KubeServer, tmp_path: Path) -> None:
    first = Step(cluster, tmp_path)
    cluster.made()
    pods = both_run(cluster)
    cluster.say(pods[0], "before")
    first.prints("before")
    first.process.kill()
    first.process.wait(10)
    cluster.faults.update({"list trainjobs": 1, "create trainjobs": 1, "watch pods": 1, "get pods/log": 1})
    step = Step(cluster, tmp_path)
    step.prints("exists: following it")
    step.prints("before")
    cluster.cut_log_after = 3
    cluster.say(pods[0], *(f"line {number}" for number in range(20)))
    step.prints("line 19")
    cluster.compact()  # 410, for watches; the log is cut too
    cluster.say(pods[0], "line 20", "line 20", "the last")
    complete(cluster, pods)
    assert step.ended() == 0, step.text()
    lines = [line for line in step.text().splitlines() if line.startswith(("line", "before", "the last"))]
    assert lines == ["before", *(f"line {number}" for number in range(21)), "line 20", "the last"]
    assert cluster.requests["made trainjobs"] == 1
    assert "503" in step.text() and "answers again" in step.text()


def test_a_failure_is_reported_and_the_next_attempt_creates_the_trainjob_again(
    cluster: KubeServer, tmp_path: Path
) -> None:
    step = Step(cluster, tmp_path)
    cluster.made()
    pods = both_run(cluster)
    cluster.say(pods[0], *(f"step {number}" for number in range(50)))
    cluster.say(pods[1], "refused: another dataset")
    cluster.end(pods[1], 78)
    cluster.end(pods[0], 75)
    step.prints("node 0, has failed: exit code 75")
    cluster.condition("Failed", "FailJobSetFailurePolicyAction", "jobset failed")
    assert step.ended() == 78, step.text()
    said = step.text().split("Failed=True FailJobSetFailurePolicyAction: jobset failed")[1]
    assert "step 10\n" in said and "step 49\n" in said and "step 9\n" not in said
    assert (
        f"--- pod {pods[1]['metadata']['name']}, node 1: exit code 78; its last lines:\nrefused: another dataset"
        in said
    )
    again = Step(cluster, tmp_path)
    again.prints("has failed: deleting it and creating it again")
    cluster.made(count=2)
    complete(cluster, both_run(cluster))
    assert again.ended() == 0, again.text()
    assert "exit code" not in again.text()  # of the earlier pods


def test_an_evicted_pod_and_the_restart_of_all(cluster: KubeServer, tmp_path: Path) -> None:
    step = Step(cluster, tmp_path)
    cluster.made()
    pods = both_run(cluster)
    cluster.say(pods[0], "first start")
    step.prints("first start")
    cluster.end(pods[1], 137, reason="Evicted", message="The node was low on resource: memory")
    step.prints("node 1, has failed: exit code 137; Evicted: The node was low on resource: memory")
    for pod in pods:
        cluster.delete_pod(pod)
    new = both_run(cluster, attempt=1)
    cluster.say(new[0], "continuing at step 300")
    step.prints("continuing at step 300")
    assert "all pods are restarted, attempt 2" in step.text()
    assert f"--- log of pod {new[0]['metadata']['name']}, node 0" in step.text()
    complete(cluster, new)
    assert step.ended() == 0, step.text()


def test_a_stopped_step_deletes_its_trainjob(cluster: KubeServer, tmp_path: Path) -> None:
    own = own_pod(cluster)
    step, _ = under_way(cluster, tmp_path)
    began = time.monotonic()
    step.process.send_signal(signal.SIGTERM)
    wait_for(lambda: cluster.requests["delete trainjobs"], 2)
    print(f"deletion began after {1000 * (time.monotonic() - began):.0f} ms")
    assert time.monotonic() - began < 0.5  # Kubeflow's launcher ends at once, and the container with it
    step.process.send_signal(signal.SIGTERM)
    assert step.ended() == 75, step.text()
    assert [cluster.objects[kind] for kind in ("trainjobs", "jobsets")] == [{}, {}]
    assert list(cluster.objects["pods"].values()) == [own]
    assert "is gone with its pods" in step.text() and "Traceback" not in step.text()


@pytest.mark.parametrize("how", [pytest.param("deleted", marks=pytest.mark.faults), "disrupted"])
def test_a_step_whose_pod_is_moved_leaves_the_trainjob_to_the_next(
    how: str, cluster: KubeServer, tmp_path: Path
) -> None:
    own = own_pod(cluster)
    first, pods = under_way(cluster, tmp_path)
    if how == "deleted":
        own["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    else:  # by the scheduler, which deletes it a little later
        own["status"] |= DISRUPTED
    cluster.put("pods", own)
    first.process.send_signal(signal.SIGTERM)
    assert first.ended() == 75 and "this step's pod is moved: TrainJob vgg-" in first.text(), first.text()
    cluster.delete_pod(own)
    own_pod(cluster)
    again = Step(cluster, tmp_path)
    again.prints("exists: following it")
    complete(cluster, pods)
    assert again.ended() == 0, again.text()
    assert cluster.requests["made trainjobs"] == 1 and not cluster.requests["delete trainjobs"]


def test_a_stopped_step_that_cannot_read_its_pod_deletes_its_trainjob(
    cluster: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = cluster.make({"metadata": {"name": "vgg-1"}})["metadata"]["name"]
    monkeypatch.setenv("KUBECONFIG", cluster.kubeconfig(tmp_path / "kubeconfig"))
    monkeypatch.setenv("HOSTNAME", "step")
    cluster.forbidden = {"get pods"}
    assert "is gone with its pods" in str(trainjob.stop(connect(), name))


def test_what_a_stopped_step_leaves_is_said(
    cluster: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = cluster.make({"metadata": {"name": "vgg-1"}})["metadata"]["name"]
    pods = both_run(cluster)
    monkeypatch.setenv("KUBECONFIG", cluster.kubeconfig(tmp_path / "kubeconfig"))
    monkeypatch.setattr(trainjob, "STOP_SECONDS", 1.0)
    monkeypatch.setattr(trainjob, "POLL_SECONDS", 0.2)
    cluster.end_seconds = 2.0  # the JobSet is gone earlier
    left = f"not gone after 1 s: pod {pods[0]['metadata']['name']}, pod {pods[1]['metadata']['name']}."
    assert left in str(trainjob.stop(connect(), name))
    wait_for(lambda: not cluster.objects["pods"], 5)
    assert "is gone with its pods" in str(trainjob.stop(connect(), name))
    cluster.forbidden = {"get jobsets"}  # an older Role
    assert "was deleted; whether its pods have ended is unknown: get jobsets" in str(trainjob.stop(connect(), name))


def test_a_deletion_in_the_foreground_is_ended_and_its_pods_are_awaited(cluster: KubeServer, tmp_path: Path) -> None:
    """Of an older version, or by hand."""
    first = Step(cluster, tmp_path)
    name = cluster.made()["metadata"]["name"]
    both_run(cluster)
    first.process.kill()
    cluster.begin_deletion(name, "Foreground")
    wait_for(lambda: cluster.ghosts > 4, 5)
    cluster.end_seconds = 6.0  # a step on a busy machine still sees the JobSet, which is gone after a third of it
    again = Step(cluster, tmp_path)
    again.prints(f"waiting for the end of what an earlier attempt made: JobSet {name}, pod ")
    cluster.made(count=2)
    cluster.ghosts = 0
    complete(cluster, both_run(cluster))
    assert again.ended() == 0, again.text()


def test_deleted_by_somebody_else(cluster: KubeServer, tmp_path: Path) -> None:
    step = Step(cluster, tmp_path)
    name = cluster.made()["metadata"]["name"]
    cluster.begin_deletion(name, "Background")
    assert step.ended() == 75
    assert "was deleted by somebody else" in step.text()


def test_an_api_that_does_not_answer(cluster: KubeServer, tmp_path: Path) -> None:
    step = Step(cluster, tmp_path, VGG_KUBERNETES_PATIENCE_SECONDS="1")
    cluster.made()
    cluster.down = True
    cluster.cut()
    assert step.ended() == 69, step.text()
    assert "A TrainJob that exists continues; run again to follow it" in step.text()
    assert cluster.objects["trainjobs"] and "Traceback" not in step.text()


FOLLOWING = {f"{verb} {kind}" for verb in ("list", "watch") for kind in ("trainjobs", "pods", "events")} | {
    "get pods/log"
}


def test_permissions_that_are_away_for_a_moment(cluster: KubeServer, tmp_path: Path) -> None:
    """As after a restart of an API server, which answers before it has loaded the roles (test_apiserver.py)."""
    step, pods = under_way(cluster, tmp_path)
    cluster.forbidden = FOLLOWING
    cluster.cut()
    refused = Counter(cluster.requests)
    wait_for(lambda: all(cluster.requests[what] > refused[what] for what in ("watch pods", "get pods/log")), 20)
    time.sleep(1)
    cluster.forbidden = set()
    step.prints("answers again")
    cluster.say(pods[0], "afterwards")
    step.prints("afterwards")  # the log is followed again too
    complete(cluster, pods)
    assert step.ended() == 0, step.text()


def test_permissions_that_do_not_come_back(cluster: KubeServer, tmp_path: Path) -> None:
    step, _ = under_way(cluster, tmp_path, VGG_KUBERNETES_PATIENCE_SECONDS="1")
    cluster.forbidden = FOLLOWING
    cluster.cut()
    assert step.ended() == 78, step.text()
    assert "deploy/ ships the Role" in step.text() and "Traceback" not in step.text()


def test_refusals_of_the_cluster(tmp_path: Path) -> None:
    """One message, nothing is left; the steps run in parallel."""
    cases: list[tuple[dict[str, Any], list[str], int, str]] = [
        ({"forbidden": {"list pods"}}, [], 78, 'cannot list resource "pods" in namespace. deploy/ ships the Role'),
        ({"forbidden": {"create trainjobs"}}, [], 78, 'cannot create resource "trainjobs"'),
        ({"trainer": ""}, [], 78, "Kubeflow Trainer 2.2 or later has to be installed"),
        ({"trainer": "2.1"}, [], 78, "the cluster has an older one"),
        ({"trainer": "2.1", "lenient": True}, [], 78, "The TrainJob was deleted"),
        ({"runtimes": set()}, [], 78, "trainer ships the TrainingRuntime"),
        ({}, ["--memory", "plenty"], 64, "Check the step's arguments for nodes, CPU, memory and GPUs"),
    ]
    running = []
    for number, (state, more, _, _) in enumerate(cases):
        cluster = KubeServer()
        vars(cluster).update(state)
        folder = tmp_path / str(number)
        folder.mkdir()
        running.append((cluster, Step(cluster, folder, *more, "last")))
    for (cluster, step), (_, _, code, words) in zip(running, cases, strict=True):
        assert step.ended() == code and words in step.text(), step.text()
        wait_for(lambda server=cluster: not server.objects["trainjobs"], 2)
        assert cluster.unknown == []
        assert step.text().count("\nerror: ") <= 1 and "Traceback" not in step.text()
        cluster.close()


def test_a_missing_checkpoint_is_a_failure(cluster: KubeServer, shards: ShardSet, tmp_path: Path) -> None:
    step = Step(cluster, tmp_path, "components.train", *map(str, flags("train", tmp_path, json.dumps(TRAIN))))
    cluster.made()
    complete(cluster, both_run(cluster))
    assert step.ended() == 78, step.text()
    assert not (tmp_path / "m/train.json").exists()


@pytest.mark.faults
def test_the_outputs_of_a_finished_training(
    cluster: KubeServer, shards: ShardSet, params_file: Path, tmp_path: Path
) -> None:
    arguments = [*map(str, flags("train", tmp_path, params_file))]
    arguments += ["--executor-input", executor_input(tmp_path / "out.json")]
    step = Step(cluster, tmp_path, "components.train", *arguments)
    made = cluster.made()
    scratch = {"/tmp/curves.csv": tmp_path / "pod/curves.csv", "/tmp/train.json": tmp_path / "pod/train.json"}
    inside = [scratch.get(part, part) for part in made["spec"]["trainer"]["args"][4:]]
    assert scratch.keys() <= set(made["spec"]["trainer"]["args"])
    assert program("train", *inside, cwd=tmp_path).returncode == 0
    complete(cluster, both_run(cluster))
    assert step.ended(60) == 0, step.text()
    output = json.loads((tmp_path / "out.json").read_text())
    assert output["parameterValues"]["checkpoint"].startswith(f"{tmp_path}/model#")
    assert json.loads((tmp_path / "m/train.json").read_text())["samples"] != "0" * 16


def failed(code: int | None, **status: Any) -> dict[str, Any]:
    state = {} if code is None else {"state": {"terminated": {"exitCode": code, "reason": "Error"}}}
    return {
        "metadata": {"name": "p"},
        "status": {"phase": "Failed", "containerStatuses": [{"name": "node", **state}], **status},
    }


DISRUPTED = {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]}


@pytest.mark.parametrize(
    ("pods", "code"),
    [
        ([failed(75), failed(65)], 65), ([failed(1), failed(64)], 64), ([failed(75), failed(1)], 1),
        ([failed(139), failed(75)], 1), ([failed(74), failed(75)], 74), ([failed(137), failed(75)], 75),
        ([failed(143)], 75), ([failed(None, reason="Evicted", message="low on memory")], 75),
        ([failed(1, **DISRUPTED)], 75), ([failed(78, **DISRUPTED)], 78), ([], 75),
    ],
)  # fmt: skip
def test_the_exit_code_of_a_step_by_those_of_its_pods(pods: list[dict[str, Any]], code: int) -> None:
    assert exit_code([found for pod in pods if (found := end(pod))]) == code


def test_the_text_of_a_pods_end() -> None:
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    pod = failed(None, containerStatuses=[{"name": "node", "state": killed, "lastState": killed}], **DISRUPTED)
    found = end(pod)
    assert found and found.text == (
        "exit code 137 (OOMKilled); disrupted (PreemptionByScheduler); before that, exit code 137 (OOMKilled)"
    )


RBAC = """pods is forbidden: User "system:serviceaccount:team:runner" cannot list resource "pods" in API group "" in \
the namespace "team\""""
ROLE, OLD, RUNTIME = "deploy/ ships the Role", "the cluster has an older one", "trainer ships the TrainingRuntime"


@pytest.mark.parametrize(
    ("status", "message", "hint"),
    [
        # k8s.io/apiserver, pkg/endpoints/handlers/responsewriters/errors.go; an authorizer's reason may follow
        (403, RBAC, ROLE),
        (403, f"{RBAC}: Azure does not have opinion for this user.", ROLE),
        (403, 'trainjobs "x" is forbidden: User "u" cannot create path "/apis"', ROLE),
        # k8s.io/apiserver, pkg/admission/plugin/resourcequota
        (403, 'trainjobs "x" is forbidden: exceeded quota: q, requested: count/trainjobs=1, limited: 0', ""),
        # k8s.io/apiserver, pkg/admission/plugin/webhook/errors/statuserror.go: up to 1.34, and master in 2026
        (403, 'admission webhook "policy.example.com" denied the request: GPU pods need a cost centre', ""),
        (403, 'trainjobs "x" is forbidden: admission webhook "policy.example.com" denied the request: no', ""),
        # strict field validation of k8s.io/apiserver, with the CRD of Trainer 2.1
        (400, """TrainJob in version "v1alpha1" cannot be handled as a TrainJob: strict decoding error: unknown field \
"spec.podTemplateOverride", unknown field "spec.runtimePatches\"""", OLD),
        (400, 'strict decoding error: unknown field "spec.trainer.color"', "Check the step's arguments"),
        # pkg/runtime/core/trainingruntime.go, the same in Trainer 2.0.0, 2.0.1, 2.1.0, 2.2.0, 2.2.1 and 2.3.0
        *((status, """admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: spec.runtimeRef: \
Invalid value: TrainingRuntime.trainer.kubeflow.org "vgg-train" not found: specified trainingRuntime must be created \
before the TrainJob is created""", RUNTIME) for status in (403, 422)),
    ],
)  # fmt: skip
def test_refusals_that_differ_only_in_their_text(status: int, message: str, hint: str) -> None:
    error = ApiException(status=status, reason="Refused")
    error.body = json.dumps({"message": message})
    found = str(explain(error, "create trainjobs", "team"))
    hints = {text for text in (ROLE, OLD, RUNTIME, "Check the step's arguments") if text in found}
    assert hints == ({hint} if hint else set()) and message.rstrip(".") in found


def test_a_log_that_is_read_again_has_every_line_once() -> None:
    """Cut after every line; the API starts again at a whole second."""
    at = datetime(2026, 1, 1, tzinfo=UTC)
    seconds = (0.1, 0.5, 0.5, 0.9, 1.0, 1.2, 4.0, 4.0, 3.9, 9.0)
    log = [f"{stamp(at + timedelta(seconds=second))} text {second}" for second in seconds]
    for cut in range(len(log) + 1):
        position = Position()
        read = [text for line in log[:cut] if (text := position.new(line)) is not None]
        since = position.since() or ""
        read += [text for line in log if line[:19] >= since[:19] and (text := position.new(line)) is not None]
        assert read == [f"text {second}" for second in seconds], cut


def test_one_node_becomes_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []

    def execv(_path: str, command: list[str]) -> None:
        became.append(command[1:])
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    for gpus, ranks in (("0", "1"), ("8", "8")):
        with pytest.raises(SystemExit):
            trainjob.main(
                ["--nodes", "1", "--gpus", gpus, "--cpu", "1", "--memory", "1Gi", "components.train", "--params", "p"]
            )
        assert became.pop() == ["-m", "components.launch", ranks, "components.train", "--params", "p"]


def described(*changes: str) -> dict[str, Any]:
    """The TrainJob of some arguments."""
    return body(trainjob.parser().parse_args([*FLAGS, *changes, "components.train", *ARGUMENTS]))


def test_the_name_is_of_the_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGG_PIPELINE_RUN", RUN)
    name = described()["metadata"]["name"]
    assert described()["metadata"]["name"] == name and len(name) == 20
    assert described("--nodes", "3")["metadata"]["name"] != name
    monkeypatch.setenv("VGG_PIPELINE_RUN", "another")
    assert described()["metadata"]["name"] != name


@pytest.mark.parametrize(
    ("flag", "text", "words"),
    [
        ("--node-selector", "pool=gpu", "is not JSON"),
        ("--node-selector", '{"gpu": true}', "must be a JSON object of strings"),
        ("--tolerations", '{"key": "gpu"}', "must be a JSON list"),
        ("--tolerations", '[{"keys": "gpu"}]', "must be a JSON list"),
    ],
)
def test_wrong_pools(flag: str, text: str, words: str) -> None:
    with pytest.raises(WrongParameters, match=words):
        described(flag, text)


def test_resources_are_required_and_objects_are_referenced_only_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    resources = ["--nodes", "2", "--gpus", "4", "--cpu", "16", "--memory", "64Gi"]
    for at in range(0, len(resources), 2):
        with pytest.raises(SystemExit) as ended:
            trainjob.parser().parse_args([*resources[:at], *resources[at + 2 :], "components.train"])
        assert ended.value.code == 64
        assert f"required: {resources[at]}" in capsys.readouterr().err
    spec = body(trainjob.parser().parse_args([*resources, "components.train"]))["spec"]
    assert not [variable for variable in spec["trainer"]["env"] if "valueFrom" in variable]
    assert "volumes" not in json.dumps(spec["runtimePatches"])
