"""A journal that cannot be written stops nothing and is said once; every other full disk is 74 and named."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import environment, flags
from mlflow import MlflowClient

from components.tracking import access
from components.tracking import journal as journal_module
from components.tracking.journal import Journal
from components.tracking.tracker import Tracker, output_key

SAID = "cannot write the journal"


@pytest.fixture
def client(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return access.connect()


def tracked(folder: Path) -> None:
    (folder / "curves.csv").write_text("x")
    with Tracker("train", "k" * 64, "lineage", output=output_key("model")) as tracker:
        for step in range(1, 4):
            tracker.point(step, {"train/loss": 1 / step})
        tracker.artifact(folder / "curves.csv", "curves")


def expect_complete(client: MlflowClient) -> None:
    """Everything is in MLflow, although nothing is on disk."""
    experiment = client.get_experiment_by_name(access.EXPERIMENT)
    assert experiment
    [run] = client.search_runs([experiment.experiment_id], "tags.`vgg.stage` = 'train'")
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "curves")] == ["curves/curves.csv"]


@pytest.mark.parametrize("place", ["/proc/nowhere", "file/journal", "/dev/full/journal"])
def test_a_folder_that_cannot_be_made(
    place: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("VGG_JOURNAL", place)
    tracked(tmp_path)
    assert caplog.text.count(SAID) == 1
    assert place in caplog.text
    assert "lost:" not in caplog.text
    expect_complete(client)


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES"])
def test_every_error_of_a_write(
    code: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    number = getattr(errno, code)

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(journal_module, "_write", fail)
    monkeypatch.setattr(journal_module.os, "fsync", fail)
    monkeypatch.setattr(journal_module.shutil, "copy", fail)
    tracked(tmp_path)
    assert caplog.text.count(SAID) == 1
    assert os.strerror(number) in caplog.text
    monkeypatch.undo()
    expect_complete(client)


def test_without_the_server_too_the_loss_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("VGG_JOURNAL", "/dev/full/journal")
    monkeypatch.setattr("components.tracking.tracker.FLUSH_SECONDS", 0.2)
    tracked(tmp_path)
    assert re.search(r"tracking: \d+ events are lost: the journal could not be written", caplog.text)


def in_small_disks(script: str, tmp_path: Path, sizes: dict[str, str], **env: str) -> subprocess.CompletedProcess[str]:
    """Run a bash script where folders of tmp_path are file systems of these sizes; in a mount namespace of its own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, timeout=10).returncode:
        pytest.skip("mount namespaces are not allowed here")
    mounts = ""
    for name, size in sizes.items():
        (tmp_path / name).mkdir()
        mounts += f"mount -t tmpfs -o size={size} {name} {tmp_path / name}\n"
    command = ["unshare", "-rm", "bash", "-c", mounts + script]
    return subprocess.run(
        command, cwd=tmp_path, env=environment(**env), capture_output=True, text=True, timeout=150
    )  # fmt: skip


def test_a_journal_whose_disk_is_full_and_has_room_again(tmp_path: Path) -> None:
    """What could not be written is written later; no line is lost or half."""
    script = """
from pathlib import Path
from components.tracking.journal import Journal
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
journal = Journal(Path("small/train-1"))
for number in range(3000):
    journal.append({"kind": "tags", "values": {"number": number, "text": "x" * 100}})
    if number == 2000:
        Path("small/ballast").unlink()
journal.sync()
assert journal.unwritten() == 0
journal.close()
again = Journal(Path("small/train-1"))
assert [event["values"]["number"] for event in again.earlier] == list(range(3000))
"""
    full = "head -c 900k /dev/zero > small/ballast\n"
    done = in_small_disks(f'{full}{sys.executable} -c "$SCRIPT"', tmp_path, {"small": "1m"}, SCRIPT=script)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(SAID) == 1
    assert "No space left on device" in done.stderr


@pytest.mark.faults
def test_a_stage_with_a_full_journal_and_one_with_a_full_output(
    images: Path, params_file: Path, tmp_path: Path
) -> None:
    words = " ".join(str(word) for word in flags("shard", tmp_path, params_file))
    script = f"""
        head -c 1m /dev/zero > small/ballast 2>/dev/null
        python() {{ {sys.executable} "$@"; }}
        VGG_JOURNAL=small/journal python -m components.shard {words}; echo "code $?"
        python -m components.shard {words} --metrics small/shard.json; echo "code $?"
    """
    done = in_small_disks(script, tmp_path, {"small": "64k"})
    assert re.findall(r"code (\d+)", done.stdout) == ["0", "74"], done.stderr
    first, second = done.stderr.split("digest", 1)
    assert first.count(SAID) == 1
    assert "small/journal" in first
    assert re.search(r"error: small/shard(\.record)?\.json.*: No space left on device \(0 bytes free\)", second), second
    assert "Traceback" not in done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [experiment] = client.search_experiments(filter_string=f"name = '{access.EXPERIMENT}'")
    [run] = client.search_runs([experiment.experiment_id], "tags.`vgg.stage` = 'shard'")
    assert run.data.metrics["data/num_train"] == 30


def test_the_full_disk_of_a_copy_is_the_target(tmp_path: Path) -> None:
    """Python names the source first."""
    script = """
import shutil
from pathlib import Path
from runtime.manifest import storage_errors
with storage_errors(Path("elsewhere"), 100_000):
    shutil.copyfile("source", "small/copy")
"""
    (tmp_path / "source").write_bytes(b"x" * 100_000)
    done = in_small_disks(f'{sys.executable} -c "$SCRIPT"', tmp_path, {"small": "16k"}, SCRIPT=script)
    assert "StorageFailure: small/copy: No space left on device (100,000 bytes needed, 0 bytes free)" in done.stderr


def test_journal_in_a_read_only_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Journal(tmp_path / "j")
    first.append({"kind": "tags", "values": {}})
    first.close()
    monkeypatch.setattr(journal_module.Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "read-only")))
    again = Journal(tmp_path / "j")
    assert again.pending() == 1
