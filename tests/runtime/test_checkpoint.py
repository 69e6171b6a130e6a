"""Checkpoints: damaged, foreign and hostile ones are refused by name, and good ones are kept.

VGG_CORRUPTIONS: number of corrupted bytes in the first test, 500 by default.
"""

import ast
import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TRAIN, environment, flags, program
from payloads import PAYLOADS
from safetensors.torch import save, save_file

from runtime import checkpoint, manifest
from runtime.checkpoint import FILES, Step, Tensors, newest, open_step, step_name
from runtime.distributed import Group
from runtime.errors import Refused
from runtime.shardset import ShardSet
from vgg.network.model import CONFIGURATIONS, VGG, Architecture
from vgg.network.trained import Trained, shapes_of
from vgg.training.run import Continue, State, find_run

ALONE = Group(0, 1, 0, 1, torch.device("cpu"))
SEED = 20140904
TINY = ((1,), (1,), (1, 1), (1, 1), (1, 1))
NETWORK = {"configuration": "A", "batch_norm": True, "classifier_width": 3, "num_classes": 3, "input_size": 32}
METADATA: dict[str, Any] = {
    "run": {
        "train": TRAIN,
        "data": {"digest": "d" * 32 + ".dir", "classes_sha256": "c" * 64},
        "initial": None,
        "precision": "float32",
        "code": {"vgg/training/loop.py": "1"},
    },
    "network": NETWORK,
    "pixels": {"mean": [120.0, 110.0, 100.0], "std": [1.0, 1.0, 1.0]},
    "classes": [{"wnid": "cat", "name": "cat"}, {"wnid": "dog", "name": "dog"}, {"wnid": "emu", "name": "emu"}],
    "versions": {"torch": "2", "decoder": "none"},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of one channel: a checkpoint has a few kilobytes, so that random bytes hit JSON and tensors equally."""
    monkeypatch.setitem(CONFIGURATIONS, "A", TINY)
    monkeypatch.setitem(CONFIGURATIONS, "B", ((1, 1), (1, 1), (1, 1), (1, 1), (1, 1)))


def tensors(network: dict[str, Any] = NETWORK, seed: int = 0) -> tuple[Tensors, Tensors]:
    """Random weights and momentum of a network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = VGG(Architecture(**network))
    weights = {
        name: torch.rand(like.shape, generator=generator).to(like.dtype) for name, like in model.state_dict().items()
    }
    return weights, {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}


def saved(directory: Path, step: int, metadata: dict[str, Any] = METADATA) -> Path:
    """Save a good checkpoint of a step."""
    state = vars(State(step=step, best_step=1, schedule={"best_error": 0.5, "epochs_without": 0, "drops": 0}))
    return checkpoint.save(directory, step, *tensors(metadata["network"], step), state, metadata)


def finished(directory: Path) -> Path:
    saved(directory, 1)
    saved(directory, 2)
    checkpoint.finish(directory, 2, 1, METADATA, shapes_of)
    return directory


def rewrite_manifest(
    directory: Path, schema: str = checkpoint.STEP_SCHEMA, names: list[str] | None = None, **body: Any
) -> None:
    """Rewrite the manifest to match the current files.  body: changed entries (None: removed)."""
    metadata = json.loads((directory / manifest.NAME).read_bytes())
    names = names or [entry["path"] for entry in metadata["files"]]
    entries = [manifest.file_entry(directory, name, schema == checkpoint.SCHEMA) for name in names]
    metadata = {**metadata, **body}
    metadata = {k: v for k, v in metadata.items() if k not in ("schema", "files", "sha256") and v is not None}
    metadata.pop("dvc_digest", None)
    (directory / manifest.NAME).write_bytes(manifest.text(manifest.compose(schema, metadata, entries)))


def rewrite_manifests(step: Path, **body: Any) -> None:
    """Rewrite the manifests of a step in a finished directory and of the directory."""
    rewrite_manifest(step, **body)
    rewrite_manifest(step.parent, checkpoint.SCHEMA)


# --- one corrupted byte


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


# --- damaged and foreign checkpoints, and the fallback


def cut(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        os.truncate(path, int(path.stat().st_size * share))

    return damage


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


# --- correct sha256, wrong content


def rewritten(name: str, content: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    """Replace the tensors of one file."""

    def change(step: Path) -> None:
        weights, momentum = tensors()
        save_file(content(weights if name == FILES[0] else momentum), step / name)

    return change


def with_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(step: Path) -> None:
        state = json.loads((step / "state.json").read_bytes())
        (step / "state.json").write_text(json.dumps(change(state)))

    return rewrite


def resized(step: Path) -> None:
    metadata = json.loads((step / manifest.NAME).read_bytes())
    metadata["files"][0]["size"] = str(metadata["files"][0]["size"])
    body = {name: value for name, value in metadata.items() if name not in ("schema", "files", "sha256")}
    (step / manifest.NAME).write_bytes(manifest.text(manifest.compose(metadata["schema"], body, metadata["files"])))


WEIGHTS, MOMENTUM, STATE = FILES
FIRST = "features.0.weight"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty weights": (lambda step: (step / WEIGHTS).write_bytes(b""), WEIGHTS),
    "garbage weights": (lambda step: (step / WEIGHTS).write_bytes(random.Random(1).randbytes(999)), WEIGHTS),
    "weights with a tail": (lambda step: (step / WEIGHTS).write_bytes(save(tensors()[0]) + b"tail"), WEIGHTS),
    "momentum instead of weights": (rewritten(WEIGHTS, lambda _: tensors()[1]), WEIGHTS),
    "no weights": (rewritten(WEIGHTS, lambda _: {}), WEIGHTS),
    "a missing weight": (rewritten(WEIGHTS, lambda t: {k: v for k, v in t.items() if k != FIRST}), WEIGHTS),
    "an additional weight": (rewritten(WEIGHTS, lambda t: {**t, "extra": torch.zeros(1)}), WEIGHTS),
    "another shape": (rewritten(WEIGHTS, lambda t: {**t, FIRST: t[FIRST].flatten()}), WEIGHTS),
    "another type": (rewritten(WEIGHTS, lambda t: {**t, FIRST: t[FIRST].half()}), WEIGHTS),
    "a complex type": (rewritten(WEIGHTS, lambda t: {**t, FIRST: t[FIRST].to(torch.complex64)}), WEIGHTS),
    "garbage momentum": (lambda step: (step / MOMENTUM).write_bytes(b"{}" * 50), MOMENTUM),
    "weights instead of momentum": (rewritten(MOMENTUM, lambda _: tensors()[0]), MOMENTUM),
    "half a momentum": (rewritten(MOMENTUM, lambda t: {FIRST: t[FIRST]}), MOMENTUM),
    "state that is not JSON": (lambda step: (step / STATE).write_bytes(b"\xff\xfe{"), STATE),
    "state nested too deeply": (lambda step: (step / STATE).write_text("[" * 100_000), STATE),
    "state that is a list": (with_state(lambda state: [state]), STATE),
    "state of another step": (with_state(lambda state: {**state, "step": 1}), STATE),
    "state that is not finite": (with_state(lambda state: {**state, "best_error": float("nan")}), STATE),
    "network of an unknown configuration": (
        lambda step: rewrite_manifest(step, network={**NETWORK, "configuration": "F"}),
        "manifest.json",
    ),
    "network with a text for a number": (
        lambda step: rewrite_manifest(step, network={**NETWORK, "input_size": "32"}),
        "manifest.json",
    ),
    "empty network": (lambda step: rewrite_manifest(step, network={}), "manifest.json"),
    "manifest without a network": (lambda step: rewrite_manifest(step, network=None), "manifest.json"),
    "manifest without a run": (lambda step: rewrite_manifest(step, run=None), "manifest.json"),
    "manifest with a text for the step": (lambda step: rewrite_manifest(step, step="two"), "manifest.json"),
    "manifest with a text for a size": (resized, "manifest.json"),
    "manifest with fewer files": (lambda step: rewrite_manifest(step, names=[WEIGHTS, MOMENTUM]), "manifest.json"),
    "manifest with a path outside the folder": (
        lambda step: rewrite_manifest(step, names=[*FILES, f"../{step_name(1)}/{STATE}"]),
        "manifest.json",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_correct_sha256_is_not_enough(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In a finished training and as the newest of an unfinished one: the message names the file."""
    change, name = WRONG[kind]
    step = finished(tmp_path / "model") / step_name(2)
    change(step)
    rewrite_manifests(step, names=None) if name != manifest.NAME else rewrite_manifest(step.parent, checkpoint.SCHEMA)
    with pytest.raises(Refused) as refused:
        Trained.open(tmp_path / "model")
    assert str(refused.value).startswith(f"{step / name}: ")
    (tmp_path / "model" / manifest.NAME).unlink()
    found = find_run(tmp_path / "model", METADATA, False, ALONE)
    assert isinstance(found, Continue)
    assert found.step.step == 1
    assert str(step / name) in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, "unknown": 1},
        lambda state: {k: v for k, v in state.items() if k != "best_error"},
        lambda state: {**state, "history": "none"},
        lambda state: {**state, "best_step": "1"},
        lambda state: {**state, "window": {"a": 1}},
    ],
)
def test_an_invalid_state_is_skipped(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = saved(tmp_path, 1), saved(tmp_path, 2)
    with_state(change)(second)
    rewrite_manifest(second)
    found = find_run(tmp_path, METADATA, False, ALONE)
    assert isinstance(found, Continue)
    found = found.step
    assert found.path == first
    assert f"{second / STATE}: not the state of a training" in caplog.text

    whole = finished(tmp_path / "whole")
    with_state(change)(whole / step_name(2))
    rewrite_manifests(whole / step_name(2))
    with pytest.raises(Refused, match="not the state of a training"):
        find_run(whole, METADATA, False, ALONE)


@pytest.mark.parametrize("step", [1, 2])
def test_a_training_with_a_damaged_checkpoint_is_not_finished(step: int, tmp_path: Path) -> None:
    """The best one was not read since it was saved; a new manifest would confirm the damage."""
    for number in (1, 2):
        saved(tmp_path, number)
    cut(0.5)(tmp_path / step_name(step) / WEIGHTS)
    with pytest.raises(Refused, match=f"{step_name(step)}/{WEIGHTS}"):
        checkpoint.finish(tmp_path, 2, 1, METADATA, shapes_of)
    assert not (tmp_path / manifest.NAME).exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"last": "../../elsewhere"}, "last and best are"),
        ({"best": None}, "best: Field required"),
        ({"names": [f"{step_name(2)}/{STATE}"]}, "lists"),
        ({"network": {**NETWORK, "num_classes": 4}}, "'network' differs from"),
        ({"classes": []}, "'classes' differs from"),
    ],
)
def test_a_wrong_finished_manifest_is_refused(body: dict[str, Any], message: str, tmp_path: Path) -> None:
    rewrite_manifest(finished(tmp_path / "model"), checkpoint.SCHEMA, **body)
    with pytest.raises(Refused, match=message) as refused:
        Trained.open(tmp_path / "model")
    assert str(refused.value).startswith(str(tmp_path / "model" / manifest.NAME))


def test_valid_checkpoints_are_opened(tmp_path: Path) -> None:
    """So the refusals above are caused by the changes, not by the tiny checkpoint."""
    trained = Trained.open(finished(tmp_path / "model"))
    rewrite_manifests(trained.step.path)
    again = Trained.open(tmp_path / "model")
    weights, momentum = tensors(seed=2)
    for name, tensor in again.network().state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert again.step.momentum().keys() == momentum.keys()
    (tmp_path / "model" / "README.md").write_text("as in data/initial")
    Trained.open(tmp_path / "model", "best")
    rewritten(MOMENTUM, lambda _: {})(trained.step.path)  # none with plain SGD
    rewrite_manifests(trained.step.path)
    assert Trained.open(tmp_path / "model").step.momentum() == {}


# --- files that run code when they are loaded


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
from vgg.training.run import find_run
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


def test_payloads_are_refused_and_never_run(tmp_path: Path) -> None:
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

    command = [sys.executable, "-c", OPEN_EVERYTHING]
    for force in ({}, FORCED):
        env = environment(**force)
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
        assert done.returncode == 78, done.stderr
        assert "Traceback" not in done.stderr
        assert f"none of its {len(steps)} checkpoints verifies" in done.stderr
        refused = [line for line in done.stderr.splitlines() if line.startswith("checkpoint refused")]
        for line, start in zip(refused, reversed(steps), strict=True):
            assert line.startswith(start)
        for line, start in zip(done.stdout.splitlines(), directories, strict=True):
            assert line.startswith(start)
        assert not list(tmp_path.rglob("sentinel*"))


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


# --- our sources do not use formats that can run code

FORBIDDEN = {
    "pickle", "cPickle", "_pickle", "dill", "marshal", "shelve", "joblib", "cloudpickle", "pickletools", "runpy",
    "torch.distributed.checkpoint", "torch.package", "torch.jit", "torch.hub",
}  # fmt: skip


def dangers(text: str) -> Iterator[str]:
    """Expressions of a Python source that could run code from data, one line each."""
    for node in ast.walk(ast.parse(text)):
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]  # importlib.import_module("pickle")
        else:
            names = []
        for name in names:
            if any(f"{name}.".startswith(f"{module}.") for module in FORBIDDEN):
                yield f"{line}: {name}"
            if isinstance(node, ast.Import | ast.ImportFrom) and f"{name}.".startswith(("torch.load.", "yaml.")):
                yield f"{line}: {name} under another name, or PyYAML"
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if function == "torch.load" and given.get("weights_only") != "True":
            yield f"{line}: torch.load without weights_only=True"
        if given.get("allow_pickle", "False") != "False" or (function.endswith("np.load") and len(node.args) > 2):
            yield f"{line}: {function} may unpickle"
        if given.get("shell", "False") != "False" or function in ("os.system", "os.popen"):
            yield f"{line}: {function} runs a shell"
        if function in ("eval", "exec", "__import__") or function.endswith(".extractall"):
            yield f"{line}: {function}"
        if function == "YAML" and given.get("typ") != "'safe'":
            yield f"{line}: YAML that may create objects"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import numpy, joblib as j",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
        "import torch\ntorch.distributed.checkpoint.load({})",
        "importlib.import_module('marshal')",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "torch.load(path, **options)",
        "torch.jit.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, None, True)",
        "np.load(path, allow_pickle=trusted)",
        "subprocess.run(words, shell=True)",
        "os.system(words)",
        "archive.extractall(path)",
        "eval(text)",
        "import yaml",
        "yaml = YAML()",
        "yaml = YAML(typ='unsafe')",
    ],
)
def test_each_danger_is_detected(text: str) -> None:
    assert list(dangers(text))


def test_our_sources_cannot_run_data() -> None:
    harmless = "from vgg import checkpoint\nmodel.eval()\nnp.load(p, 'r')\nnp.load(p, allow_pickle=False)\n"
    assert not list(dangers(harmless + "torch.load(p, weights_only=True)"))
    packages = ("vgg", "components", "pipelines", "security")
    paths = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(paths) > 30
    found = [f"{path.relative_to(ROOT)}, {danger}" for path in paths for danger in dangers(path.read_text())]
    assert not found
