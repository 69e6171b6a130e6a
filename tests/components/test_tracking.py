"""Asynchronous tracking in MLflow: an unreachable server neither delays nor loses anything; no duplicate points."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment, flags
from mlflow import MlflowClient
from mlflowserver import server
from ports import free_port

from components.tracking import access
from components.tracking.__main__ import main as tracking_program
from components.tracking.__main__ import replay
from components.tracking.journal import Journal
from components.tracking.names import CURVES, DATA_WAIT, PARENT_PARAMS, SPEED, curves, results, title
from components.tracking.tracker import Tracker, journal_key
from runtime import filesystem
from runtime.errors import Preempted, WrongParameters
from runtime.shards.shardset import ShardSet
from vgg.params import STAGES, section_model


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")  # creating its tables takes seconds
    for name in [n for n in os.environ if n.startswith(("MLFLOW_", "VGG_"))]:
        monkeypatch.delenv(name)
    # MLflow caches the store of a URI for the whole process: a relative one could be that of another test
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr("components.tracking.tracker.RETRY_SECONDS", 0.2)


def histories(client) -> dict[str, list[tuple[int, float]]]:  # type: ignore[no-untyped-def]
    """(step, value) of train/loss of every stage's run, in order, by stage."""
    experiment = client.get_experiment_by_name(access.EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id])
    return {
        run.data.tags["vgg.stage"]: [
            (m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")
        ]
        for run in runs
    }


def test_parent_and_child_contain_parameters_metrics_and_inputs(tmp_path: Path) -> None:
    """The parent has what people look for: results, curves, what they vary, pages, the model, and a name that says it.

    Everything is sent a second time, as after a lost answer: nothing is there twice.
    """
    (tmp_path / "file.txt").write_text("x")
    model_id = access.connect().create_logged_model("0").model_id
    for stage in ("train", "train", "register"):
        with Tracker(stage, "k" * 64, "lineage") as tracker:
            tracker.name("digits · D" if stage == "train" else "digits · D → 1.01 %")
            tracker.params({"train": {"learning_rate": 0.1, "checkpoint_steps": 7, "inner": {"deep": "x" * 900}}})
            tracker.metrics({f"final/{stage}": 0.25})
            tracker.point(20, {"loss/train": 0.5})
            tracker.model(model_id)
            tracker.dataset("tiny", "data/shards", "0" * 32 + ".dir", stage, {"num_images": 3})
            tracker.artifact(tmp_path / "file.txt", "curves", to="both")
    with Tracker("train", "k" * 64, "lineage") as tracker:
        tracker.name("digits · D")  # the stage ran again alone: the name with the result stays
    client = access.connect()
    runs = client.search_runs([client.get_experiment_by_name(access.EXPERIMENT).experiment_id])
    by_stage = {run.data.tags["vgg.stage"]: run for run in runs}
    assert set(by_stage) == {"pipeline", "train", "register"}
    parent, child = by_stage["pipeline"], by_stage["train"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert parent.info.run_name == "digits · D → 1.01 %"
    assert parent.data.metrics == {"final/train": 0.25, "final/register": 0.25, "loss/train": 0.5}
    for run in (parent, child):
        assert [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, "loss/train")] == [(20, 0.5)]
        assert [f.path for f in client.list_artifacts(run.info.run_id, "curves")] == ["curves/file.txt"]
    assert parent.data.params == {"train.learning_rate": "0.1"}
    assert child.data.params == {
        "train.learning_rate": "0.1", "train.checkpoint_steps": "7", "train.inner.deep": "x" * 500,
    }  # fmt: skip
    assert [output.model_id for output in parent.outputs.model_outputs] == [model_id]
    [dataset] = {put.dataset.digest: put.dataset for put in child.inputs.dataset_inputs}.values()
    assert dataset.digest == "0" * 32 + ".dir"
    assert [column["name"] for column in json.loads(dataset.schema)["mlflow_colspec"]] == ["jpg", "cls"]
    assert not any((tmp_path / ".tracking").iterdir())


def test_the_names_of_charts_and_parameters() -> None:
    """All names exist, curves come before results in MLflow's pages, and a parent has at most 20 parameters."""
    sections = {name: section_model(name).model_fields for name in STAGES}
    assert len(PARENT_PARAMS) <= 20
    for name in PARENT_PARAMS:
        section, field, *_ = name.split(".")
        assert field in sections[section], name
    assert all("/" in name for name in (*CURVES.values(), SPEED, DATA_WAIT))
    assert results({"top1_error": 0.0034, "loss": 2.0}).keys() == {"top1_error", "top1_error_percent", "loss"}
    assert curves({"val/top1_error": 0.25, "train/loss": 2.0}) == {"error_percent/val_top1": 25.0, "loss/train": 2.0}
    train = {"configuration": "D", "batch_norm": False, "input_size": 32, "learning_rate": 0.006}
    assert title("digits", train, 0.010135) == "digits · D · 32 px · rate 0.006 → 1.01 %"


def test_all_stays_in_a_project_whose_path_looks_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads leave such names.  MLflow and SQLAlchemy decode paths as if they were addresses."""
    project, elsewhere = tmp_path / "My%20Project?#1 ä", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    shutil.move(tmp_path / "mlflow.db", project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.chdir(elsewhere)  # where DVC runs an experiment: all addresses are absolute
    (elsewhere / "file.txt").write_text("x")
    with Tracker("train", "k" * 64, "lineage") as tracker:
        tracker.artifact(elsewhere / "file.txt", "curves")
    assert len(list(project.glob("mlruns/**/curves/file.txt"))) == 1
    inside = (project, elsewhere)
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and not any(f.is_relative_to(home) for home in inside)]
    assert len(histories(access.connect())) == 2


@pytest.mark.faults
def test_a_server_that_is_started_late_and_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are logged before, during and after an outage; a resumed attempt repeats some.  The curve is complete."""
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("components.tracking.tracker.PREEMPTED_FLUSH_SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(Preempted), Tracker("train", "k" * 64, "lineage") as tracker:
        for step in (20, 40):
            tracker.point(step, {"train/loss": 1 / step})
        assert time.monotonic() - started < 1, "it must not wait for an unreachable server"
        raise Preempted("stopped")
    with server(tmp_path, port):
        monkeypatch.setattr("components.tracking.tracker.PREEMPTED_FLUSH_SECONDS", 30.0)
        with pytest.raises(Preempted), Tracker("train", "k" * 64, "lineage") as tracker:
            for step in (40, 60):  # the resumed attempt computes step 40 again
                tracker.point(step, {"train/loss": 1 / step})
            raise Preempted("stopped")
        assert histories(access.connect())["train"] == [(20, 0.05), (40, 0.025), (60, 1 / 60)]
    monkeypatch.setattr("components.tracking.tracker.FLUSH_SECONDS", 1.0)
    with Tracker("train", "k" * 64, "lineage") as tracker:
        tracker.point(80, {"train/loss": 1 / 80})
    with server(tmp_path, port):
        assert replay(tmp_path / ".tracking") == 0
        assert replay(tmp_path / ".tracking") == 0
        assert histories(access.connect())["train"] == [(20, 0.05), (40, 0.025), (60, 1 / 60), (80, 0.0125)]
        client = access.connect()
        runs = client.search_runs([client.get_experiment_by_name(access.EXPERIMENT).experiment_id])
        assert {run.data.tags["vgg.stage"]: run.info.status for run in runs}["train"] == "FINISHED"


def test_failure_and_an_injected_run(monkeypatch: pytest.MonkeyPatch) -> None:
    client = access.connect()
    experiment = client.create_experiment("kubeflow")
    parent = client.create_run(experiment)
    child = client.create_run(experiment, tags={"mlflow.parentRunId": parent.info.run_id})
    monkeypatch.setenv("MLFLOW_RUN_ID", child.info.run_id)
    with pytest.raises(RuntimeError), Tracker("evaluate", "k" * 64, "lineage") as tracker:
        tracker.metrics({"eval/top1_error": 0.5})
        raise RuntimeError("broken")
    assert client.get_run(child.info.run_id).info.status == "FAILED"
    assert client.get_run(child.info.run_id).data.tags["vgg.failure"] == "broken"
    assert client.get_run(parent.info.run_id).data.metrics == {"eval/top1_error": 0.5}
    assert client.get_experiment_by_name(access.EXPERIMENT) is None  # no second hierarchy


def test_the_load_of_the_machine_goes_through_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after failures; a driver that hangs delays nothing, and a sample replaces nothing at the output."""
    (tmp_path / "nvidia-smi").write_text(f"""#!/bin/sh
[ -e {tmp_path}/hang ] && exec sleep 60
[ -e {tmp_path}/asked ] || {{ touch {tmp_path}/asked; echo broken driver; exit 9; }}
echo '0, 35, 1024, 81920, 301.50'
echo '1, [N/A], 0, 81920, [N/A]'
""")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("components.tracking.machine.SAMPLE_SECONDS", 0.05)
    with Tracker("train", "k" * 64, "lineage") as tracker:
        deadline = time.monotonic() + 30
        while "gpu_1_memory_usage_megabytes" not in tracker.journal.path.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert tracker._replaced is None
        (tmp_path / "hang").touch()
        started = time.monotonic()
    assert time.monotonic() - started < 20
    client = access.connect()
    [run] = client.search_runs(
        [client.get_experiment_by_name(access.EXPERIMENT).experiment_id], "tags.`vgg.stage` = 'train'"
    )
    found = run.data.metrics
    assert run.info.status == "FINISHED"
    assert found["system/gpu_0_utilization_percentage"] == 35 and found["system/gpu_0_power_usage_watts"] == 301.5
    assert found["system/gpu_1_memory_usage_megabytes"] == 0 and "system/gpu_1_utilization_percentage" not in found
    assert 0 <= found["system/cpu_utilization_percentage"] <= 100 and found["system/process_memory_megabytes"] > 1


def test_a_partial_line_left_by_a_kill_is_removed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append({"kind": "tags", "values": {}})
    with open(journal.path, "ab") as file:
        file.write(b'{"kind":"met')
    journal.close()
    assert [event["kind"] for event, _ in Journal(tmp_path / "j").events()] == ["tags"]


def test_a_preempted_stage_does_not_wait_long_for_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts connections and never answers; a preempted process is killed soon."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(Preempted), Tracker("train", "key", "lineage") as tracker:
            tracker.point(1, {"train/loss": 2.0})
            raise Preempted("stopped at step 1")
        assert time.monotonic() - started < 10
        assert tracker.journal.pending() > 0
    tracker._sender.join(30)  # or it would connect to the server of the next test


def test_journals_differ_by_output_and_have_one_writer(tmp_path: Path) -> None:
    """A shared journal would be removed by the first process that ends."""
    key, other_key = (journal_key({"train": 1}, str(tmp_path / name)) for name in ("a", "b"))
    with Tracker("train", key, "lineage") as first, Tracker("train", other_key, "lineage") as other:
        first.point(1, {"train/loss": 2.0})
        with pytest.raises(Preempted, match="another process does the same work"):
            Tracker("train", key, "lineage")
        assert replay(tmp_path / ".tracking") == 0  # skips journals in use
        other.point(1, {"train/loss": 3.0})
    with Tracker("train", key, "lineage"):  # unlocked again
        pass
    client = access.connect()
    runs = client.search_runs([client.get_experiment_by_name(access.EXPERIMENT).experiment_id])
    losses = [run.data.metrics.get("train/loss") for run in runs if run.data.tags["vgg.stage"] == "train"]
    assert sorted(filter(None, losses)) == [2.0, 3.0]


def test_no_other_thread_adds_a_variable_to_the_environment(empty_database: Path, tmp_path: Path) -> None:
    """A process that the stage starts at that moment fails: once in 200 runs on a busy machine, before."""
    shutil.copy(empty_database, tmp_path)
    script = """import os, threading
kind, main = type(os.environ), threading.main_thread()
put = kind.__setitem__
def watched(self, name, value):
    if name not in self and threading.current_thread() is not main:
        print(name)
    put(self, name, value)
kind.__setitem__ = watched
from components.tracking.tracker import Tracker
with Tracker("train", "key", "lineage") as tracker:
    tracker.point(1, {"train/loss": 2.0})
"""
    env = {name: value for name, value in environment().items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.glob(".tracking/*/events.jsonl")), "nothing was sent"


@pytest.mark.faults
def test_two_identical_trainings_at_once(shards: ShardSet, params_file: Path, tmp_path: Path) -> None:
    """In one folder, with two outputs: both succeed with the same weights, each with its own run.

    Long enough that neither ends before the other begins: that one would find the finished run and use it.
    """
    params = json.loads(params_file.read_text())
    params_file.write_text(json.dumps({**params, "train": {**params["train"], "epochs": 60}}))
    arguments, running = flags("train", tmp_path, params_file), []
    for name in ("one", "two"):
        changed = [str(word).replace(f"{tmp_path}/m", f"{tmp_path}/{name}/m") for word in arguments]
        command = [sys.executable, "-m", "components.train", *changed]
        running.append(subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True))
    for process in running:
        _, log = process.communicate(timeout=120)
        assert process.returncode == 0, log
    metrics = [(tmp_path / name / "m/train.json").read_bytes() for name in ("one", "two")]
    assert metrics[0] == metrics[1]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [experiment] = client.search_experiments(filter_string=f"name = '{access.EXPERIMENT}'")
    runs = client.search_runs([experiment.experiment_id], "tags.`vgg.stage` = 'train'")
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert [path.name for path in (tmp_path / ".tracking").iterdir()] == ["place"]


@pytest.mark.faults
def test_processes_that_create_the_database_together(tmp_path: Path) -> None:
    """Two experiments of a queue that start in a project without one."""
    script = """import sys; from components.tracking.tracker import Tracker
with Tracker("train", "key" + sys.argv[1], "lineage") as tracker: tracker.point(1, {"train/loss": 2.0})"""
    started = [
        subprocess.Popen([sys.executable, "-c", script, name], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE)
        for name in "ab"
    ]
    for process in started:
        _, log = process.communicate(timeout=120)
        assert b"pending" not in log, log.decode()
        assert process.returncode == 0
    found = access.connect()
    assert len(found.search_runs([found.get_experiment_by_name(access.EXPERIMENT).experiment_id])) == 3


def test_a_file_system_without_locks_does_not_stop_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filesystem.fcntl, "flock", unsupported)
    with Tracker("train", "key", "lineage") as tracker:
        tracker.point(1, {"train/loss": 2.0})
    assert histories(access.connect())["train"] == [(1, 2.0)]


def test_without_runs_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "components.tracking", "ui"]
    done = subprocess.run(
        command, cwd=tmp_path / "empty", env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.endswith("mlflow.db: does not exist, so there are no runs yet. Run: make run\n")
    assert (ROOT / "Makefile").read_text().count("python -m components.tracking ui") == 1


@pytest.mark.parametrize("port", ["0", "99999"])
def test_a_port_that_does_not_exist(port: str) -> None:
    with pytest.raises(WrongParameters, match=f"--port: must be from 1 to 65,535, not {port}"):
        tracking_program(["ui", "--port", port])
