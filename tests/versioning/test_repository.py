"""Without git, make run says what to do; and what the machines of others hold does not disturb make and dvc."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from dvcproject import call


@pytest.mark.parametrize(
    "way_out", ["git init && git add -A && git commit -m begin", "dvc config --local core.no_scm true"]
)
def test_an_exported_archive(way_out: str, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    for name in ("Makefile", ".dvc/config", ".dvc/.gitignore", "dvc.yaml", "params.yaml", ".gitignore"):
        (archive / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, archive / name)
    ceiling = {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
    refused = call(archive, "make --no-print-directory run", code=2, **ceiling)
    assert f"{archive} is in no git repository" in refused
    assert way_out in refused
    assert not (archive / ".venv").exists()
    call(archive, way_out, **ceiling)
    assert call(archive, "make --no-print-directory repository", **ceiling) == ""
    assert "shard" in call(archive, "dvc stage list", **ceiling)


def test_a_repository_of_another_owner_is_one(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path / "Makefile")
    call(tmp_path, "git init -q")
    assert call(tmp_path, "make --no-print-directory repository", GIT_TEST_ASSUME_DIFFERENT_OWNER="1") == ""


def test_packages_of_others_are_not_used(tmp_path: Path) -> None:
    """PYTHONPATH is set by ROS and by modules of clusters, PYTHONSAFEPATH by careful people, PIP_USER by pip.conf."""
    show = "--eval=show: ; @python -m components.environment && env"
    set_by_others = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1", "PYTHONHOME": str(tmp_path), "PIP_USER": "yes"}
    shown = call(ROOT, "make", "--no-print-directory", show, "show", **set_by_others)
    assert "VGG_STORE" in shown
    assert "PIP_USER=no" in shown.splitlines()
    assert str(tmp_path) not in shown


def test_what_others_leave_in_folders_is_no_change_of_the_data(tmp_path: Path) -> None:
    call(tmp_path, "mkdir images && echo 1 > images/a.jpg && dvc init -q --no-scm && dvc add -q images")
    shutil.copy(ROOT / ".dvcignore", tmp_path)
    call(tmp_path, "cd images && mkdir .ipynb_checkpoints && touch .DS_Store ._a.jpg Thumbs.db desktop.ini .nfs00a4 "
         ".ipynb_checkpoints/a.jpg")  # fmt: skip
    assert "up to date" in call(tmp_path, "dvc status")
    call(tmp_path, "echo 2 > images/b.jpg")
    assert "modified" in call(tmp_path, "dvc status")


def test_a_folder_of_results_on_another_disk_is_refused_before_the_work(tmp_path: Path) -> None:
    """DVC says that it is outside of the git repository only after the stage, perhaps a day later."""
    shutil.copy(ROOT / "Makefile", tmp_path / "Makefile")
    call(
        tmp_path, "git init -q && mkdir -p disk data/images && ln -s disk models && ln -s ../../disk data/images/train"
    )
    assert "models is a link" in call(tmp_path, "make --no-print-directory repository", code=2)
    call(tmp_path, "rm models")
    assert call(tmp_path, "make --no-print-directory repository") == ""
