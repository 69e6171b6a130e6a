"""Every sickness of a project, made really, is named with its cure; a healthy project is said to be healthy."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from chain import flip
from conftest import ROOT, SHARD, draw_images, environment
from dvcproject import call
from mlflowservers import Front

from components.doctor.__main__ import main
from components.tracking.tracker import Tracker
from runtime import filesystem
from runtime.errors import Preempted, Problem, Refused, StorageFailure, Unreachable
from runtime.targets import Directory
from vgg.params.shard import ShardParams
from vgg.sharding.pack import pack
from vgg.sharding.sources import Folder

AT_WORK = """
import time; from pathlib import Path
from components.tracking.tracker import Tracker, output_key
from runtime.targets import only_writer
with only_writer(Path("data/shards")), Tracker("shard", "k" * 64, "lineage", output=output_key("data/shards")) as run:
    run.point(1, {"x": 1.0})
    while run.journal.pending(): time.sleep(0.05)
    run.journal.sync(); print("ready", flush=True); time.sleep(600)
"""
Examine = Callable[..., str]


@pytest.fixture
def project(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with shards, a database and no DVC."""
    draw_images(tmp_path / "data/images")
    images = Folder(tmp_path / "data/images")
    pack(ShardParams(**SHARD), images, Directory(tmp_path / "data/shards"), "test", num_workers=1)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    (tmp_path / "requirements.lock").write_text(f"numpy=={version('numpy')} \\\n    --hash=sha256:0\n")
    for name in ("VGG_JOURNAL", "VGG_STORE", "DVC_ROOT", "VGG_PIPELINE_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")  # MLflow keeps relative ones open
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Examine:
    """What the program says; the outcome must be the problem that is expected, or none."""

    def examine(*options: str, expected: type[Problem] | None = None) -> str:
        capsys.readouterr()
        try:
            main(options)
            found = None
        except Problem as problem:
            found = type(problem)
        said = capsys.readouterr().out
        assert found is expected, said
        assert ("healthy" in said) == (expected is None)
        assert said.count("→") == sum(line.startswith("    ") and "→" not in line for line in said.splitlines())
        return said

    return examine


def test_a_version_that_is_not_in_the_database(project: Path, examine: Examine, client: Any) -> None:
    """Its model is here and DVC has nothing to do, but the database was deleted, or is another one."""
    for name, content in (("metrics/register", {"model_name": "tiny", "version": 1}), ("models/vgg/manifest", {})):
        (project / name).parent.mkdir(parents=True)
        (project / f"{name}.json").write_text(json.dumps(content))
    lost = "has no version 1 of tiny, which is in metrics/register.json"
    assert f"{lost}\n      → dvc repro -f -s register" in examine(expected=Refused)
    client.create_registered_model("tiny")
    client.create_model_version("tiny", str(project))
    assert lost not in examine(expected=Refused)  # of the manifest
    client.delete_model_version("tiny", "1")
    assert lost in examine(expected=Refused)


def test_a_healthy_project(project: Path, examine: Examine) -> None:
    before = sorted(project.rglob("*"))
    assert "✗" not in examine()
    assert "✗" not in examine("--deep")
    assert sorted(set(project.rglob("*")) - set(before) - {project / "mlflow.db.lock"}) == []


@pytest.mark.faults
def test_a_process_at_work_and_what_it_leaves(project: Path, examine: Examine) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", AT_WORK], cwd=project, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        said = examine(expected=Preempted)
        assert f"data/shards: process {process.pid} is at work there\n      → wait for it, or stop it: kill" in said
        assert "journal .tracking/shard-kkkk" in said
        assert "RUNNING" not in said
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        process.stdout.close()
    said = examine(expected=Refused)
    assert "at work" not in said
    assert "(shard) is RUNNING, and no process works on it\n      → run its stage again" in said
    assert said.count("is RUNNING, and no process works on it") == 2  # its parent run, too
    for line in said.splitlines():
        if cure := line.partition("or close it: ")[2]:
            call(project, cure)
    examine()


