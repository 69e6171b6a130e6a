"""Parameter files have the layout that dvc exp run -S writes: a change is a diff of one line."""

from pathlib import Path

import pytest
from conftest import ROOT
from dvc.utils.hydra import apply_overrides

FILES = [ROOT / "params.yaml", *sorted((ROOT / "recipes").rglob("*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_override_changes_one_line(path: Path, tmp_path: Path) -> None:
    """apply_overrides is what dvc exp run -S calls; test_round_trip.py runs the command itself."""
    copy = tmp_path / "params.yaml"
    copy.write_bytes(path.read_bytes())
    apply_overrides(copy, ["train.epochs=12345"])
    before, after = path.read_text().splitlines(), copy.read_text().splitlines()
    assert len(before) == len(after)
    [changed] = [line for line, was in zip(after, before, strict=True) if line != was]
    assert changed.split("#")[0].strip() == "epochs: 12345"
