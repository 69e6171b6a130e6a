"""The runs of the paper's tables: their order, FLOPs and hours, and a study that is killed and goes on."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import EVALUATE, NUM_VAL, REGISTER, ROOT, SHARD, TRAIN
from dvcproject import call, tiny_project, user
from evaluations import CIFAR, metrics, result, write

from pipelines.paper import __main__ as paper
from pipelines.paper import recipes
from runtime import manifest
from runtime.errors import WrongParameters

RECIPES = ROOT / "recipes"


def write_recipe(path: Path, **train: Any) -> Path:
    sections = {"shard": SHARD, "train": {**TRAIN, **train}, "evaluate": EVALUATE, "register": REGISTER}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(sections))
    return path


def names(*arguments: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    paper.main(["--plan", "--json", *arguments])
    return [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]]


def test_imagenets_runs_come_in_an_order_in_which_each_finds_its_first_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    paper.main(["--plan", "--json", "--images-per-second", "4000", "A=9000"])
    plan = json.loads(capsys.readouterr().out)
    runs = {run["name"]: run for run in plan["runs"]}
    assert [name.removeprefix("imagenet-") for name in runs] == [
        "a-256", "a-lrn-256", "b-256", "c-256", "d-256", "e-256", "c-384", "d-384", "e-384",
        "c-jitter", "d-jitter", "e-jitter",
    ]  # fmt: skip
    before = {name.removeprefix("imagenet-"): run["before"] for name, run in runs.items()}
    assert before["a-256"] is None and before["a-lrn-256"] is None
    assert all(before[f"{net}-256"] == "imagenet-a-256" for net in "bcde")
    assert all(before[f"{net}-384"] == f"imagenet-{net}-256" for net in "cde")
    assert all(before[f"{net}-jitter"] == f"imagenet-{net}-384" for net in "cde")
    # 15.47 GMAC an image, 2 FLOP each, 3 × in training, 74 epochs (370,296 steps of 256)
    d = runs["imagenet-d-256"]
    assert d["flops"] == pytest.approx(6 * 15.47e9 * 74 * 1_281_167, rel=1e-3)
    assert d["hours"] == pytest.approx(74 * 1_281_167 / 4000 / 3600, rel=1e-3)
    assert runs["imagenet-a-256"]["hours"] == pytest.approx(74 * 1_281_167 / 9000 / 3600, rel=1e-3)
    e, ratio = runs["imagenet-e-256"], 19.632 / 15.47
    assert e["hours"] == pytest.approx(d["hours"] * ratio, rel=1e-3)  # by its FLOPs
    paper.main(["--plan", "--json"])
    assert json.loads(capsys.readouterr().out)["hours"] is None  # no rate, no hours


def test_a_table_needs_the_runs_before_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path / "r/d.yaml", configuration="D", init="checkpoint", train_scale=[32, 40])
    write_recipe(tmp_path / "r/d-32.yaml", configuration="D", init="shallower", train_scale=32)
    write_recipe(tmp_path / "r/e-bn.yaml", configuration="E", batch_norm=True, train_scale=32)  # not the paper's
    write_recipe(tmp_path / "r/e.yaml", configuration="E", init="shallower", train_scale=64)
    write_recipe(tmp_path / "r/z.yaml", configuration="A", train_scale=32)
    size = ["--num-images", "30", "--num-classes", "3", "--recipes", str(tmp_path / "r")]
    assert names(*size, capsys=capsys) == ["z", "d-32", "e", "d"]
    assert names(*size, "--table", "4", "--seeds", "5,6", capsys=capsys) == [
        f"{name}-seed{seed}" for seed in (5, 6) for name in ("z", "d-32", "e", "d")
    ]
    runs = {run.name: run for run in recipes.read([tmp_path / "r"], [5])}
    assert (runs["d-seed5"].before, runs["d-seed5"].train.seed) == ("d-32-seed5", 5)
    assert runs["d-seed5"].sections["shard"] == runs["z-seed5"].sections["shard"]  # one data set for all seeds
    with pytest.raises(WrongParameters, match=r"no recipe fills a row of Table 5.*no multi_crop"):
        names(*size, "--table", "5", capsys=capsys)
    (tmp_path / "r/z.yaml").unlink()
    with pytest.raises(WrongParameters, match=r"d-32.yaml: train.init 'shallower' needs the weights of net A"):
        names(*size, capsys=capsys)
    write_recipe(tmp_path / "r/z.yaml", configuration="A", train_scale=32, classifier_width=32)
    with pytest.raises(WrongParameters, match=r"train\.classifier_width is not that of"):
        names(*size, capsys=capsys)


def test_rows_of_other_data_are_those_of_the_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path / "r/a.yaml", configuration="A", train_scale=32)
    write_recipe(tmp_path / "r/d.yaml", configuration="D", init="shallower", train_scale=32)
    modes = {"dense_Q32_flip": result(30, 2, "dense", [32], 13)}
    write(tmp_path / "runs/a", metrics("A", 32, modes, CIFAR))
    paper.main(["--table", "3", "--runs", str(tmp_path / "runs"), "--recipes", str(tmp_path / "r"), "--json"])
    table = json.loads(capsys.readouterr().out)
    assert [(row["configuration"], row["num_seeds"]) for row in table["rows"]] == [("A", 1), ("D", 0)]
    assert table["missing"] == ["D S=32 Q=32"]


class Study:
    """A study of the tiny project in processes of its own."""

    def __init__(self, project: Path) -> None:
        self.project, self.runs = project, project / "runs"
        self.command = [sys.executable, "-m", "pipelines.paper", "--run", "--recipes", "mini", "--seeds", "1,2"]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command, cwd=self.project, env=user(PYTHONPATH=str(ROOT)), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def finish(self, code: int) -> str:
        running = self.start()
        output = running.communicate(timeout=400)[0]
        assert running.returncode == code, output
        return str(output)

    def paper(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "pipelines.paper", *arguments]
        return call(self.project, *command, PYTHONPATH=str(ROOT))

    def checkpoints(self, run: str) -> list[str]:
        return sorted(path.name for path in (self.runs / run / "models/vgg").glob("step-*[0-9]"))

    def await_checkpoint(self, run: str, running: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 250
        while not self.checkpoints(run):
            assert running.poll() is None and time.monotonic() < end, running.communicate(timeout=10)[0]
            time.sleep(0.05)

    def weights(self, run: str) -> str:
        return str(json.loads((self.runs / run / "metrics/train.json").read_bytes())["weights_sha256"])


@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_a_study_that_is_stopped_killed_and_fails_keeps_what_is_done_and_goes_on(
    tmp_path: Path, empty_database: Path
) -> None:
    study = Study(tiny_project(tmp_path / "project", empty_database))
    common = {"train_scale": 32, "epochs": 6}
    write_recipe(study.project / "mini/a.yaml", configuration="A", **common)
    write_recipe(study.project / "mini/b.yaml", configuration="B", init="shallower", **common)

    running = study.start()  # stopped: the training saves, nothing is left at work
    study.await_checkpoint("a-seed1", running)
    running.send_signal(signal.SIGTERM)
    output = running.communicate(timeout=100)[0]
    assert running.returncode == 75, output
    reached = study.checkpoints("a-seed1")
    assert reached and not (study.runs / "a-seed1/models/vgg/manifest.json").exists()
    assert working_in(study.runs) == []

    running = study.start()  # killed: DVC and the training go on, and nobody else may
    study.await_checkpoint("b-seed1", running)
    running.kill()
    assert "a study is being run there, or a run of one that was killed" in study.finish(75)
    output = running.communicate(timeout=600)[0]  # until the orphans end: they hold the output
    assert f"continuing models/vgg at step {int(reached[-1][5:])}" in output
    assert working_in(study.runs) == []

    write_recipe(study.project / "mini/d.yaml", configuration="D", **common, learning_rate=100, init="normal")
    output = study.finish(78)  # one fails: its name and code; seed 2 has not begun
    assert "Running stage 'shard'" not in output
    assert "run 1 of 6: a-seed1 is finished" in output
    assert "run 2 of 6: b-seed1 is finished" in output
    assert "run d-seed1 failed" in output and "exit code 78" in output
    (study.project / "mini/d.yaml").unlink()

    study.finish(0)
    output = study.finish(0)  # all are finished: nothing runs
    assert "Running stage" not in output
    for seed in (1, 2):
        made = manifest.read(study.runs / f"b-seed{seed}/models/vgg", "vgg.checkpoint/1")["run"]
        assert made["initial"] == study.weights(f"a-seed{seed}")
        assert made["train"]["seed"] == seed
    assert study.weights("a-seed1") != study.weights("a-seed2")
    assert call(study.runs / "b-seed2", "dvc status train evaluate").strip().endswith("up to date.")
    assert parents(study.project / "mlflow.db") == {"FINISHED": 4, "FAILED": 1}  # that of d
    links = (study.runs / "b-seed2/data/shards/manifest.json").stat().st_nlink
    assert links >= 4  # shards, a and b of two seeds, and the cache share the file

    table = json.loads(study.paper("--table", "4", "--runs", "runs", "--recipes", "mini", "--json"))
    assert [(row["configuration"], row["num_seeds"]) for row in table["rows"]] == [("A", 2), ("B", 2)]
    assert (table["missing"], table["num_images"]) == ([], NUM_VAL)

    write_recipe(study.project / "mini/b.yaml", configuration="B", init="shallower", **{**common, "epochs": 7})
    assert "b-seed1: made with another recipe (train differ)" in study.finish(78)


def parents(database: Path) -> Counter[str]:
    """Runs in the project's MLflow that have stages, by status."""
    query = "select status from runs where run_uuid in (select value from tags where key = 'mlflow.parentRunId')"
    with closing(sqlite3.connect(database)) as connection:
        return Counter(status for (status,) in connection.execute(query))


def working_in(folder: Path) -> list[str]:
    """Command lines of processes whose folder is below this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")).is_relative_to(folder):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
