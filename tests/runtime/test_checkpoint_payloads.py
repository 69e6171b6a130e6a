"""Payloads that would run code in a careless reader are refused and never run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import (
    METADATA,
    TINY,
    WEIGHTS,
    rewrite_manifest,
    saved,
    tiny,  # noqa: F401  # a fixture
    with_state,
)
from conftest import ROOT, environment, flags, program
from payloads import PAYLOADS

from runtime import checkpoint, manifest
from runtime.checkpoint import FILES, step_name
from runtime.shards.shardset import ShardSet
from vgg.network.trained import shapes_of


def test_the_payloads_work(tmp_path: Path) -> None:
    """With the loader of its format, every payload creates its sentinel."""
    command = [sys.executable, "-W", "ignore", ROOT / "tests/fakes/payloads.py", tmp_path / "live"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(PAYLOADS), done.stderr
    assert len(PAYLOADS) >= 20


OPEN_EVERYTHING = f"""
from pathlib import Path
from components import program
from vgg.network.trained import Trained
from runtime.distributed import joined
from runtime.errors import Refused
from vgg.network.model import CONFIGURATIONS
from vgg.training.task import find_run
CONFIGURATIONS["A"] = {TINY}
for directory in sorted(Path("finished").resolve().iterdir()):
    try:
        Trained.open(directory).network()
        print(0, directory)
    except Refused as refused:
        print(refused.exit_code, refused)
with joined() as group:
    program.run(lambda: find_run(Path("model").resolve(), {METADATA}, False, group))
"""


FORCED = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}  # torch.load unpickles unless weights_only=True is given


def put(content: bytes, target: str, name: str, step: Path) -> str:
    """Put a payload into a checkpoint with a matching manifest.  Returns the start of the expected message."""
    path = step / (name if target.startswith("additional") else target)
    path.write_bytes(content)
    if target != manifest.NAME:
        rewrite_manifest(step, names=[*FILES, name] if target == "additional, listed" else list(FILES))
    if target == "additional":
        return f"{step}: {name!r} is not a checkpoint file"
    return f"{step / manifest.NAME if target == 'additional, listed' else path}: "


@pytest.mark.parametrize("force", [FORCED, pytest.param({}, marks=pytest.mark.faults)], ids=["forced", "usual"])
def test_payloads_are_refused_and_never_run(force: dict[str, str], tmp_path: Path) -> None:
    """Every kind instead of every file and as an additional file, in unfinished and finished trainings."""
    good, complete = saved(tmp_path / "good", 1), saved(tmp_path / "complete", 2).parent
    checkpoint.finish(complete, 2, 2, METADATA, shapes_of)
    steps, directories, number = [], [], 0
    for kind, payload in PAYLOADS.items():
        content = payload.make(tmp_path / f"sentinel-{kind}")
        for target in (*FILES, manifest.NAME, "additional", "additional, listed"):
            number += 1
            step = tmp_path / "model" / step_name(number)
            shutil.copytree(good, step)
            with_state(lambda state, number=number: {**state, "step": number})(step)
            rewrite_manifest(step, step=number)
            steps.append("checkpoint refused: " + put(content, target, payload.name, step))

            directory = tmp_path / "finished" / f"{number:03}"
            shutil.copytree(complete, directory)
            directories.append("78 " + put(content, target, payload.name, directory / step_name(2)))
            rewrite_manifest(directory, checkpoint.SCHEMA)
        directory = tmp_path / "finished" / f"{number:03} whole"
        shutil.copytree(complete, directory)
        (directory / manifest.NAME).write_bytes(content)
        directories.append(f"78 {directory / manifest.NAME}: damaged")

    done = subprocess.run(
        [sys.executable, "-c", OPEN_EVERYTHING],
        cwd=tmp_path, env=environment(**force), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 78, done.stderr
    assert "Traceback" not in done.stderr
    assert f"none of its {len(steps)} checkpoints verifies" in done.stderr
    refused = [line for line in done.stderr.splitlines() if line.startswith("checkpoint refused")]
    for line, start in zip(refused, reversed(steps), strict=True):
        assert line.startswith(start)
    for line, start in zip(done.stdout.splitlines(), directories, strict=True):
        assert line.startswith(start)
    assert not list(tmp_path.rglob("sentinel*"))


@pytest.mark.faults
def test_the_trainer_refuses_payloads(shards: ShardSet, params_file: Path, tmp_path: Path) -> None:
    """The program with every kind instead of the weights: none runs, and training does not start."""
    good = saved(tmp_path / "good", 1)
    for number, payload in enumerate(PAYLOADS.values(), 1):
        step = tmp_path / "model" / step_name(number)
        shutil.copytree(good, step)
        rewrite_manifest(step, step=number)
        put(payload.make(tmp_path / f"sentinel-{number}"), WEIGHTS, payload.name, step)
    before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("*.*")}
    done = program("train", *flags("train", tmp_path, params_file), cwd=tmp_path, **FORCED)
    assert done.returncode == 78, done.stderr
    assert done.stderr.count(f"{WEIGHTS}: not a safetensors file") == len(PAYLOADS) - 1
    assert done.stderr.count(f"{WEIGHTS}: 'classifier.0.bias' is absent") == 1  # the one with a valid header
    assert f"none of its {len(PAYLOADS)} checkpoints verifies" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "model").rglob("*.*")} == before
    assert not list(tmp_path.rglob("sentinel*"))
