"""Where DVC's experiments leave their results: in the user's project, not in the copies that DVC deletes."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from dvcproject import call
from mlflow import MlflowClient

from components.tracking import access
from runtime import environment as variables

STAGE = """
import pathlib, sys
from components.tracking.tracker import Tracker
pathlib.Path("out.txt").write_text("a result")
with Tracker("register", "k" * 16, pathlib.Path("params.yaml").read_text()) as tracker:
    tracker.metrics({"eval/top1_error": 0.25})
    tracker.artifact(pathlib.Path("out.txt"), "eval")
"""
DVC_YAML = "stages: {register: {cmd: python stage.py, params: [rate], outs: [out.txt]}}\n"


def project(where: Path, **files: str) -> Path:
    """A DVC project with these files, committed."""
    where.mkdir(parents=True)
    for name, text in files.items():
        (where / name.replace("_", ".")).write_text(text)
    call(where, "git init -q && dvc init -q && git add -A && git commit -qm begin")
    return where


def test_a_temporary_experiment_tracks_into_the_users_project(empty_database: Path, tmp_path: Path) -> None:
    """dvc exp run --temp: run, artifact and journal, in a path with a space."""
    where = project(tmp_path / "a project", stage_py=STAGE, dvc_yaml=DVC_YAML, params_yaml="rate: 1\n")
    shutil.copy(empty_database, where / "mlflow.db")
    call(where, "dvc exp run --temp -S rate=2", PYTHONPATH=str(ROOT))
    client = MlflowClient(f"sqlite:///{where}/mlflow.db")
    [run] = client.search_runs(
        [client.get_experiment_by_name(access.EXPERIMENT).experiment_id], "tags.`vgg.stage` = 'register'"
    )
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"eval/top1_error": 0.25}
    assert Path(run.info.artifact_uri).is_relative_to(where / "mlruns")
    assert (Path(run.info.artifact_uri) / "eval/out.txt").read_text() == "a result"
    assert not list((where / ".tracking").iterdir())


def test_the_project_is_found_from_every_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI", "VGG_JOURNAL"):
        monkeypatch.delenv(name, raising=False)
    copy = tmp_path / ".dvc/tmp/exps/standalone/tmp1"
    nested = copy / "part/.dvc/tmp/exps/tmp2"
    nested.mkdir(parents=True)
    for where in (copy, copy / "part", nested):  # a program started by hand, without DVC_ROOT
        monkeypatch.chdir(where)
        assert variables.TRACKING_URI.get() == f"sqlite:///{tmp_path}/mlflow.db"
        assert variables.JOURNAL.get() == tmp_path / ".tracking"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "elsewhere"))  # .dvc/tmp may be a link to another disk
    assert variables.artifacts() == tmp_path / "elsewhere/mlruns"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert variables.TRACKING_URI.get() == "sqlite:///mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert variables.artifacts() is None