def test_damaged_files(project: Path, examine: Examine) -> None:
    shard, content = Path("data/shards/train-00000.tar"), Path("data/shards/train-00000.tar").read_bytes()
    flip(shard, 700)
    examine()  # the same size
    said = examine("--deep", expected=Refused)
    assert "data/shards: train-00000.tar: " in said
    assert "→ dvc checkout --force data/shards, or run stage shard again" in said
    shard.write_bytes(content[:-512])
    assert f"train-00000.tar has {len(content) - 512:,} bytes" in examine(expected=Refused)
    shard.write_bytes(content)
    flip(Path("data/shards/manifest.json"))
    assert "data/shards/manifest.json: damaged" in examine(expected=Refused)
    flip(Path("data/shards/manifest.json"))

    [entry] = [e for e in json.loads(Path("data/shards/manifest.json").read_text())["files"] if e["path"] == shard.name]
    cached = project / f"cache/shards/{entry['sha256']}.tar"
    dvc = project / f".dvc/cache/files/md5/{entry['md5'][:2]}/{entry['md5'][2:]}"
    for copy in (cached, dvc):
        copy.parent.mkdir(parents=True)
        copy.write_bytes(content)
    shutil.move(".dvc", "kept")  # a folder .dvc alone is no DVC project
    assert "✓ caches" in examine("--deep")
    flip(cached)
    assert f"rm {cached} (it is fetched again)" in examine("--deep", expected=Refused)
    flip(cached)
    shutil.move("kept", ".dvc")
    flip(dvc)
    said = examine("--deep", expected=Refused)
    assert "DVC's cache: .dvc/cache/files/md5" in said
    assert f"→ rm -f {dvc.relative_to(project)}; then dvc pull" in said


def test_leftovers_disk_and_packages(project: Path, examine: Examine) -> None:
    for path in ("models/vgg/step-00000004.old", "models/vgg/step-00000008.tmp", "models/vgg/step-00000002"):
        Path(path).mkdir(parents=True)
    for path in ("data/shards/train-00001.tar.1-ab.tmp", "metrics/train.json.1-ab.tmp"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
    said = examine(expected=Refused)
    assert "step-00000004.old: a checkpoint whose replacement was interrupted\n      → run stage train" in said
    for path in ("models/vgg/step-00000008.tmp", "data/shards/train-00001.tar.1-ab.tmp", "metrics/train.json.1-ab.tmp"):
        assert f"{path}: left over by a process that was killed\n      → rm -r {path}" in said
    shutil.rmtree("models")
    Path("data/shards/train-00001.tar.1-ab.tmp").unlink()
    Path("metrics/train.json.1-ab.tmp").unlink()

    large = Path("models/vgg/step-00000002/weights.safetensors")
    large.parent.mkdir(parents=True)
    with open(large, "wb") as file:
        file.truncate(filesystem.free_bytes(project))  # a file with a hole takes no space
    said = examine(expected=StorageFailure)
    assert "bytes free on its disk" in said
    assert "→ free some: dvc gc -w" in said
    large.unlink()

    with open("requirements.lock", "a") as file:
        file.write("pillow==1.0 ; python_version < '4' \\\n    --hash=sha256:0\nno-such_package[extra]==2.0\n")
    said = examine(expected=Refused)
    assert f"pillow {version('pillow')} (lock: 1.0), no-such_package missing (lock: 2.0)" in said
    assert "→ rm -f .venv/bin/.installed && make install" in said


def test_mlflow(project: Path, examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(path: str) -> tuple[int, dict[str, str], str]:
        return (200, {}, "2.22.0") if path.startswith("/version") else (404, {"Content-Type": "application/json"}, "{}")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with Tracker("train", "t" * 64, "lineage") as run:
        run.point(1, {"train/loss": 1.0})
    said = examine(expected=Refused)
    assert "journal .tracking/train-tttttttttttttttt: 4 events wait for MLflow" in said
    assert "→ python -m components.tracking replay" in said
    assert "MLflow at http://127.0.0.1:9 does not answer" in said
    shutil.rmtree(".tracking")
    examine(expected=Unreachable)
    with Front(instead=answer) as old:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", old.address)
        said = examine(expected=Refused)
        assert "is version 2.22.0, which is too old" in said
        assert "mlflow db upgrade" in said


@pytest.mark.faults
def test_dvc(project: Path, examine: Examine) -> None:
    """A real DVC project: up to date, changed, and at work."""
    (project / "a").write_text("1")
    stage = {"cmd": "cp a b; sleep 0", "deps": ["a"], "outs": ["b"]}
    (project / "dvc.yaml").write_text(json.dumps({"stages": {"copy": stage}}))
    call(project, "dvc init -q --no-scm && dvc repro -q")
    examine()
    (project / "a").write_text("2")
    said = examine(expected=Refused)
    assert "copy: a modified (deps)\n      → make run" in said
    (project / "dvc.yaml").write_text(json.dumps({"stages": {"copy": {**stage, "cmd": "cp a b; touch on; sleep 30"}}}))
    process = subprocess.Popen(["dvc", "repro", "-q"], cwd=project, env=environment(), start_new_session=True)
    try:
        while not (project / "on").exists():
            assert process.poll() is None
        said = examine(expected=Preempted)
        assert "is at work there" in said
        assert f"kill {process.pid}" in said
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
