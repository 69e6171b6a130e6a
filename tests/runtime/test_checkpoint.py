"""Damaged checkpoints and those of another run are refused by name, and good ones are kept.

VGG_CORRUPTIONS: number of corrupted bytes in the first test, 500 by default.
"""

import copy
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    ALONE,
    METADATA,
    SEED,
    TINY,
    cut,
    finished,
    saved,
    tiny,  # noqa: F401  # a fixture
)
from conftest import environment

from runtime import checkpoint, manifest
from runtime.checkpoint import FILES, Step, newest, open_step, step_name
from runtime.errors import Refused
from vgg.network.trained import Trained, shapes_of
from vgg.training.task import Continue, find_run


def test_a_corrupted_byte_is_never_accepted(tmp_path: Path) -> None:
    """Random bytes of the files of an unfinished and a finished training, changed to random values."""
    saved(tmp_path / "unfinished", 2)
    finished(tmp_path / "finished")
    opened: dict[str, Callable[[], object]] = {
        "unfinished": lambda: open_step(tmp_path / "unfinished", 2, shapes_of),
        "finished": lambda: Trained.open(tmp_path / "finished"),
    }
    files = {kind: [p for p in sorted((tmp_path / kind).rglob("*")) if p.is_file()] for kind in opened}
    assert {kind: len(found) for kind, found in files.items()} == {"unfinished": 4, "finished": 9}
    accepted, touched = [], set()
    for number in range(int(os.environ.get("VGG_CORRUPTIONS", "500"))):
        draw = random.Random(f"{SEED} {number}")  # one generator per case, so that a case can be repeated alone
        kind = draw.choice(sorted(opened))
        path = draw.choice(files[kind])
        touched.add(path)
        intact = path.read_bytes()
        position, change = draw.randrange(len(intact)), draw.randrange(1, 256)
        path.write_bytes(intact[:position] + bytes([intact[position] ^ change]) + intact[position + 1 :])
        case = f"case {number} of seed {SEED}: {path.relative_to(tmp_path)}, byte {position} ^ {change}"
        try:
            opened[kind]()
            accepted.append(case)
        except Refused as refused:
            assert str(refused).startswith(str(path)), f"{case}: the message names another file: {refused}"
        path.write_bytes(intact)
    assert not accepted
    assert touched == {path for found in files.values() for path in found}
    for intact_again in opened.values():
        intact_again()


def fall_back(first: Path, refusal: str, caplog: pytest.LogCaptureFixture) -> tuple[Step, list[str]]:
    """Check that a run falls back to its first checkpoint; returns it and the log: refusal and fallback."""
    found = find_run(first.parent, METADATA, False, ALONE)
    assert isinstance(found, Continue)
    found = found.step
    assert found.path == first
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith(refusal)
    assert messages[1] == f"falling back to {first}"
    return found, messages


