"""Push, clone, pull, experiments: the commands of the README, with the real dvc and git."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from dvcproject import call, readme, tiny_project
from mlflow import MlflowClient

from components.tracking import access

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
WIDTH = 100


def runs(where: Path, stage: str) -> list[Any]:
    client = MlflowClient(f"sqlite:///{where}/mlflow.db")
    experiment = client.get_experiment_by_name(access.EXPERIMENT)
    assert experiment.artifact_location == str(where / "mlruns")
    return client.search_runs([experiment.experiment_id], f"tags.`vgg.stage` = '{stage}'", order_by=["start_time ASC"])


def versions(where: Path) -> list[str]:
    database = f"sqlite:///{where}/mlflow.db"
    client = MlflowClient(database, database)
    return sorted(str(found.version) for found in client.search_model_versions("name = 'tiny'"))


def expect_readable(printed: str) -> None:
    assert "failed to load" not in printed, printed
    assert "ERROR" not in printed, printed
    assert "…" not in printed, printed
    lines = [line for line in printed.splitlines() if not line.startswith("file://")]  # as long as this test's folder
    assert all(len(line) <= WIDTH for line in lines), printed
    assert printed.strip()


def test_the_commands_of_the_readme(empty_database: Path, tmp_path: Path) -> None:
    share, clone, experiments, own = readme("Versions and experiments with DVC")
    where = tiny_project(tmp_path / "project", empty_database)
    versioned = call(where, " && ".join(line for line in own))
    assert "ERROR" not in versioned
    call(where, "git commit -qm images && dvc repro")
    assert call(where, "dvc status").strip().endswith("up to date.")

    # to a colleague: nothing runs again
    call(where, " && ".join(share).replace("/mnt/store/vgg", str(tmp_path / "store")))
    assert clone[:2] == ["git clone ssh://server/vgg.git && cd vgg", "make install && source .venv/bin/activate"]
    call(tmp_path, "git clone project colleague")
    colleague = tmp_path / "colleague"
    shutil.copy(ROOT / ".dvc/plots/page.html", colleague / ".dvc/plots/page.html")  # make install
    call(colleague, clone[2])
    assert call(colleague, clone[3]).strip().endswith("up to date.")
    before = (colleague / "dvc.lock").read_bytes()
    assert "Running stage" not in call(colleague, "dvc repro")
    assert (colleague / "dvc.lock").read_bytes() == before
    assert not (colleague / "mlflow.db").exists()
    assert call(colleague, "git status --short") == ""
    expect_readable(call(colleague, "dvc metrics show && dvc plots show && dvc plots diff"))
    shutil.copy(empty_database, colleague / "mlflow.db")
    call(colleague, "dvc repro -f -s register")
    assert versions(colleague) == ["1"]

    # experiments: in the project, and queued in copies that are gone afterwards
    here, *compared, back, queued, start, show = experiments
    call(where, here.replace("'evaluate.test_scales=[32,33]'", "train.seed=2"))
    assert "1 insertion(+), 1 deletion(-)" in call(where, "git diff --stat params.yaml")
    metrics, params, plots = (call(where, command) for command in compared)
    for printed in (metrics, params, plots, call(where, "dvc metrics show")):
        expect_readable(printed)
    assert "val_loss" in metrics
    assert "train.seed" in params
    assert (where / "dvc_plots/index.html").exists()
    call(where, back)
    call(where, queued)
    call(where, queued.replace("evaluate.softmax=per_position", "shard.seed=2"))
    call(where, start)
    wait_for_queue(where)
    assert "Failed" in call(where, "dvc queue status")  # refused by the gate, which must see the champion for that
    assert {run.info.status for run in runs(where, "evaluate")} == {"FINISHED"}
    gates = [run.data.tags["vgg.gate"] for run in runs(where, "register")]
    assert gates.count("passed") == 3
    [refused] = [gate for gate in gates if gate != "passed"]
    assert refused.startswith("the champion was evaluated on other images")
    assert versions(where) == ["1", "2", "3"]  # the refused one is a challenger
    assert [path.name for path in (where / ".tracking").iterdir()] == ["place"]

    table = call(where, show)
    expect_readable(table)
    assert all(name in table for name in ("val_loss", "top1_error", "seed", "softmax"))
    first = [line[:WIDTH] for line in call(where, "dvc exp show").splitlines()]  # wide: a pager shows its beginning
    assert all(name in first[1] for name in ("train_loss", "val_loss"))


def wait_for_queue(where: Path) -> None:
    until = time.monotonic() + 600
    while time.monotonic() < until:
        status = call(where, "dvc queue status")
        if "Queued" not in status and "Running" not in status:
            return
        time.sleep(3)
    raise AssertionError(status)
