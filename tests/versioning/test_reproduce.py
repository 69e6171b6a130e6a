"""A training repeated from its records, in a worktree of a real git repository: the same bytes, or both sums."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dvcproject import call, tiny_project, user
from ruamel.yaml import YAML

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
DVC = YAML(typ="safe", pure=True)


def train(where: Path) -> str:
    """Shard and train with the commands of dvc.yaml; gives the sha256 of the weights."""
    for stage in ("shard", "train"):
        call(where, DVC.load(where / "dvc.yaml")["stages"][stage]["cmd"])
    return str(json.loads((where / "metrics/train.json").read_text())["weights_sha256"])


def reproduce(where: Path, *options: str, code: int = 0, reference: str = "models/vgg") -> str:
    command = (sys.executable, "-m", "components.lineage", "reproduce", reference, "--python", sys.executable)
    return call(where, *command, *options, code=code, timeout=600)


def test_the_same_weights_from_the_records(empty_database: Path, tmp_path: Path) -> None:
    where = tiny_project(tmp_path / "project", empty_database)
    weights = train(where)
    commit = call(where, "git rev-parse HEAD").strip()
    call(where, "git commit -qam later --allow-empty && echo 'train: {}' > params.yaml")  # its parameters are recorded

    script = reproduce(where)
    assert f'worktree add --detach "$folder" {commit}' in script
    assert call(where, "git worktree list").count("\n") == 1  # printed, not run
    printed = reproduce(where, "--execute")
    assert f"reproduced: weights {weights}, the same bytes, at commit {commit}" in printed
    assert call(where, "git worktree list").count("\n") == 1
    call(where, "git checkout -q params.yaml")

    # a change outside of the science that was not committed, and changed the weights all the same
    path = where / "runtime/checkpoint.py"
    good = path.read_text()
    changed = good.replace(
        "    needed = sum(", "    weights = {n: t * 1.001 for n, t in weights.items()}\n    needed = sum("
    )
    assert changed != good
    path.write_text(changed)
    call(where, "rm -r models")
    other = train(where)
    assert other != weights
    path.write_text(good)
    folder = tmp_path / "again"
    printed = reproduce(where, "--execute", "--folder", str(folder), "--shards", "data/shards", code=78)
    assert "none of them in the code of training" in printed
    assert f"recorded:      {other}" in printed
    assert weights in printed.partition("not reproduced")[2]
    assert (folder / "models/vgg/manifest.json").exists()
    (foreign := tmp_path / "foreign").mkdir()
    (foreign / "file").touch()
    assert "is neither empty nor a worktree" in reproduce(where, "--execute", "--folder", str(foreign), code=78)

    # another source than that of the record ends before the training
    images = where / "data/images/train/cat/0000.jpg"
    kept = images.read_bytes()
    images.write_bytes((where / "data/images/train/cat/0003.jpg").read_bytes())
    printed = reproduce(where, "--execute", code=78)
    assert "other shards" in printed
    assert "epoch 1" not in printed
    images.write_bytes(kept)
    assert "not there. Give its folder with --images" in reproduce(where, "--images", "nowhere", code=78)


def test_stopped_and_continued(empty_database: Path, tmp_path: Path) -> None:
    where, folder = tiny_project(tmp_path / "project", empty_database), tmp_path / "again"
    weights = train(where)
    command = [sys.executable, "-m", "components.lineage", "reproduce", "models/vgg", "--python", sys.executable]
    with subprocess.Popen(
        [*command, "--execute", "--folder", folder], cwd=where, env=user(), stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 120
        while not (folder / "data/shards/manifest.json").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 75, said
    assert f"To continue there: python -m components.lineage reproduce models/vgg --execute --folder {folder}" in said
    running = [path for path in Path("/proc").glob("[0-9]*/cwd") if path.exists() and path.resolve() == folder]
    assert not running
    assert f"reproduced: weights {weights}" in reproduce(where, "--execute", "--folder", str(folder))


def test_code_that_was_never_committed_is_named(empty_database: Path, tmp_path: Path) -> None:
    where = tiny_project(tmp_path / "project", empty_database)
    path = where / "vgg/training/schedule.py"
    path.write_text(path.read_text() + "\nUNUSED = 1\n")
    weights = train(where)
    assert "never committed: vgg/training/schedule.py had changes" in reproduce(where, code=78)
    call(where, "git commit -qam schedule")
    assert "has the same code of training, file by file" in reproduce(where)
    assert f"reproduced: weights {weights}" in reproduce(where, "--execute")