@pytest.mark.parametrize("name", [*FILES, manifest.NAME])
@pytest.mark.parametrize(
    "damage", [cut(0), cut(0.001), cut(0.5), cut(0.999), Path.unlink, lambda p: p.write_bytes(b"\0" * 8)]
)
def test_a_damaged_newest_is_reported_and_the_previous_one_used(
    name: str, damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = saved(tmp_path / "model", 1), saved(tmp_path / "model", 2)
    damage(second / name)
    found, messages = fall_back(first, f"checkpoint refused: {second / name}: ", caplog)
    assert checkpoint.steps(tmp_path / "model.refused") == [2]  # not overwritten, not deleted
    assert find_run(tmp_path / "model", METADATA, False, ALONE) == Continue(found)  # the next start logs nothing
    assert len(caplog.records) == len(messages)

    damage(first / name)
    with pytest.raises(Refused, match="none of its 1 checkpoints verifies"):
        find_run(tmp_path / "model", METADATA, False, ALONE)


def pipe(step: Path) -> None:
    (step / "state.json").unlink()
    os.mkfifo(step / "state.json")  # opening it would block


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda step: (step / "optimizer.pt").touch(), r"step-00000002: 'optimizer\.pt' is not a checkpoint file"),
        (lambda step: (step / "sub").mkdir(), "step-00000002: 'sub' is not a checkpoint file"),
        (pipe, r"step-00000002: 'state\.json' is not a checkpoint file"),
        (lambda step: step.rename(step.with_name(step_name(7))), "step-00000007: contains step 2"),
        (lambda step: (shutil.rmtree(step), step.touch()), r"step-00000002/manifest\.json: missing"),
    ],
)
def test_changed_folders_are_refused(
    change: Callable[[Path], object], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = saved(tmp_path, 1)
    change(saved(tmp_path, 2))
    found = newest(tmp_path, shapes_of)
    assert found is not None
    assert found.path == first
    assert any(record.getMessage().startswith("checkpoint refused") for record in caplog.records)
    assert any(re.search(message, record.getMessage()) for record in caplog.records)


def test_names_that_are_not_steps(tmp_path: Path) -> None:
    for name in ("step-0000000²", "step-00000003.tmp", "step-1", "step-abcdefgh"):
        (tmp_path / name).mkdir()
    assert newest(tmp_path, shapes_of) is None


def test_no_checkpoints_and_no_good_ones_differ(tmp_path: Path) -> None:
    assert newest(tmp_path, shapes_of) is None
    (tmp_path / "step-00000003").mkdir()
    with pytest.raises(Refused, match="none of its 1 checkpoints verifies"):
        newest(tmp_path, shapes_of)
    shutil.rmtree(tmp_path / "step-00000003")
    assert newest(tmp_path, shapes_of) is None


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    """On a real file system of 1 MiB, in a separate mount namespace where that is allowed."""
    saved(tmp_path / "model", 1)
    script = f"""
from pathlib import Path
import torch
from runtime import checkpoint
from runtime.errors import StorageFailure
from vgg.network.model import CONFIGURATIONS
from vgg.network.trained import shapes_of
CONFIGURATIONS["A"] = {TINY}
try:
    checkpoint.save(Path("disk/model"), 2, {{"w": torch.ones(400_000)}}, {{}}, {{"step": 2}}, {{}})
except StorageFailure as failure:
    print(failure.exit_code, failure)
print(checkpoint.newest(Path("disk/model"), shapes_of).step)
"""
    (tmp_path / "disk").mkdir()
    mounted = 'mount -t tmpfs -o size=1m tmpfs disk && cp -r model disk && exec "$0" -c "$1"'
    command = ["unshare", "-rm", "bash", "-c", mounted, sys.executable, script]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespaces: {done.stderr.strip()}")
    assert done.stdout.startswith("74 "), done.stderr
    assert "bytes free" in done.stdout
    assert done.stdout.splitlines()[-1] == "1"


def other(**changes: Any) -> dict[str, Any]:
    """METADATA with other values; the key for run.data.digest is run__data__digest."""
    metadata = copy.deepcopy(METADATA)
    for where, value in changes.items():
        *path, last = where.split("__")
        section = metadata
        for name in path:
            section = section[name]
        section[last] = value
    return metadata


FOREIGN = {
    "architecture": (
        other(network__configuration="B", run__train__configuration="B"),
        "network.configuration: B there, A here; train.configuration: B there, A here",
    ),
    "batch norm": (other(network__batch_norm=False), "network.batch_norm: False there, True here"),
    "classes": (other(network__num_classes=10), "network.num_classes: 10 there, 3 here"),
    "class order": (other(run__data__classes_sha256="e" * 64), f"data.classes_sha256: {'e' * 64} there"),
    "data": (other(run__data__digest="e" * 32 + ".dir"), f"data.digest: {'e' * 32}.dir there, {'d' * 32}.dir here"),
    "parameters": (other(run__train__learning_rate=0.02), "train.learning_rate: 0.02 there, 0.01 here"),
    "rule": (other(run__train__schedule__drop_factor=3), "train.schedule.drop_factor: 3 there, 10 here"),
    "first weights": (other(run__initial="f" * 64), f"initial: {'f' * 64} there, None here"),
    "precision": (other(run__precision="bfloat16"), "precision: bfloat16 there, float32 here"),
    "code": (other(run__code={"vgg/training/loop.py": "2"}), "code.vgg/training/loop.py: 2 there, 1 here"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_newest_of_another_run_is_reported_and_the_previous_one_used(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metadata, message = FOREIGN[kind]
    first, second = saved(tmp_path / "model", 1), saved(tmp_path / "model", 2, metadata)
    expected = {path.name: path.read_bytes() for path in second.iterdir()}
    fall_back(first, f"checkpoint refused: {second} belongs to another run: {message}", caplog)
    moved = tmp_path / "model.refused" / second.name
    assert {path.name: path.read_bytes() for path in moved.iterdir()} == expected


@pytest.mark.parametrize("kind", FOREIGN)
def test_if_all_checkpoints_are_of_another_run_the_differences_are_reported(kind: str, tmp_path: Path) -> None:
    metadata, message = FOREIGN[kind]
    for step in (1, 2):
        saved(tmp_path / "model", step, metadata)
    (saved(tmp_path / "model", 3) / "state.json").write_text("{}")
    with pytest.raises(Refused) as refused:
        find_run(tmp_path / "model", METADATA, False, ALONE)
    assert refused.value.exit_code == 78
    lines = str(refused.value).splitlines()
    assert lines[0] == f"{tmp_path / 'model'}: contains an unfinished run (step 2) that differs:"
    assert lines[1].startswith(f"  {message.split('; ')[0]}")
    assert lines[-1].startswith("To continue it, restore these")
    assert checkpoint.steps(tmp_path / "model") == [1, 2, 3]


def test_accepted_code_is_continued_from_the_newest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 1)
    second = saved(tmp_path, 2, FOREIGN["code"][0])
    found = find_run(tmp_path, METADATA, True, ALONE)
    assert isinstance(found, Continue)
    found = found.step
    assert found.path == second
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["continuing with changed code: vgg/training/loop.py: 2 there, 1 here"]
