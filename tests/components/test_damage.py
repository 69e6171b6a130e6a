"""Whatever is read back from disk may be empty, short or wrong after a power loss: it is named, or made again."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import flags, program
from mlflow import MlflowClient

from components.tracking import access
from components.tracking.__main__ import replay
from components.tracking.journal import Journal
from components.tracking.tracker import Tracker
from runtime.errors import Preempted

SEED = int(os.environ.get("VGG_DAMAGE_SEED", "1"))
STEPS = 6
Damage = Callable[[bytes, random.Random], bytes]


def flipped(data: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(max(len(data), 1))
    return data[:at] + bytes([(data[at] if data else 0) ^ 1 << dice.randrange(8)]) + data[at + 1 :]


DAMAGES: dict[str, Damage] = {
    "empty": lambda data, dice: b"",
    "cut in half": lambda data, dice: data[: len(data) // 2],
    "one bit": flipped,
    "random bytes": lambda data, dice: dice.randbytes(len(data)),
    "zeros": lambda data, dice: bytes(len(data)),  # XFS after a power loss
    "another type": lambda data, dice: b'[1, {"sha256": 2}]\n',
    "deeply nested": lambda data, dice: b"[" * 100_000,
}


@pytest.fixture
def client(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr("components.tracking.tracker.PREEMPTED_FLUSH_SECONDS", 60.0)
    return access.connect()


def attempt(folder: Path, steps: range, lineage: str, stop: bool) -> None:
    (folder / "curves.csv").write_text("x")
    with Tracker("train", lineage * 64, lineage) as tracker:
        tracker.params({"train": {"learning_rate": 0.1}})
        for step in steps:
            tracker.point(step, {"train/loss": 1 / step})
        tracker.artifact(folder / "curves.csv", "curves")
        if stop:
            raise Preempted("stopped")
        tracker.metrics({"final/error": 0.5})


def stopped(folder: Path, lineage: str, monkeypatch: pytest.MonkeyPatch, delivered: bool) -> Path:
    """A stopped stage; returns its journal, delivered or not."""
    with monkeypatch.context() as patch:
        if not delivered:
            patch.setattr("components.tracking.tracker.connect", object)
            patch.setattr("components.tracking.tracker.deliver", lambda *_: None)
        with pytest.raises(Preempted):
            attempt(folder, range(1, 4), lineage, stop=True)
    [journal] = folder.glob(f".tracking/train-{lineage * 16}")
    return journal


@pytest.mark.parametrize("delivered", [True, False])
@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=[] if name in ("empty", "one bit") else pytest.mark.faults) for name in DAMAGES]
)
def test_a_damaged_journal(
    damage: str, delivered: bool, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Every file of it.  The stage goes on; nothing is delivered twice, and what is lost is said and kept."""
    dice, names = random.Random(f"{SEED} {damage}"), set[str]()
    for number, lineage in enumerate("abc"):
        caplog.clear()
        journal = stopped(tmp_path, lineage, monkeypatch, delivered)
        files = sorted(path for path in journal.rglob("*") if path.is_file())
        path = files[number % len(files)]
        names.add(path.name)
        before = path.read_bytes()
        path.write_bytes(DAMAGES[damage](before, dice))
        is_damaged = path.read_bytes() != before and path.parent == journal
        attempt(tmp_path, range(3, STEPS + 1), lineage, stop=False)
        if is_damaged and not (path.name == "events.jsonl" and damage == "empty"):
            assert re.search(rf"{path.name} (is damaged|has damaged lines).* moved to .*\.damaged", caplog.text)
        assert not journal.exists()
        [child, parent] = runs(client, lineage)
        assert child.info.status == "FINISHED"
        assert child.data.params == {"train.learning_rate": "0.1"} == parent.data.params
        steps = [point.step for point in client.get_metric_history(child.info.run_id, "train/loss")]
        lost = is_damaged and path.name == "events.jsonl" and not delivered
        assert sorted(set(steps)) == steps and set(range(4 if lost else 1, STEPS + 1)) <= set(steps)
        for run in (child, parent):
            assert len(client.get_metric_history(run.info.run_id, "final/error")) == 1
    assert names >= {"events.jsonl", "curves.csv"} | ({"delivered.json"} if delivered else set())
    assert replay(Path(".tracking")) == 0


