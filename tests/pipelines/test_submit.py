"""Submission: the real program and client, against fakes of Kubeflow, Kubernetes and a registry over real HTTP."""

# fixtures

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment
from kfpserver import Fault, Frame, KfpServer
from kfpstate import WHEN
from kfpworld import CANARIES, World, package, world  # noqa: F401
from kubeobjects import Http

from pipelines import arguments, submit
from pipelines.definition.package import Package
from pipelines.kfp import failure, links, server
from runtime.errors import Preempted, Problem, Refused, Unreachable, WrongParameters


def test_the_fake_serves_the_real_client(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kfp.Client runs a whole pipeline against the fake, so the fake behaves like a server."""
    import kfp

    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    path = tmp_path / "vgg-imagenet.yaml"
    path.write_text(package.text)
    arguments = {name: {} for name in ("shard", "train", "evaluate", "register")}
    with KfpServer() as fake, pytest.warns(FutureWarning):
        client = kfp.Client(host=fake.endpoint, existing_token="t", cookies="c=1")
        experiment = client.create_experiment("an experiment").experiment_id
        assert client.create_experiment("an experiment").experiment_id == experiment
        pipeline = client.upload_pipeline(str(path), "vgg-imagenet").pipeline_id
        version = client.upload_pipeline_version(str(path), "1", pipeline_name="vgg-imagenet").pipeline_version_id
        assert len(client.list_pipeline_versions(pipeline).pipeline_versions) == 2
        run = client.run_pipeline(experiment, "a run", None, arguments, pipeline, version)
        assert client.list_runs(experiment_id=experiment, sort_by="created_at desc").runs[0].run_id == run.run_id
        assert client.wait_for_run_completion(run.run_id, 10, sleep_duration=0).state == "SUCCEEDED"
        second = client.run_pipeline(experiment, "another run", None, arguments, pipeline, version).run_id
        page = client.list_runs(page_size=1, sort_by="created_at desc")
        assert (page.total_size, page.runs[0].run_id) == (2, second)
        (last,) = client.list_runs(page.next_page_token, page_size=1, sort_by="created_at desc").runs
        assert last.run_id == run.run_id
        client.terminate_run(second)
        assert client.get_run(second).state == "CANCELING"
        with pytest.raises(kfp.client.client.kfp_server_api.ApiException, match="Row not found"):
            client.terminate_run(run.run_id)
        again = {"pipeline_id": pipeline, "version_id": version, "params": arguments, "cron_expression": "0 0 3 * * 0"}
        client.create_recurring_run(experiment, "by the clock", **again)
        assert len(client.list_recurring_runs(experiment_id=experiment).recurring_runs) == 1
        assert not fake.surprises
        with pytest.raises(kfp.client.client.kfp_server_api.ApiException, match="is not optional"):
            client.run_pipeline(experiment, "a run", None, {}, pipeline, version)


def test_submitting_again_finds_the_same_run(world: World) -> None:
    world.kfp.frames = [Frame("RUNNING")]
    flags = [*world.images(), "-S", "train.epochs=3", "-C", "gpus=8", "-C", "nodes=2", "-C", "train_cpu=32"]
    output = world.submit(*flags)
    run = world.run()
    assert f"{world.kfp.endpoint}/#/runs/details/{run['run_id']}" in output
    search = "experiment vgg-imagenet, search: tags.`vgg.lineage` = '"
    assert f"http://mlflow.invalid:5000/#/experiments  ({search}" in output
    given = run["runtime_config"]["parameters"]
    assert (given["train"]["epochs"], given["gpus"], given["nodes"], given["train_cpu"]) == (3, 8, 2, "32")
    assert given["step_gpus"] == "0"  # the step only supervises a TrainJob
    for name in world.package.images:
        assert given[name] == world.registry.push(f"vgg/{name}:1")  # by digest
    (version,) = world.kfp.versions
    assert world.package.is_spec(version["pipeline_spec"])
    assert "the same run is already active" in world.submit(*flags)
    assert len(world.kfp.runs) == len(world.kfp.versions) == len(world.kfp.experiments) == len(world.kfp.pipelines) == 1


def test_any_difference_starts_another_run(world: World) -> None:
    world.kfp.frames = [Frame("RUNNING")]
    flags = world.images()
    for changed in ([], ["-S", "train.seed=2"], ["-C", "nodes=2"], ["--again"]):
        world.submit(*flags, *changed)
    world.registry.push("vgg/train_image:1", "another image under the same tag")
    world.submit(*flags)
    assert len(world.kfp.runs) == 5
    for run in world.kfp.runs:
        run["state"] = "SUCCEEDED"
    world.submit(*flags)
    assert len(world.kfp.runs) == 6  # a run that has ended is not continued


@pytest.mark.parametrize("kind", [503, "reset", "late"])
def test_faults_cause_no_duplicates(kind: int | str, world: World) -> None:
    """Every request fails once, or is applied and answered with 500."""
    paths = ("experiments", "pipelines", "pipelines/upload_version", "runs")
    world.kfp.faults = [Fault("POST", f"/{path}$", kind) for path in paths]
    world.kfp.faults += [Fault("GET", "/", kind, times=2)] if kind != "late" else []
    world.submit("--no-image-check")
    made = (world.kfp.experiments, world.kfp.pipelines, world.kfp.versions, world.kfp.runs)
    assert [len(one) for one in made] == [1, 1, 1, 1]
    assert not [fault for fault in world.kfp.faults if fault.times]


def test_a_run_that_cannot_be_started_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.kfp.faults = [Fault("POST", "/runs$", 500, times=999)]
    monkeypatch.setattr(server, "SETTLING_SECONDS", 0.2)
    with pytest.raises(Unreachable, match=r"500: .*Nothing was changed within \d+ s; run the same command again"):
        world.submit("--no-image-check")


def test_all_errors_are_reported_at_once_before_any_request(world: World) -> None:
    wrong = [
        *("-S", "train.epoch=1"), *("-S", "train.batch_size=many"), *("-C", "gpu=2"), *("-C", "nodes=two"),
        *("-C", "nodes=0"), *("-C", "tolerations={}"), *("-C", "train=1"), *("-C", "claim"), *("-C", "images=[a"),
    ]  # fmt: skip
    with pytest.raises(WrongParameters) as caught:
        world.submit(*wrong)
    for part in (
        "-S train.epoch=1: no such parameter; did you mean 'epochs'?",
        "train.batch_size: must be an integer",
        "-C gpu=2: no such run argument; did you mean 'gpus'?",
        "-C nodes=two: must be an integer",
        "-C nodes=0: must be 1 or more",
        "-C tolerations={}: must be a list, […]",
        "-C train=1: is a section of params.yaml",
        "-C claim: write claim=VALUE, a string",
        "-C images=[a: invalid YAML",
    ):
        assert part in str(caught.value)
    assert not world.kfp.seen


def test_resources_of_the_training_step(package: Package) -> None:
    """Those of training, or small ones if it supervises a TrainJob; requests never above limits."""

    def step(*settings: str) -> list[str]:
        found = arguments.gather(package, str(ROOT / "params.yaml"), [], list(settings))
        return [found[f"step_{name}"] for name in ("cpu", "cpu_request", "memory", "memory_request")]

    assert step("train_cpu=4", "train_memory=9Gi") == ["4", "4", "9Gi", "9Gi"]
    assert step("nodes=2") == ["2", "100m", "8Gi", "2Gi"]
    assert step("nodes=2", "step_cpu=1") == ["1", "1", "8Gi", "2Gi"]
    with pytest.raises(WrongParameters) as caught:
        step("report_cpu_request=3", "gate_memory_request=4097Mi", "register_memory=2Gi")
    assert str(caught.value).splitlines() == [
        "-C gate_memory_request=4097Mi is greater than gate_memory=4Gi",
        "-C report_cpu_request=3 is greater than report_cpu=2",
    ]


def test_values_are_yaml_and_strings_stay_strings(package: Package) -> None:
    given = ["train_cpu=16", "claim=", "images=/store/a b", "node_selector={pool: gpu}", "gpu_type='x/y'", "gpus=0"]
    found = arguments.gather(package, str(ROOT / "params.yaml"), [], given)
    wanted = {"train_cpu": "16", "claim": "", "images": "/store/a b", "node_selector": {"pool": "gpu"}, "gpus": 0}
    assert {**found, **wanted, "gpu_type": "x/y"} == found


def test_a_version_of_this_name_must_be_this_package(world: World) -> None:
    world.submit("--no-image-check", "--version", "mine")
    world.kfp.versions[0]["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"].pop("claim")
    with pytest.raises(Refused, match="version mine of pipeline vgg-imagenet exists and is another package"):
        world.submit("--no-image-check", "--version", "mine")


def test_waiting_logs_every_change_and_the_end(world: World) -> None:
    steps = {"shard": "SUCCEEDED", "train": "RUNNING"}
    world.kfp.frames = [
        Frame("PENDING"), Frame("RUNNING", {"shard": "RUNNING"}), Frame("RUNNING", steps), Frame("RUNNING", steps),
        Frame("SUCCEEDED", dict.fromkeys(("shard", "train", "report"), "SUCCEEDED")),
    ]  # fmt: skip
    world.kfp.faults = [Fault("GET", "/runs/", 502, times=2), Fault("GET", "/runs/", "reset")]
    output = world.submit("--no-image-check", "--wait")
    changes = [" ".join(line.split()[3:]) for line in output.splitlines() if "  task " in line or "  run " in line]
    assert changes == [
        "run PENDING", "task shard RUNNING", "run RUNNING", "task shard SUCCEEDED", "task train RUNNING",
        "task train SUCCEEDED", "task report SUCCEEDED", "run SUCCEEDED",
    ]  # fmt: skip


LOG = "".join(f"line {n}\n" for n in range(60)) + (
    "components.train failed with exit code 75; retrying in 30 s (attempt 2 of 6)\nerror: vgg: damaged\n"
    "components.train: exit code 78\n"
    "F1125 10:00:00.000000      41 main.go:30] failed to execute component: exit status 78\n"
)
FAILED = Frame("FAILED", {"shard": "SUCCEEDED", "train": "FAILED", "report": "SUCCEEDED"})


def test_a_failed_run_reports_the_task_its_last_lines_and_its_exit_code(world: World) -> None:
    world.kfp.frames = [Frame("RUNNING"), FAILED]
    world.kfp.logs["vgg-imagenet-x7k2p-system-container-impl-115"] = LOG
    with pytest.raises(Problem, match=r"task train failed: main: Error \(exit code 1\)") as caught:
        world.submit("--no-image-check", "--wait")
    assert caught.value.exit_code == 78
    assert "  | error: vgg: damaged\n" in str(caught.value)
    assert "line 59" in str(caught.value) and "line 29" not in str(caught.value)
    world.kfp.logs.clear()
    with pytest.raises(Problem, match=r"log not available .*vgg-imagenet-x7k2p-sys") as caught:
        world.submit("wait", world.run()["run_id"])
    assert caught.value.exit_code == 1


def test_failed_tasks_are_in_order_and_have_exit_codes_without_a_log(world: World) -> None:
    """A training pod was deleted and created again; then the gate was refused."""
    steps = {"shard": "SUCCEEDED", "train": "SUCCEEDED", "evaluate": "SUCCEEDED", "gate": "FAILED", "report": "FAILED"}
    messages = {
        "gate": "components.register.gate: exit code 78: error: e.json: lacks modes. Run the evaluate stage.",
        "report": "components.report: exit code 64",
    }
    world.kfp.frames = [Frame("FAILED", steps, messages, lost=("train", "gate"))]
    with pytest.raises(Problem) as caught:
        world.submit("--no-image-check", "--wait")
    assert caught.value.exit_code == 78
    tasks = re.findall(r"^task (\w+) failed: (.*)", str(caught.value), re.MULTILINE)
    assert tasks == [(step, f"main: Error (exit code 1): {words}") for step, words in messages.items()]


def test_an_attempt_that_was_retried_is_no_failure(world: World) -> None:
    """A training pod was deleted and created again; the run failed for a reason that the server does not tell."""
    steps = {"shard": "SUCCEEDED", "train": "SUCCEEDED", "report": "SUCCEEDED"}
    world.kfp.frames = [Frame("FAILED", steps, lost=("train",))]
    world.submit("--no-image-check")
    for workflows in (True, False):  # without: from the list of tasks
        world.kfp.workflows = workflows
        with pytest.raises(Problem, match="FAILED") as caught:
            world.submit("wait", world.run()["run_id"])
        assert not re.findall(r"train|executor|\(0\)", str(caught.value))


def test_a_failed_run_is_explained_from_its_pods_if_kubeflow_has_no_reason(world: World) -> None:
    world.kfp.frames, world.kfp.workflows = [FAILED], False
    world.submit("--no-image-check")
    run_id = world.run()["run_id"]
    terminated = {"name": "main", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    pods = [
        {
            "metadata": {"name": name, "labels": {"pipeline/runid": run_id, "vgg.stage": name.split("-")[2]}},
            "status": {"phase": phase, "startTime": WHEN.format(number), "containerStatuses": [terminated]},
        }
        for number, (name, phase) in enumerate((
            ("pod-of-shard-lost", "Failed"), ("pod-of-shard", "Succeeded"), ("pod-of-train", "Failed"),
        ))
    ]  # fmt: skip
    world.kube.put("pods", items=pods)
    world.kube.logs["pod-of-train"] = '{"loss": 6.9}\ncomponents.train: exit code 75\n'
    with pytest.raises(Problem, match=r'task train failed: OOMKilled\n  \| {"loss": 6.9}') as caught:
        world.submit("wait", run_id)
    assert caught.value.exit_code == 75
    world.kube.forbidden = {""}
    with pytest.raises(Problem, match=r"task train failed\n  log not available .*kubectl get pods -l pipeline/runid="):
        world.submit("wait", run_id)
    world.kfp.task_errors, world.kfp.logs["pod-of-train"] = True, "its last line\n"
    with pytest.raises(Problem, match=r"task train failed: out of memory\n  \| its last line"):
        world.submit("wait", run_id)


# Display names in the list of tasks, by version of Kubeflow Pipelines: of steps, and of other nodes of the graph.
NODES = {
    "2.17.0": (
        ("shard", "train", "evaluate", "gate", "register", "report"),
        (
            "vgg-imagenet-x7k2p", "root", "run", "exit-handler-1", "condition-2", "for-loop-1", "gate-is-open",
            "executor", "executor(0)", "train(1)", "train-driver", "root-driver", "vgg-imagenet-x7k2p.onExit",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("version", NODES)
def test_steps_are_recognized_by_their_names(version: str) -> None:
    steps, others = NODES[version]
    assert all(map(failure.is_step, steps)) and not any(map(failure.is_step, others))
    assert [name for name in (*steps, *others) if failure.is_driver(name)] == ["train-driver", "root-driver"]


def test_the_exit_code_is_read_from_the_message_of_components_step(tmp_path: Path) -> None:
    """From its real output: the termination message, and the log."""
    message = tmp_path / "message"
    message.touch()
    command = [sys.executable, "-m", "components.step", "--last-words", str(message), "components.report", "--wrong"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 64
    assert failure.FailedTask("report", message=f"main: Error (exit code 1): {message.read_text()}").exit_code == 64
    assert failure.FailedTask("report", log=done.stderr.splitlines()).exit_code == 64
    assert failure.FailedTask("report", message="main: Error (exit code 1)").exit_code == 1


@pytest.mark.parametrize("states", ["RUNNING CANCELED", "RUNNING CANCELING FAILED", "RUNNING FAILED"])
def test_a_canceled_run_is_distinguished_from_a_failed_one(states: str, world: World) -> None:
    """Server 2.17 calls it FAILED; earlier states or the workflow show that it was stopped."""
    world.kfp.frames = [Frame(state) for state in states.split()]
    world.kfp.terminated = states == "RUNNING FAILED"
    with pytest.raises(Preempted, match="was canceled; to continue: resume"):
        world.submit("--no-image-check", "--wait")
    with pytest.raises(Preempted, match="was canceled"):
        world.submit("wait", world.run()["run_id"])


def test_why_pods_wait_is_said_once(world: World) -> None:
    world.kfp.frames = [Frame("RUNNING"), Frame("RUNNING"), Frame("SUCCEEDED")]
    world.submit("--no-image-check")
    run_id = world.run()["run_id"]
    full = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    full |= {"message": "0/2 nodes are available: 2 Insufficient memory."}
    back = {"name": "node", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}}
    made = {"name": "node", "state": {"waiting": {"reason": "ContainerCreating"}}}
    pods = [
        {"metadata": {"name": name, "labels": {label: run_id}}, "status": {"phase": phase, **status}}
        for name, label, phase, status in (
            ("step", "pipeline/runid", "Running", {"conditions": [{**full, "status": "True"}]}),
            ("node-0", "vgg.pipeline-run", "Pending", {"conditions": [full]}),
            ("node-1", "vgg.pipeline-run", "Pending", {"containerStatuses": [back]}),
            ("node-2", "vgg.pipeline-run", "Pending", {"containerStatuses": [made]}),
        )
    ]
    world.kube.put("pods", items=pods)
    said = re.findall(r"pod \S+ waits: .*", world.submit("wait", run_id))
    assert said == [
        "pod node-0 waits: Unschedulable: 0/2 nodes are available: 2 Insufficient memory.",
        "pod node-1 waits: ImagePullBackOff: Back-off pulling image",
    ]
    world.kube.forbidden = {"/pods"}
    world.kfp.upcoming[run_id] = [Frame("RUNNING"), Frame("RUNNING"), Frame("SUCCEEDED")]
    assert world.submit("wait", run_id).count("is not shown: no permission to read") == 1


def test_waiting_for_a_lost_server_ends(world: World) -> None:
    world.kfp.frames = [Frame("RUNNING")]
    world.kfp.faults = [Fault("GET", "/runs/", 503, times=9999)]
    with pytest.raises(Unreachable, match="503: upstream connect error"):
        world.submit("--no-image-check", "--wait", "--patience", "0.3")
    world.kfp.http.server_close()
    with pytest.raises(Unreachable, match=r"Is the address right, and the port forwarded?"):
        world.submit("--no-image-check", "--patience", "0.1")


def test_resume_runs_failed_tasks_again(world: World) -> None:
    world.kfp.frames = [FAILED]
    world.submit("--no-image-check")
    run_id = world.run()["run_id"]
    with pytest.raises(Problem, match="FAILED"):
        world.submit("wait", run_id)
    world.kfp.retried = [Frame("RUNNING"), Frame("SUCCEEDED")]
    world.kfp.faults = [Fault("POST", ":retry$", "late")]
    assert "SUCCEEDED" in world.submit("resume", run_id, "--wait")
    assert world.kfp.seen.count(f"POST /runs/{run_id}:retry") == 1
    with pytest.raises(Refused, match="SUCCEEDED; there is nothing to resume"):
        world.submit("resume", run_id)
    unknown = "00000000-0000-0000-0000-000000000000"
    with pytest.raises(Refused, match=f"404: Run {unknown} not found"):
        world.submit("resume", unknown)


def test_sharding_reads_images_without_a_version_again(world: World) -> None:
    world.kfp.frames = [Frame("RUNNING")]
    flags = ["--no-image-check", "-S", "shard.source=folder", "-C", "images=/store/images"]
    assert "images_version=20" in world.submit(*flags)
    first = world.run()["runtime_config"]["parameters"]["images_version"]
    assert first.endswith("Z")
    world.submit(*flags)
    assert len(world.kfp.runs) == 1  # the fresh value is not part of the identity
    world.submit(*flags, "-C", "images_version=2012")
    assert world.kfp.runs[1]["runtime_config"]["parameters"]["images_version"] == "2012"
    world.submit("--no-image-check")  # digits
    assert "images_version" not in world.kfp.runs[2]["runtime_config"]["parameters"]


def test_recurring_runs_see_new_images(world: World) -> None:
    flags = ["--no-image-check", "-S", "shard.source=folder", "-C", "images=/store/images"]
    with pytest.raises(WrongParameters, match=r'six fields, and the first is seconds\. Perhaps "0 0 3 '):
        world.submit(*flags, "--recurring", "0 3 * * 0")
    with pytest.raises(WrongParameters, match="nothing to --wait for"):
        world.submit(*flags, "--recurring", "0 0 3 * * 0", "--wait")
    for _ in range(2):
        output = world.submit(*flags, "--recurring", "0 0 3 * * 0")
    assert "/#/recurringrun/details/" in output
    (recurring,) = world.kfp.recurring
    assert (recurring["max_concurrency"], recurring["no_catchup"], recurring["mode"]) == (1, True, "ENABLE")
    (version,) = world.kfp.versions
    caching = cached(version["pipeline_spec"]["pipeline_spec"])
    assert not caching["shard"] and caching["train"]  # its arguments never change, so it would always be cached
    assert version["name"].endswith("-recurring")
    world.submit("--no-image-check", "--recurring", "0 0 4 * * 0")
    assert cached(world.kfp.versions[1]["pipeline_spec"]["pipeline_spec"])["shard"]  # digits do not change


def cached(spec: dict[str, Any]) -> dict[str, bool]:
    """Whether a task may be taken from the cache, by its name."""
    graphs = [
        component["dag"]["tasks"] for component in (spec["root"], *spec["components"].values()) if "dag" in component
    ]
    tasks = {name: task for graph in graphs for name, task in graph.items()}
    return {name: task.get("cachingOptions", {}).get("enableCache", False) for name, task in tasks.items()}


def test_mlflow_is_found_by_the_tag_that_the_stages_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from components.tracking import access, provenance

    monkeypatch.setenv("VGG_PIPELINE_RUN", "a-run")
    assert links.lineage("a-run") == provenance.lineage("{}")
    assert links.EXPERIMENT == access.EXPERIMENT


def test_mlflow_links(world: World) -> None:
    with Tracking() as mlflow:
        world.kube.put("configmaps/vgg-addresses", data={"VGG_STORE": "/store", "MLFLOW_TRACKING_URI": mlflow.uri})
        output = world.submit("--no-image-check")
        query = f"searchFilter=tags.%60vgg.lineage%60%20%3D%20%27{links.lineage(world.run()['run_id'])}%27"
        assert f"MLflow:   http://{mlflow.host}/#/experiments/7/runs?{query}" in output
    world.kfp.mlflow_url = "https://mlflow.invalid/#/experiments/7/runs/1"
    assert f"MLflow:   {world.kfp.mlflow_url}\n" in world.submit("--no-image-check", "--again")


class Tracking(Http):
    """An MLflow with experiments by name."""

    @property
    def uri(self) -> str:
        return f"http://user:canary-in-uri@{self.host}/"

    def respond(self, method: str, path: str, query: dict[str, str], headers: Any) -> tuple[int, dict[str, str], bytes]:
        assert path == "/api/2.0/mlflow/experiments/get-by-name" and not headers.get("Authorization")
        return 200, {}, json.dumps({"experiment": {"experiment_id": "7", "name": query["experiment_name"]}}).encode()


def test_locally_the_same_arguments_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import local

    started: list[dict[str, Any]] = []
    monkeypatch.setattr(local, "run", started.append)
    submit.main(["--local", "--params", str(ROOT / "params.yaml"), "-S", "train.epochs=1", "-C", "gpus=0"])
    assert started[0]["train"]["epochs"] == 1 and started[0]["gpus"] == 0
    assert not world.kfp.seen


def test_locally_a_wrong_address_of_mlflow_starts_no_container(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import local

    monkeypatch.setenv("VGG_STORE", "/store")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlflow:5000")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")
    with pytest.raises(WrongParameters, match="MLFLOW_TRACKING_URI=mlflow:5000: write http://mlflow:5000"):
        local.run({})


def test_the_program_itself(world: World, tmp_path: Path) -> None:
    """As a process: fast help, exit codes, and no secrets in its output."""
    started = time.monotonic()
    assert "resume RUN:" in program(tmp_path, "--help").stdout
    assert time.monotonic() - started < 1.5  # 0.2 s on an idle machine
    world.kfp.frames, world.kfp.token = [Frame("RUNNING"), FAILED], "canary-of-a-token"
    world.kfp.logs["vgg-imagenet-x7k2p-system-container-impl-115"] = LOG
    known = {name: os.environ[name] for name in ("KUBECONFIG", "REGISTRY_AUTH_FILE")}
    flags = ["--host", world.kfp.endpoint, "--params", str(ROOT / "params.yaml"), "--poll", "0.1", "--wait"]
    done = program(tmp_path, *flags, *world.images(), KF_PIPELINES_TOKEN="canary-of-a-token", **known)
    assert done.returncode == 78, done.stderr
    assert "error: vgg: damaged" in done.stderr and "/#/runs/details/" in done.stdout
    assert "Traceback" not in done.stderr and not [c for c in CANARIES if c in done.stdout + done.stderr]
    assert not world.kfp.surprises


def program(cwd: Path, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.submit", *flags]
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=60)
