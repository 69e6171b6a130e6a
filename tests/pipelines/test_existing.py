"""Existing runs: list, logs and cancel, by ID, its beginning, or name; and the same from Python."""

# fixtures

from __future__ import annotations

import threading
from typing import Any

import pytest
from conftest import ROOT
from kfpserver import Fault, Frame
from kfpworld import World, package, world  # noqa: F401

from pipelines import submit
from pipelines.kfp import cancel, find
from pipelines.kfp.server import Server
from runtime.errors import Preempted, Refused, WrongParameters

POD = "vgg-imagenet-x7k2p-system-container-impl"


def pods(world: World, label: str = "pipeline/runid", **phases: str) -> None:
    """Pods of the only run in Kubernetes."""
    labels = {label: world.run()["run_id"]}
    full = {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]}
    found = [
        {
            "metadata": {"name": name, "labels": labels},
            "status": {"phase": phase, **(full if phase == "Pending" else {})},
        }
        for name, phase in phases.items()
    ]
    world.kube.put("pods", items=found)


def started(world: World, *frames: Frame) -> str:
    world.kfp.frames = list(frames)
    world.submit("--no-image-check")
    return str(world.run()["run_id"])


def test_runs_have_telling_names(world: World) -> None:
    world.kfp.frames = [Frame("RUNNING")]
    world.submit("--no-image-check", "-C", "gpus=0")
    world.submit(
        "--no-image-check", "--params", str(ROOT / "recipes/imagenet-d-jitter.yaml"), "-C", "images=/store/x",
        "-C", "nodes=2", "-C", "gpus=8", "-C", "initial=store:checkpoints/a#b",
    )  # fmt: skip
    names = [run["display_name"] for run in world.kfp.runs]
    assert names[0].startswith("D on digits, S 32-36, 10 epochs, seed 1, CPU, ")
    assert names[1].startswith("D on ilsvrc2012, S 256-512, 30 epochs, seed 1, 2 x 8 GPUs, ")
    assert max(map(len, names)) + 100 < 191 + len("0123456789ab-dirty-01234567")  # with the longest --version


def test_list_shows_our_runs_over_all_pages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no runs of this pipeline" in world.submit("list")
    monkeypatch.setattr(find, "PAGE", 2)
    run_id = started(world, Frame("RUNNING"))
    template = world.run()
    for number in range(1, 24):
        more: dict[str, Any] = {"run_id": f"{number:08x}{run_id[8:]}", "created_at": f"2026-11-25T11:00:{number:02}Z"}
        if number % 5 == 0:
            more |= {"experiment_id": "another", "pipeline_version_reference": {"pipeline_id": "another"}}
        if number == 21:
            more |= {"storage_state": "ARCHIVED"}
        if number == 22:  # terminated; 2.17 calls it FAILED
            more |= {"state": "FAILED", "state_history": [{"state": "CANCELING"}, {"state": "FAILED"}]}
            more |= {"finished_at": "2026-11-25T12:31:00Z"}
        world.kfp.runs.append({**template, **more})
    lines = world.submit("list").splitlines()
    assert lines[0].split() == ["ID", "STATE", "CREATED", "(UTC)", "TOOK", "NAME"]
    assert [int(line[:8], 16) for line in lines[1:-1]] == [n for n in range(23, 0, -1) if n % 5 and n != 21]
    assert lines[-1].startswith(run_id)  # the oldest, on the last page
    assert "CANCELED" in lines[2] and "1:30" in lines[2] and "D on digits" in lines[2]


