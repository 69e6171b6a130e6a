"""The record of a stage: what git says, whatever it says; the key of a pipeline run by values, not by text."""

import json
import logging
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from components.tracking import provenance

NOTHING = {"commit": None, "dirty": None, "diff_sha256": None}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one commit, taken for that of the code."""
    repository = tmp_path / "it's a repository"
    repository.mkdir()
    for name in ("VGG_GIT_COMMIT", "VGG_PIPELINE_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(provenance, "ROOT", repository)
    (repository / "code.py").write_text("X = 1\n")
    (repository / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    call(repository, "init", "-q")
    call(repository, "add", "-A")
    call(repository, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "begin")
    provenance._work_tree.cache_clear()
    return repository


def call(repository: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=repository, check=True, capture_output=True, text=True).stdout


def asked_again() -> dict[str, object]:
    provenance._work_tree.cache_clear()
    return provenance.git()


def test_commit_and_changes(repository: Path) -> None:
    commit = call(repository, "rev-parse", "HEAD").strip()
    assert provenance.git() == {"commit": commit, "dirty": False, "diff_sha256": None}
    (repository / "params.yaml").write_text("train: {}\n")  # parameters are in the record by value
    assert asked_again()["dirty"] is False
    (repository / "code.py").write_bytes(b"X = '\xff\xfe'\n")  # git prints bytes that are no UTF-8
    changed = asked_again()
    assert changed["dirty"] is True
    for name, value in (("color.ui", "always"), ("diff.external", "false")):  # tastes of a user change no digest
        call(repository, "config", name, value)
        assert asked_again() == changed


@pytest.mark.parametrize("state", ["missing", "not a repository", "no commit", "another owner", "broken", "no program"])
def test_what_git_does_not_say_is_said_once_with_the_remedy(
    state: str, repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = {
        "missing": "git is not installed",
        "not a repository": "git init && git add -A && git commit",
        "no commit": "has no commit yet: git add -A && git commit",
        "another owner": f"git config --global --add safe.directory '{repository}'",
        "broken": "git rev-parse: fatal: bad config line 1",
        "no program": "git cannot be started",
    }
    match state:
        case "missing":
            monkeypatch.setenv("PATH", str(repository))
        case "not a repository":
            (repository / ".git").rename(repository / "none")
        case "no commit":
            (repository / ".git/refs/heads/master").unlink(missing_ok=True)
            (repository / ".git/refs/heads/main").unlink(missing_ok=True)
        case "another owner":
            monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
        case "broken":
            (repository / ".git/config").write_text("[\n")
        case "no program":
            (repository / "git").write_text("no program")
            (repository / "git").chmod(0o755)
            monkeypatch.setenv("PATH", str(repository))
    monkeypatch.setenv("LANGUAGE", "de")
    with caplog.at_level(logging.WARNING, "vgg.tracking"):
        assert provenance.git() == provenance.git() == NOTHING
        record = provenance.record("shard", {}, {})
    assert "mlflow.source.git.commit" not in provenance.tags(record)
    [message] = caplog.messages
    assert message.startswith("provenance: the commit is not recorded: ")
    assert said[state] in message


def test_the_remedy_for_another_owner_works(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = call(repository, "rev-parse", "HEAD").strip()
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    for path in (repository, repository / ".git"):
        os.chown(path, 12345, 12345)
    assert asked_again() == NOTHING
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(repository.parent / "gitconfig"))
    call(repository, "config", "--global", "--add", "safe.directory", str(repository))
    assert asked_again()["commit"] == commit


def test_the_key_of_a_run_goes_by_values(repository: Path) -> None:
    """Not by layout, comments or the notation of numbers; and not by what is committed about them."""
    path = repository / "params.yaml"
    before = provenance.lineage(str(path))
    values = YAML(typ="safe", pure=True).load(path)
    path.write_text(json.dumps(values))
    provenance._work_tree.cache_clear()
    assert provenance.lineage(str(path)) == before
    path.write_text((ROOT / "params.yaml").read_text().replace("0.006", "6e-3") + "# a remark\n")
    assert provenance.lineage(str(path)) == before
    values["train"]["epochs"] += 1
    path.write_text(json.dumps(values))
    assert provenance.lineage(str(path)) != before
