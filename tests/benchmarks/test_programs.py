"""The benchmarks that need no GPU run to their table: their peers and stand-ins keep up with the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, photograph

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, <class>/<image>."""
    root = tmp_path_factory.mktemp("photographs")
    for number in range(12):
        path = root / ("cat", "dog", "emu")[number % 3] / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        photograph((96, 72), number).save(path, quality=90)
    return root


PROGRAMS = [
    ("serve --many 4", "an image afterwards"),
    ("tracking --rounds 1 --steps 20", "server silent"),
    ("checkpoint --saves 2", "verified at"),
    ("shard --images IMAGES --rounds 1", "ours"),
    ("loader --images IMAGES --rounds 1", "ours"),
    ("evaluate --images IMAGES --input-size 32 --naive-images 2 --crop-images 2", "ours"),
    ("train --images IMAGES --input-size 32 --steps 2 --rounds 1", "ours"),
    ("exchange --ranks 2 --gbit 400 --steps 2 --divide 512 --slower 10", "400"),
    ("scale", "GPUs"),
]


@pytest.mark.parametrize(("command", "row"), PROGRAMS, ids=[command.split()[0] for command, _ in PROGRAMS])
def test_a_benchmark_ends_with_its_table(command: str, row: str, images: Path, tmp_path: Path) -> None:
    words = [str(images) if word == "IMAGES" else word for word in command.split()]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:]],
        cwd=ROOT, env=environment(TMPDIR=str(tmp_path)), capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert row in done.stdout
