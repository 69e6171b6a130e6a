"""The identity of a stage: it depends on all code that can change a result, and on nothing else."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from components import closure

SOURCE = '''"""A module."""

from vgg import draws


class Rate:
    """A class."""

    limit: float = 0.5
    """Of a field."""

    async def wait(self, seconds=3):
        """A coroutine."""
        return seconds


def rate(step, warmup=2):
    """A function."""
    # a comment
    rising = (step + 1) / warmup
    return min(1.0, rising) * Rate.limit, "a text", draws
'''


def fingerprint(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(closure, "ROOT", folder)
    (folder / "module.py").write_text(source)
    return closure.fingerprint("module.py")


SAME = [
    ("A module.", "Another word."), ("A class.", "Another word."), ("Of a field.", "Another word."),
    ("A coroutine.", "Another word."), ("A function.", "Another word."), ('    """A function."""\n', ""),
    ("# a comment", "# another"), ("    # a comment\n", "\n\n"),
    ("(step + 1) / warmup", "((step + 1)\n        / warmup)"),
    ('"a text"', "'a ' 'text'"), ("1.0", "1.00"),
]  # fmt: skip
OTHER = [
    ("0.5", "0.6"), ("step + 1", "step - 1"), ("warmup=2", "warmup=3"), ("seconds=3", "seconds=4"),
    ("a text", "b text"),
    ("1.0", "1"), ("min", "max"), ("limit: float", "limit: int"), ("async def", "def"), (", draws", ", None"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "same"), [*((*one, True) for one in SAME), *((*one, False) for one in OTHER)])
def test_a_fingerprint_changes_only_with_the_code(
    old: str, new: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert old in SOURCE
    changed = SOURCE.replace(old, new)
    assert (fingerprint(tmp_path, changed, monkeypatch) == fingerprint(tmp_path, SOURCE, monkeypatch)) == same


def test_functions_with_only_a_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their docstring they are empty; they are equal, and differ from functions with a body."""
    alone = fingerprint(tmp_path, 'def f():\n    """A word."""\n', monkeypatch)
    assert alone == fingerprint(tmp_path, 'def f():\n    """Another."""\n', monkeypatch)
    assert alone != fingerprint(tmp_path, 'def f():\n    """A word."""\n    return 1\n', monkeypatch)


def test_no_result_can_depend_on_a_docstring() -> None:
    reads = re.compile(r"__doc__|getdoc|use_attribute_docstrings")
    assert not [str(path) for path in (ROOT / "vgg").rglob("*.py") if reads.search(path.read_text())]


def test_a_reworded_docstring_does_not_change_the_identity_of_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All docstrings of all files at once."""
    before = {stage: closure.fingerprints(stage) for stage in ("shard", "train", "evaluate", "register")}
    for path in (path for root in ("vgg", "runtime", "components") for path in (ROOT / root).rglob("*.py")):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(re.sub(r'^( *)"""(?=[A-Z])', r'\1"""Reworded. ', path.read_text(), flags=re.MULTILINE))
    assert "Reworded. " in (tmp_path / "runtime/errors.py").read_text()
    monkeypatch.setattr(closure, "ROOT", tmp_path)
    assert {stage: closure.fingerprints(stage) for stage in before} == before


def test_runtime_and_components_are_not_part_of_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their code may change; the same change in the science changes the stage."""
    stages = ("shard", "train", "evaluate", "register")
    before = {stage: closure.fingerprints(stage) for stage in stages}
    assert all(name.startswith("vgg/") for found in before.values() for name in found)
    for root in ("vgg", "runtime", "components"):
        shutil.copytree(ROOT / root, tmp_path / root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(closure, "ROOT", tmp_path)
    for path in (path for root in ("runtime", "components") for path in (tmp_path / root).rglob("*.py")):
        path.write_text(path.read_text() + "\nX = 1\n")
    assert {stage: closure.fingerprints(stage) for stage in stages} == before
    path = tmp_path / "vgg/draws.py"
    path.write_text(path.read_text() + "\nX = 1\n")
    changed = [stage for stage in stages if closure.fingerprints(stage) != before[stage]]
    assert changed == [stage for stage in stages if "vgg/draws.py" in before[stage]]
    assert {"shard", "train"} <= set(changed)