def test_a_run_is_found_by_id_its_beginning_or_its_name(world: World) -> None:
    run_id = started(world, Frame("SUCCEEDED"))
    name = world.run()["display_name"]
    for text in (run_id, run_id[:6], name):
        assert f"run {name} SUCCEEDED" in world.submit("wait", text)
    other = {**world.run(), "run_id": run_id[:6] + run_id[6:][::-1], "display_name": "another"}
    world.kfp.runs.append(other)
    with pytest.raises(WrongParameters, match=r"of 2 runs\. Write more of the ID:") as caught:
        world.submit("wait", run_id[:6])
    assert all(text in str(caught.value) for text in (run_id, other["run_id"], "another", name))
    world.kfp.runs.append({**other, "run_id": f"{(int(run_id[0], 16) + 1) % 16:x}{run_id[1:]}", "display_name": name})
    with pytest.raises(WrongParameters, match="of 2 runs"):
        world.submit("cancel", name)
    with pytest.raises(WrongParameters, match=r"Runs with it in their names:\n.*\n.*another") as caught:
        world.submit("logs", "nother")
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(WrongParameters, match="The newest runs:"):
        world.submit("logs", "5%+_")
    assert not [line for line in world.posted() if ":" in line]  # nothing was canceled


STEPS = {"report": "RUNNING", "train": "RUNNING", "shard": "SUCCEEDED", "evaluate": "PENDING"}


