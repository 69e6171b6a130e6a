"""Which commit a training is repeated at: by the code that it used, whatever git said when it began."""

import subprocess
from pathlib import Path

import pytest

from components.closure import fingerprint_of
from components.lineage.commits import choose
from runtime.errors import Refused

LOOP, INIT = "vgg/training/loop.py", "vgg/network/init.py"


def git(where: Path, *arguments: str) -> str:
    person = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(["git", *person, *arguments], cwd=where, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def write(where: Path, **content: str) -> None:
    for path, text in {LOOP: content.get("loop", "X = 1\n"), INIT: content.get("init", "Y = 1\n")}.items():
        (where / path).parent.mkdir(parents=True, exist_ok=True)
        (where / path).write_text(text)


def commit(where: Path) -> str:
    git(where, "add", "-A")
    git(where, "commit", "-qm", "x", "--allow-empty")
    return git(where, "rev-parse", "HEAD")


def code(where: Path) -> dict[str, str]:
    return {path: fingerprint_of((where / path).read_bytes()) for path in (LOOP, INIT)}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    git(tmp_path, "init", "-q")
    write(tmp_path)
    return tmp_path


def test_the_recorded_commit(repository: Path) -> None:
    first, used = commit(repository), code(repository)
    write(repository, loop="X = 2\n")
    commit(repository)
    assert choose(repository, {"commit": first, "dirty": False}, used) == (first, "")
    assert choose(repository, {"commit": first, "dirty": False}, {}) == (first, "")
    chosen, remark = choose(repository, {"commit": first, "dirty": True}, used)
    assert chosen == first
    assert "none of them in the code of training" in remark


def test_another_commit_with_the_same_code(repository: Path) -> None:
    first = commit(repository)
    write(repository, loop="X = 2\n")  # trained with this, and committed later, with a comment more
    used = code(repository)
    write(repository, loop="# the second\nX = 2\n")
    later = commit(repository)
    write(repository, loop="X = 3\n")
    commit(repository)
    chosen, remark = choose(repository, {"commit": first, "dirty": True}, used)
    assert (chosen, "had changes in the code of training" in remark) == (later, True)
    for recorded, says in (("0" * 40, "commit 000000000000 is not in this repository"), (None, "was not recorded")):
        chosen, remark = choose(repository, {"commit": recorded, "dirty": False}, used)
        assert (chosen, says in remark) == (later, True)
    assert choose(repository, {"commit": first, "dirty": True}, used, later[:10])[0] == later
    with pytest.raises(Refused, match=f"other code of training: {LOOP} differ"):
        choose(repository, {"commit": first, "dirty": True}, used, "HEAD")
    with pytest.raises(Refused, match="no such commit"):
        choose(repository, {"commit": first, "dirty": True}, used, "nothing")


def test_what_no_commit_holds_is_refused_by_name(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = commit(repository)
    write(repository, loop="X = 2\n")
    used = code(repository)
    with pytest.raises(Refused, match=f"never committed: {LOOP} had changes beside commit {first[:12]}.*--commit"):
        choose(repository, {"commit": first, "dirty": True, "diff_sha256": "d" * 64}, used)
    with pytest.raises(Refused, match=r"000000000000 is not in this repository.*git fetch"):
        choose(repository, {"commit": "0" * 40, "dirty": False}, used)
    with pytest.raises(Refused, match="unknown files"):
        choose(repository, {"commit": first, "dirty": True}, {})
    with pytest.raises(Refused, match="Run this in the repository"):
        choose(tmp_path_factory.mktemp("none"), {"commit": first, "dirty": False}, used)
