"""Without git: make run says what to do, and both ways out work."""

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
