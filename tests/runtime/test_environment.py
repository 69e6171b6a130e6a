"""Environment variables are read in one module, with one wording for a bad value, and listed in the README."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from runtime.environment import (
    CACHE,
    CACHE_BYTES,
    CACHE_HOME,
    HANG_SECONDS,
    JOURNAL,
    S3_PATIENCE_SECONDS,
    STORE,
    VARIABLES,
    WORKERS,
    Variable,
    mistyped,
)
from runtime.errors import WrongParameters

EVERY = [variable for variables in VARIABLES.values() for variable in variables]


def reads(path: Path) -> list[int]:
    """Lines that read os.environ: os.environ[...], .get(...), `in os.environ`, os.getenv."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        is_read = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)
        if is_read and ast.unparse(node.value) == "os.environ":
            found.append(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
            found.append(node.lineno)
        if isinstance(node, ast.Compare) and "os.environ" in map(ast.unparse, node.comparators):
            found.append(node.lineno)
    return found


def test_nothing_else_reads_the_environment() -> None:
    paths = [path for root in ("runtime", "vgg", "components", "pipelines") for path in (ROOT / root).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): lines for path in paths if (lines := reads(path))}
    assert list(found) == ["runtime/environment.py"]


@pytest.mark.parametrize(
    ("variable", "text", "said"),
    [
        (WORKERS, "many", "VGG_WORKERS: must be an integer of 0 or more, not 'many'"),
        (WORKERS, "-1", "VGG_WORKERS: must be an integer of 0 or more, not '-1'"),
        (HANG_SECONDS, "0", "VGG_HANG_SECONDS: must be a positive integer, not '0'"),
        (CACHE_BYTES, "1.5", "VGG_CACHE_BYTES: must be a positive integer, not '1.5'"),
        (S3_PATIENCE_SECONDS, "nan", "VGG_S3_PATIENCE_SECONDS: must be a number of seconds above 0, not 'nan'"),
        (S3_PATIENCE_SECONDS, "", None),
        (WORKERS, "0", None),
    ],
)
def test_a_bad_value_has_one_wording(
    variable: Variable[object], text: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable.name, text)
    if said is None:
        assert variable.get() == (0 if text else 120.0)
        return
    with pytest.raises(WrongParameters) as refused:
        variable.get()
    assert str(refused.value) == said


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No shell has replaced it in docker -e, in a file of variables, or in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in (STORE, CACHE, JOURNAL, CACHE_HOME):
        monkeypatch.setenv(variable.name, "~/data")
        assert str(variable.get()) == f"{tmp_path}/data"
    monkeypatch.setenv(STORE.name, "s3://bucket/~x")
    assert STORE.get() == "s3://bucket/~x"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("VGG_CACHE_DIR", "VGG_CACHE"), ("VGG_NUM_WORKERS", "VGG_WORKERS"), ("VGG_S3_TIMEOUT", "VGG_S3_TIMEOUT_SECONDS")],
)
def test_a_mistyped_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    monkeypatch.setenv(name, "1")
    for known in (meant, "VGG_DAMAGES", "VGG_SERVE_IMAGE", "VGG_PODS"):  # the last ones: of tests and images
        monkeypatch.setenv(known, "1")
    assert mistyped() == [f"{name} is set and has no effect; did you mean {meant}?"]
    done = subprocess.run(
        [sys.executable, "-m", "components.tracking", "replay", "--port", "x"],
        cwd=ROOT, env=environment() | {name: "1"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    warning, *_, last = done.stderr.splitlines()
    assert warning == mistyped()[0]
    assert (done.returncode, last) == (64, "python -m components.tracking: --port: must be an integer, not 'x'")


def test_all_of_ours_are_listed_once() -> None:
    names = [variable.name for variable in EVERY]
    assert len(set(names)) == len(names)
    assert STORE in EVERY
    assert all(variable.meaning for variable in EVERY)


def test_the_readme_has_all_tables() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "components.environment"],
        cwd=ROOT, env={**environment(), "PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    readme = (ROOT / "README.md").read_text()
    assert all(table.strip() in readme for table in done.stdout.split("\n\n"))
    assert all(f"`{variable.name}`" in done.stdout for variable in EVERY)
