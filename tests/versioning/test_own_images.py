"""Images and first weights can be versioned where the README puts them: dvc add, dvc import-url, whole or in parts."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from dvc.repo import Repo
from dvcproject import call


@pytest.mark.parametrize(
    ("commands", "tracked"),
    [
        ("git rm -r -q data/images && dvc add data/images", "data/images.dvc"),
        ("git rm -r -q data/initial && dvc add data/initial", "data/initial.dvc"),
        ("git rm -r -q data/images && rm -r data/images && dvc import-url $PWD/../elsewhere data/images",
         "data/images.dvc"),
        ("dvc add data/images/train", "data/images/train.dvc"),
    ],
    ids=["images", "initial", "import-url", "a part"],
)  # fmt: skip
@pytest.mark.faults
def test_a_folder_becomes_versioned(commands: str, tracked: str, tmp_path: Path) -> None:
    """git keeps the .dvc file, DVC finds it in a walk, and the files themselves are in no commit."""
    where = tmp_path / "project"
    for name in (".gitignore", ".dvcignore", ".dvc/config", "data/images/README.md", "data/initial/README.md"):
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, where / name)
    call(where, "git init -q && git add -A && git commit -qm begin")
    for folder in (where / "data/images/train/cat", where / "data/initial/step", tmp_path / "elsewhere/train/cat"):
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(b"an image")
    for name in ("data/images/train/cat/1.jpg", "data/initial/step/1.jpg"):  # nothing of it goes into git by accident
        call(where, f"git check-ignore -q {name}")
    call(where, f"{commands} && git add -A && git commit -qm versioned")
    listed = call(where, "git ls-files data").split()
    assert tracked in listed
    assert not [name for name in listed if name.endswith(".jpg")]
    with Repo(where) as repo:
        assert str(where / tracked) in [stage.path for stage in repo.index.stages]