def runs(client: MlflowClient, lineage: str) -> list:  # type: ignore[type-arg]
    experiment = client.get_experiment_by_name(access.EXPERIMENT)
    assert experiment
    [parent] = client.search_runs([experiment.experiment_id], f"tags.`vgg.lineage` = '{lineage}'")
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return [*children, parent]


def test_a_damaged_line_is_set_aside_and_the_others_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "j")
    for number in range(5):
        journal.append({"kind": "tags", "values": {"number": str(number)}})
    journal.close()
    lines = journal.path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"2"', b'"7"')  # valid JSON with another value
    journal.path.write_bytes(b"".join(lines))
    again = Journal(tmp_path / "j")
    assert [event["values"]["number"] for event, _ in again.events()] == ["0", "1", "3", "4"]
    assert (tmp_path / "j.damaged").read_bytes() == lines[2]
    assert f"({len(lines[2])} bytes moved to {tmp_path / 'j.damaged'})" in caplog.text
    with pytest.raises(Preempted):  # still locked
        Journal(tmp_path / "j")
    again.append({"kind": "tags", "values": {"number": "5"}})
    again.close()
    caplog.clear()
    assert [event["values"]["number"] for event, _ in Journal(tmp_path / "j").events()] == ["0", "1", "3", "4", "5"]
    assert not caplog.text


# --- all programs, with every small file that they leave behind

STAGES = ("shard", "train", "evaluate", "register")
CODES = {0, 64, 65, 69, 74, 75, 78}
MAX_BYTES = 100_000
PER_FILE = int(os.environ.get("VGG_DAMAGES", "4"))  # of the four damages


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_every_small_file(stage: str, killed: bool, images: Path, params_file: Path, tmp_path: Path) -> None:
    """The stage runs again after a file was damaged: it succeeds, or exits with a code of the contract and its name.

    killed: it had not finished before, and MLflow had nothing yet.
    """
    dice = random.Random(f"{SEED} {stage}")
    for earlier in STAGES[: STAGES.index(stage) + 1]:
        later = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"} if killed and earlier == stage != "register" else {}
        done = program(earlier, *flags(earlier, tmp_path, params_file), cwd=tmp_path, **later)
        assert done.returncode == 0, done.stderr
    if killed:
        for output in ("shards", "model", "predictions"):
            if output in str(flags(stage, tmp_path, params_file)[-4:]):
                (tmp_path / output / "manifest.json").unlink(missing_ok=True)
    finished = tmp_path.with_name(tmp_path.name + "-finished")
    shutil.copytree(tmp_path, finished, symlinks=True)
    files = [
        path.relative_to(finished) for path in sorted(finished.rglob("*"))
        if path.is_file() and path.stat().st_size <= MAX_BYTES and path.name != "params.yaml"
        and path.parts[len(finished.parts)] not in ("images", "mlruns")
    ]  # fmt: skip
    assert len(files) > 5
    troubles = []
    words = flags(stage, tmp_path, params_file)
    later = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "VGG_JOURNAL": f"{tmp_path}/.tracking"}
    for file in files:
        for damage in dice.sample(("empty", "cut in half", "one bit", "random bytes"), PER_FILE):
            shutil.rmtree(tmp_path)
            shutil.copytree(finished, tmp_path, symlinks=True)
            before = (tmp_path / file).read_bytes()
            (tmp_path / file).write_bytes(DAMAGES[damage](before, dice))
            done = program(stage, *words, cwd=tmp_path.parent, **later)
            code, said = done.returncode, done.stderr
            named = file.name in said or str(file.parent) in said
            if code not in CODES or "Traceback" in said or (code and not named):
                troubles.append(f"{file}, {damage}: {code}\n{said[-900:]}")
    assert not troubles, f"{len(troubles)} of {PER_FILE * len(files)}:\n" + "\n\n".join(troubles)