def test_logs_come_in_the_order_of_the_steps(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of finished, running and lost attempts; and why there is none."""
    run_id = started(world, Frame("RUNNING", STEPS, lost=("train",), cached=("shard",)))
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "canary-of-a-token")
    world.kfp.logs = {f"{POD}-116": "step 40\ntoken canary-of-a-token\n"}
    world.kube.logs = {f"{POD}-105": "from Kubernetes\n"}
    pods(world, **{f"{POD}-105": "Running", f"{POD}-135": "Pending"})
    assert world.submit("logs", run_id).splitlines()[:10] == [
        "== shard: Skipped",
        "taken from Kubeflow's cache: there was no pod",
        f"== train: Error (pod {POD}-115, pod deleted)",
        "no log: Kubernetes has already deleted the pod, and Kubeflow has no archive of its log",
        f"== train: Running (pod {POD}-116)",
        "step 40",
        "token ***",
        f"== evaluate: Pending (pod {POD}-135)",
        "no log yet: the pod is Pending: Unschedulable",
        f"== report: Running (pod {POD}-105)",
    ]
    assert world.submit("logs", run_id, "report").splitlines()[1] == "from Kubernetes"
    with pytest.raises(Refused, match="step evaluate: no log yet"):
        world.submit("logs", run_id, "evaluate")
    with pytest.raises(Refused, match="is RUNNING: step gate has begun yet"):
        world.submit("logs", run_id, "gate")
    with pytest.raises(WrongParameters, match="no step 'trian'; did you mean 'train'"):
        world.submit("logs", run_id, "trian")
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(Refused, match=r"or Kubernetes has already deleted it .* not known: no Kubernetes access"):
        world.submit("logs", run_id, "evaluate")
    assert "token ***" in world.submit("logs", run_id, "train")


def test_logs_of_a_failed_run_without_its_workflow(world: World) -> None:
    """From the pods in Kubernetes, or else only the states."""
    run_id = started(world, Frame("FAILED", {"shard": "SUCCEEDED", "train": "FAILED"}))
    world.kfp.workflows = False
    assert "== train: FAILED\nthe log is not available" in world.submit("logs", run_id)
    item = {"name": "t", "labels": {"pipeline/runid": run_id, "vgg.stage": "train"}}
    world.kube.put("pods", items=[{"metadata": item, "status": {"phase": "Failed"}}])
    world.kube.logs["t"] = "components.train: exit code 78\n"
    assert world.submit("logs", run_id).startswith("== train: Failed (pod t)\ncomponents.train: exit code 78\n")


def test_cancel_waits_for_the_pods_and_says_what_remains(world: World) -> None:
    run_id = started(world, Frame("RUNNING", STEPS))
    world.kfp.faults = [Fault("POST", ":terminate$", "late"), Fault("GET", "/runs/", 503)]
    pods(world, a="Running", b="Pending")
    ended = threading.Timer(0.3, pods, [world], {"a": "Failed", "b": "Pending"})
    ended.start()
    output = world.submit("cancel", run_id[:8])
    assert not ended.is_alive()  # it has waited
    assert "CANCELED\npod b (Pending) never started and may wait for a long time; to delete: kubectl -n " in output
    assert f"resume {run_id}, continues" in output
    assert world.kfp.seen.count(f"POST /runs/{run_id}:terminate") == 1
    assert "CANCELED" in world.submit("cancel", run_id)  # again: it says the same
    assert world.kfp.seen.count(f"POST /runs/{run_id}:terminate") == 1
    world.kube.forbidden = {"/pods"}
    assert "whether pods remain is not known: no permission" in world.submit("cancel", run_id)


def test_cancel_does_not_claim_an_end_that_it_has_not_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = started(world, Frame("RUNNING"))
    monkeypatch.setattr(cancel, "PODS_SECONDS", 0.1)
    pods(world, "vgg.pipeline-run", node="Pending")
    with pytest.raises(Preempted, match=r"there still are pod node \(Pending\).*delete trainjob --cascade=background"):
        world.submit("cancel", run_id)


def test_a_run_that_ends_by_itself_is_not_canceled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it ends between the question and the request."""
    run_id = started(world, Frame("RUNNING"), Frame("SUCCEEDED"))
    for _ in range(2):
        with pytest.raises(Refused, match="has ended by itself: SUCCEEDED; there is nothing to cancel"):
            world.submit("cancel", run_id)
    send = Server.send

    def late(server: Server, *request: Any) -> Any:
        world.run()["state"], world.kfp.upcoming[run_id] = "SUCCEEDED", [Frame("SUCCEEDED")]
        return send(server, *request)

    world.kfp.upcoming[run_id] = [Frame("RUNNING")]
    monkeypatch.setattr(Server, "send", late)
    with pytest.raises(Refused, match="has ended by itself: SUCCEEDED"):
        world.submit("cancel", run_id)
    assert world.kfp.seen.count(f"POST /runs/{run_id}:terminate") == 1


def test_the_same_from_python(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """submit, list, wait, logs, resume, cancel; as a notebook does it."""
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", world.kfp.endpoint)
    kubeflow = submit.Kubeflow(poll=0.01)
    world.kfp.frames = [Frame("RUNNING", STEPS)]
    given = {"gpus": 8, "train_cpu": 32, "node_selector": {"pool": "a100"}, "claim": "mine"}
    world.kube.put("persistentvolumeclaims/mine", spec={"accessModes": ["ReadWriteMany"]}, status={"phase": "Bound"})
    world.kube.nodes(a={"gpus": 8, "labels": {"pool": "a100"}})
    params = str(ROOT / "params.yaml")
    run = kubeflow.submit(params, {"train.epochs": 3, "train.train_scale": [40, 50]}, image_check=False, **given)
    assert (
        kubeflow.submit(params, {"train.epochs": 3, "train.train_scale": [40, 50]}, image_check=False, **given) == run
    )
    sent = world.run()["runtime_config"]["parameters"]
    assert (sent["train"]["epochs"], sent["train"]["train_scale"], sent["step_gpus"]) == (3, [40, 50], "8")
    assert {name: sent[name] for name in given} == {**given, "train_cpu": "32"}
    assert [(one["id"], one["state"]) for one in kubeflow.runs()] == [(run, "PENDING")]
    world.kfp.logs[f"{POD}-125"] = "packing\n"
    (log,) = kubeflow.logs(run[:8], "shard")
    assert (log.step, log.state, log.text) == ("shard", "Succeeded", "packing\n")
    assert kubeflow.cancel(run) == []
    with pytest.raises(Preempted):
        kubeflow.wait(run)
    world.kfp.retried = [Frame("RUNNING"), Frame("SUCCEEDED")]
    assert kubeflow.resume(run[:8]) == run
    world.kfp.terminated = False
    kubeflow.wait(run)
    with pytest.raises(WrongParameters, match="gpu=8: no such run argument; did you mean 'gpus'"):
        kubeflow.submit(params, gpu=8)
    assert not world.kfp.surprises


def test_wrong_words_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["logs"], ["list", "x"], ["stop", "x"], ["cancel", "x", "y"]):
        with pytest.raises(SystemExit) as ended:
            submit.main(words)
        assert ended.value.code == 64 and "cancel RUN" in capsys.readouterr().err
