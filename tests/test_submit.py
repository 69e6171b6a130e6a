"""Submitting: the real program and client, against Kubeflow's API, Kubernetes and a registry over real HTTP."""

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

from pipelines import arguments, links, server, submit
from pipelines.package import Package
from vgg.errors import Preempted, Problem, Refused, Unreachable, WrongParameters


def test_the_fake_serves_the_real_client(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kfp.Client itself, through all that it does to run a pipeline: so the fake is no invention."""
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
        again = {"pipeline_id": pipeline, "version_id": version, "params": arguments, "cron_expression": "0 0 3 * * 0"}
        client.create_recurring_run(experiment, "by the clock", **again)
        assert len(client.list_recurring_runs(experiment_id=experiment).recurring_runs) == 1
        assert not fake.surprises
        with pytest.raises(kfp.client.client.kfp_server_api.ApiException, match="is not optional"):
            client.run_pipeline(experiment, "a run", None, {}, pipeline, version)


def test_submitted_twice_one_run_is_there(world: World) -> None:
    world.kfp.frames = [Frame("RUNNING")]
    flags = [*world.images(), "-S", "train.epochs=3", "-C", "gpus=8", "-C", "nodes=2", "-C", "train_cpu=32"]
    said = world.submit(*flags)
    run = world.run()
    assert f"{world.kfp.endpoint}/#/runs/details/{run['run_id']}" in said
    assert "http://mlflow.invalid:5000/#/experiments  (experiment vgg-imagenet, search: tags.`vgg.lineage` = '" in said
    given = run["runtime_config"]["parameters"]
    assert (given["train"]["epochs"], given["gpus"], given["nodes"], given["train_cpu"]) == (3, 8, 2, "32")
    assert given["step_gpus"] == "0"  # the step that watches over a TrainJob trains nothing
    for name in world.package.images:
        assert given[name] == world.registry.push(f"vgg/{name}:1")  # by digest
    (version,) = world.kfp.versions
    assert world.package.is_spec(version["pipeline_spec"])
    assert "the same run is under way" in world.submit(*flags)
    assert len(world.kfp.runs) == len(world.kfp.versions) == len(world.kfp.experiments) == len(world.kfp.pipelines) == 1


def test_what_differs_is_another_run(world: World) -> None:
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
    assert len(world.kfp.runs) == 6  # one that has ended is not gone on with


@pytest.mark.parametrize("kind", [503, "reset", "late"])
def test_nothing_is_made_twice_through_faults(kind: int | str, world: World) -> None:
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
    with pytest.raises(Unreachable, match=r"500: .*Nothing has come of it; run the same command again"):
        world.submit("--no-image-check")


def test_every_mistake_is_told_at_once_before_anybody_is_asked(world: World) -> None:
    wrong = [
        *("-S", "train.epoch=1"), *("-S", "train.batch_size=many"), *("-C", "gpu=2"), *("-C", "nodes=two"),
        *("-C", "nodes=0"), *("-C", "tolerations={}"), *("-C", "train=1"), *("-C", "claim"), *("-C", "images=[a"),
    ]  # fmt: skip
    with pytest.raises(WrongParameters) as caught:
        world.submit(*wrong)
    for part in (
        "-S train.epoch=1: no such parameter; did you mean 'epochs'?",
        "train.batch_size: should be",
        "-C gpu=2: no such run argument; did you mean 'gpus'?",
        "-C nodes=two: must be a whole number",
        "-C nodes=0: must be 1 or more",
        "-C tolerations={}: must be a list, […]",
        "-C train=1: is a section of the parameters",
        "-C claim: write claim=VALUE, a text",
        "-C images=[a: not YAML",
    ):
        assert part in str(caught.value)
    assert not world.kfp.seen


def test_what_a_step_asks_of_its_node(package: Package) -> None:
    """The training step as much as it trains with; little where it watches over a TrainJob; never more than allowed."""

    def step(*settings: str) -> list[str]:
        found = arguments.gather(package, str(ROOT / "params.yaml"), [], list(settings))
        return [found[f"step_{name}"] for name in ("cpu", "cpu_request", "memory", "memory_request")]

    assert step("train_cpu=4", "train_memory=9Gi") == ["4", "4", "9Gi", "9Gi"]
    assert step("nodes=2") == ["2", "100m", "8Gi", "1Gi"]
    assert step("nodes=2", "step_cpu=1") == ["1", "1", "8Gi", "1Gi"]
    with pytest.raises(WrongParameters) as caught:
        step("report_cpu_request=3", "gate_memory_request=4097Mi", "register_memory=2Gi")
    assert str(caught.value).splitlines() == [
        "-C gate_memory_request=4097Mi is more than gate_memory=4Gi",
        "-C report_cpu_request=3 is more than report_cpu=2",
    ]


def test_values_are_yaml_and_texts_stay_texts(package: Package) -> None:
    given = ["train_cpu=16", "claim=", "images=/store/a b", "node_selector={pool: gpu}", "gpu_type='x/y'", "gpus=0"]
    found = arguments.gather(package, str(ROOT / "params.yaml"), [], given)
    wanted = {"train_cpu": "16", "claim": "", "images": "/store/a b", "node_selector": {"pool": "gpu"}, "gpus": 0}
    assert {**found, **wanted, "gpu_type": "x/y"} == found


def test_a_version_of_this_name_must_be_this_package(world: World) -> None:
    world.submit("--no-image-check", "--version", "mine")
    world.kfp.versions[0]["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"].pop("claim")
    with pytest.raises(Refused, match="version mine of pipeline vgg-imagenet is there already and is another package"):
        world.submit("--no-image-check", "--version", "mine")


def test_waiting_says_every_change_and_how_it_ended(world: World) -> None:
    steps = {"shard": "SUCCEEDED", "train": "RUNNING"}
    world.kfp.frames = [
        Frame("PENDING"), Frame("RUNNING", {"shard": "RUNNING"}), Frame("RUNNING", steps), Frame("RUNNING", steps),
        Frame("SUCCEEDED", dict.fromkeys(("shard", "train", "report"), "SUCCEEDED")),
    ]  # fmt: skip
    world.kfp.faults = [Fault("GET", "/runs/", 502, times=2), Fault("GET", "/runs/", "reset")]
    said = world.submit("--no-image-check", "--wait")
    told = [" ".join(line.split()[3:]) for line in said.splitlines() if "  task " in line or "  run " in line]
    assert told == [
        "run PENDING", "task shard RUNNING", "run RUNNING", "task shard SUCCEEDED", "task train RUNNING",
        "task train SUCCEEDED", "task report SUCCEEDED", "run SUCCEEDED",
    ]  # fmt: skip


LOG = "".join(f"line {n}\n" for n in range(60)) + (
    "components.train ended with 75; again in 30 s (attempt 2 of 6)\nerror: vgg: damaged\n"
    "components.train: exit code 78\n"
    "F1125 10:00:00.000000      41 main.go:30] failed to execute component: exit status 78\n"
)
FAILED = Frame("FAILED", {"shard": "SUCCEEDED", "train": "FAILED", "report": "SUCCEEDED"})


def test_a_failed_run_tells_the_task_its_last_lines_and_its_exit_code(world: World) -> None:
    world.kfp.frames = [Frame("RUNNING"), FAILED]
    world.kfp.logs["vgg-imagenet-x7k2p-system-container-impl-115"] = LOG
    with pytest.raises(Problem, match=r"task train failed: main: Error \(exit code 1\)") as caught:
        world.submit("--no-image-check", "--wait")
    assert caught.value.exit_code == 78
    assert "  | error: vgg: damaged\n" in str(caught.value)
    assert "line 59" in str(caught.value) and "line 29" not in str(caught.value)
    world.kfp.logs.clear()
    with pytest.raises(Problem, match=r"its log: not to be had from here .*vgg-imagenet-x7k2p-sys") as caught:
        world.submit("wait", world.run()["run_id"])
    assert caught.value.exit_code == 1


def test_what_failed_for_good_comes_first_and_tells_its_code_though_the_log_is_gone(world: World) -> None:
    """A training pod was deleted and made anew; then the gate was refused."""
    steps = {"shard": "SUCCEEDED", "train": "SUCCEEDED", "evaluate": "SUCCEEDED", "gate": "FAILED", "report": "FAILED"}
    said = {
        "gate": "components.register.gate: exit code 78: error: e.json: lacks modes. Run the evaluate stage.",
        "report": "components.report: exit code 64",
    }
    world.kfp.frames = [Frame("FAILED", steps, said, lost=("train", "gate"))]
    with pytest.raises(Problem) as caught:
        world.submit("--no-image-check", "--wait")
    assert caught.value.exit_code == 78
    told = re.findall(r"^task (\w+) failed: (.*)", str(caught.value), re.MULTILINE)
    assert told == [(step, f"main: Error (exit code 1): {words}") for step, words in said.items()]


def test_a_failed_run_is_explained_by_its_pods_where_kubeflow_cannot(world: World) -> None:
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
    with pytest.raises(Problem, match=r"task train failed\n  its log: .*kubectl get pods -l pipeline/runid="):
        world.submit("wait", run_id)
    world.kfp.tells_tasks, world.kfp.logs["pod-of-train"] = True, "its last line\n"
    with pytest.raises(Problem, match=r"task train failed: out of memory\n  \| its last line"):
        world.submit("wait", run_id)


@pytest.mark.parametrize("states", ["RUNNING CANCELED", "RUNNING CANCELING FAILED", "RUNNING FAILED"])
def test_a_canceled_run_is_told_from_a_failed_one(states: str, world: World) -> None:
    """Server 2.17 calls it FAILED; what was seen of it before, or the workflow, says that somebody stopped it."""
    world.kfp.frames = [Frame(state) for state in states.split()]
    world.kfp.terminated = states == "RUNNING FAILED"
    with pytest.raises(Preempted, match="was canceled; to go on: resume"):
        world.submit("--no-image-check", "--wait")
    with pytest.raises(Preempted, match="was canceled"):
        world.submit("wait", world.run()["run_id"])


def test_patience_with_a_server_that_is_gone_ends(world: World) -> None:
    world.kfp.frames = [Frame("RUNNING")]
    world.kfp.faults = [Fault("GET", "/runs/", 503, times=9999)]
    with pytest.raises(Unreachable, match="503: upstream connect error"):
        world.submit("--no-image-check", "--wait", "--patience", "0.3")
    world.kfp.http.server_close()
    with pytest.raises(Unreachable, match=r"Is the address right, and the port forwarded?"):
        world.submit("--no-image-check", "--patience", "0.1")


def test_resume_runs_what_failed_again(world: World) -> None:
    world.kfp.frames = [FAILED]
    world.submit("--no-image-check")
    run_id = world.run()["run_id"]
    with pytest.raises(Problem, match="FAILED"):
        world.submit("wait", run_id)
    world.kfp.retried = [Frame("RUNNING"), Frame("SUCCEEDED")]
    world.kfp.faults = [Fault("POST", ":retry$", "late")]
    assert "SUCCEEDED" in world.submit("resume", run_id, "--wait")
    assert world.kfp.seen.count(f"POST /runs/{run_id}:retry") == 1
    with pytest.raises(Refused, match="has SUCCEEDED; there is nothing to go on with"):
        world.submit("resume", run_id)
    with pytest.raises(Refused, match="404: Run 123 not found"):
        world.submit("resume", "123")


def test_sharding_looks_at_images_that_nobody_vouches_for(world: World) -> None:
    world.kfp.frames = [Frame("RUNNING")]
    flags = ["--no-image-check", "-S", "shard.source=folder", "-C", "images=/store/images"]
    assert "images_version=20" in world.submit(*flags)
    first = world.run()["runtime_config"]["parameters"]["images_version"]
    assert first.endswith("Z")
    world.submit(*flags)
    assert len(world.kfp.runs) == 1  # a fresh value makes no other run of it
    world.submit(*flags, "-C", "images_version=2012")
    assert world.kfp.runs[1]["runtime_config"]["parameters"]["images_version"] == "2012"
    world.submit("--no-image-check")  # digits
    assert "images_version" not in world.kfp.runs[2]["runtime_config"]["parameters"]


def test_recurring_runs_see_new_images(world: World) -> None:
    flags = ["--no-image-check", "-S", "shard.source=folder", "-C", "images=/store/images"]
    with pytest.raises(WrongParameters, match=r'six fields, the first of them seconds\. You may mean "0 0 3 '):
        world.submit(*flags, "--recurring", "0 3 * * 0")
    with pytest.raises(WrongParameters, match="no run to --wait for"):
        world.submit(*flags, "--recurring", "0 0 3 * * 0", "--wait")
    for _ in range(2):
        said = world.submit(*flags, "--recurring", "0 0 3 * * 0")
    assert "/#/recurringrun/details/" in said
    (recurring,) = world.kfp.recurring
    assert (recurring["max_concurrency"], recurring["no_catchup"], recurring["mode"]) == (1, True, "ENABLE")
    (version,) = world.kfp.versions
    caching = cached(version["pipeline_spec"]["pipeline_spec"])
    assert not caching["shard"] and caching["train"]  # its arguments are the same every time, so would the hit be
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


def test_mlflow_is_found_by_the_mark_that_the_stages_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from components import provenance, tracking

    monkeypatch.setenv("VGG_PIPELINE_RUN", "a-run")
    assert links.lineage("a-run") == provenance.lineage("{}")
    assert links.EXPERIMENT == tracking.EXPERIMENT


def test_mlflow_is_linked_as_well_as_it_can_be(world: World) -> None:
    with Tracking() as mlflow:
        world.kube.put("configmaps/vgg-addresses", data={"VGG_STORE": "/store", "MLFLOW_TRACKING_URI": mlflow.uri})
        said = world.submit("--no-image-check")
        query = f"searchFilter=tags.%60vgg.lineage%60%20%3D%20%27{links.lineage(world.run()['run_id'])}%27"
        assert f"MLflow:   http://{mlflow.host}/#/experiments/7/runs?{query}" in said
    world.kfp.mlflow_url = "https://mlflow.invalid/#/experiments/7/runs/1"
    assert f"MLflow:   {world.kfp.mlflow_url}\n" in world.submit("--no-image-check", "--again")


class Tracking(Http):
    """An MLflow that knows its experiments by name."""

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


def test_the_program_itself(world: World, tmp_path: Path) -> None:
    """As a process: help at once, exit codes, and nothing secret in its output."""
    began = time.monotonic()
    assert "resume RUN_ID" in program(tmp_path, "--help").stdout
    assert time.monotonic() - began < 1.5  # 0.2 s, where nothing else runs
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
