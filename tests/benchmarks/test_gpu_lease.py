"""benchmarks/gpu.sh lease, rehearsed on a CPU; a program that fails or hangs does not affect the others."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import EVALUATE, ROOT, environment, photograph, task

from benchmarks import cifar10, lease, machine, names, table
from runtime.distributed import joined
from runtime.shards.shardset import ShardSet
from runtime.stopping import Never, StopSignal
from vgg.params import load
from vgg.params.evaluate import EvaluateParams
from vgg.params.train import TrainParams

PROGRAMS = list(table.TITLES)
CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Photographs, and small ones in place of CIFAR-10: IMAGES TAR TAR."""
    root = tmp_path_factory.mktemp("lease")
    for folder, (width, height) in (("images/train", (96, 72)), ("train/train", (32, 32)), ("test/test", (32, 32))):
        for number in range(12):
            path = root / folder / CLASSES[number % 3] / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph((width, height), number + 100 * len(folder)).save(path, quality=90)
    for name in ("train", "test"):
        subprocess.run(["tar", "-cJf", root / f"cifar-{name}.tar.xz", "-C", root / name, name], check=True)
    return [str(root / name) for name in ("images", "cifar-train.tar.xz", "cifar-test.tar.xz")]


def rehearse(results: Path, data: list[str], *flags: str, **env: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, output, and the results of every program."""
    done = subprocess.run(
        ["benchmarks/gpu.sh", "lease", "--rehearse", *data, *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=590,
        env=environment(PYTHON=sys.executable, RESULTS=str(results), WHEELS=str(results / "none"), **env),
    )  # fmt: skip
    assert (results / "results.json").exists(), done.stderr
    found = json.loads((results / "results.json").read_text())
    assert found["rehearsal"]
    assert (results / "table.md").read_text().strip() in done.stdout
    assert len([*results.iterdir()]) <= 8
    return done.returncode, done.stdout + done.stderr, found["programs"]


def expect_whole_table(printed: str) -> None:
    """Every row is present once and marked as a rehearsal's."""
    lines = printed.splitlines()
    for name in PROGRAMS:
        for what in [f"**{table.TITLES[name]}** (`{name}`)", *(row[0] for row in table.ROWS.get(name, []))]:
            [line] = [line for line in lines if line.startswith(f"| {what} | ")]
            assert line.split(" | ")[1].endswith("(rehearsal, CPU)"), line


def test_what_a_lease_uses_is_in_the_older_torch_of_its_machine() -> None:
    recorded = set(names.RECORD.read_text(encoding="utf-8").split())
    for path in names.imported_files():
        tree = ast.parse(path.read_bytes())
        assert {*names.names(tree), *names.packages(tree)} <= recorded, path


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_rehearsal_measures_everything_but_the_gpu(tmp_path: Path, data: list[str]) -> None:
    start = time.monotonic()
    code, printed, found = rehearse(tmp_path / "results", data)
    assert code == 0, printed
    assert time.monotonic() - start < lease.TOTAL_SECONDS
    assert [(name, found[name]["exit"]) for name in found] == [(name, 0) for name in PROGRAMS]
    expect_whole_table(printed)
    without = [line.split(" | ")[0] for line in printed.splitlines() if " | none " in line]
    assert without == ["| crops on the GPU's engines, images/s"]
    assert found["cifar10"]["figures"]["epochs"] == 4


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_program_that_fails_or_hangs_does_not_affect_the_others(tmp_path: Path, data: list[str]) -> None:
    """One program ignores SIGTERM, as does its child; one fails after its first figure; the others succeed."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import os, signal, sys, time\n"
        "if 'benchmarks.names' in sys.orig_argv:\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    child = os.fork()\n"
        f"    open({str(tmp_path / 'pids')!r}, 'a').write(f'{{os.getpid()}} ')\n"
        "    print('{\"missing\": []}', flush=True) if child else None\n"
        "    time.sleep(600)\n"
        "if 'benchmarks.loader' in sys.orig_argv:\n"
        '    print(\'{"ours": 5, "max_difference": 1}\', flush=True)\n'
        "    print('the disk is on fire', file=sys.stderr, flush=True)\n"
        "    os._exit(3)\n"
    )
    start = time.monotonic()
    code, printed, found = rehearse(
        tmp_path / "results", data, "--only", "names", "loader", "repeated", PYTHONPATH=f"{ROOT}:{tmp_path / 'site'}"
    )
    assert code == 1
    assert time.monotonic() - start < lease.TOTAL_SECONDS
    expect_whole_table(printed)
    assert {name: result["exit"] for name, result in found.items()} == {
        "machine": 0, "names": -9, "loader": 3, "repeated": 0,
    }  # fmt: skip
    assert f"(`names`) | TIMED OUT after {found['names']['limit']} s, exit -9" in printed
    assert "(`loader`) | FAILED, exit 3: the disk is on fire (rehearsal, CPU)" in printed
    assert "| crops on one CPU core, images/s | 5; 1 grey levels" in printed
    assert "(`train`) | not started (rehearsal, CPU)" in printed
    assert "rehearsal, CPU: without a result: names, loader" in printed
    assert found["names"]["seconds"] < found["names"]["limit"] + lease.GRACE_SECONDS + 3
    for pid in (tmp_path / "pids").read_text().split():
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


def test_the_limits_leave_the_last_part_its_time(tmp_path: Path) -> None:
    chosen = lease.parts(tmp_path, [tmp_path], tmp_path, tmp_path, rehearse=False)
    *others, last = chosen
    assert last.limit is None
    fixed = sum((part.limit or 0) + lease.GRACE_SECONDS for part in others)
    assert lease.TOTAL_SECONDS <= 570
    assert lease.TOTAL_SECONDS - fixed - lease.GRACE_SECONDS - lease.TABLE_SECONDS >= 120
    named = [program.name for part in chosen for program in part.programs]
    assert named == [name for name in PROGRAMS if name != "names"]


def test_without_a_gpu_a_lease_says_so_and_stops(tmp_path: Path, data: list[str]) -> None:
    done = subprocess.run(
        ["benchmarks/gpu.sh", "lease", *data], cwd=ROOT, capture_output=True, text=True, timeout=100,
        env=environment(PYTHON=sys.executable, RESULTS=str(tmp_path), WHEELS="none", CUDA_VISIBLE_DEVICES=""),
    )  # fmt: skip
    assert done.returncode == 1
    assert "no GPU on this machine; try everything on a CPU with --rehearse" in done.stderr
    assert "(`train`) | not started | |" in done.stdout


def test_the_table_has_every_row_of_a_program_that_was_killed() -> None:
    result = {"exit": -9, "seconds": 154.0, "limit": 150, "over": True, "last": ["a | b"], "figures": {"ours": 5123.4}}
    lines = table.of({"train": result}, rehearsal=False).splitlines()
    assert "| **training** (`train`) | TIMED OUT after 150 s, exit -9: a / b | |" in lines
    assert "| training, images/s | 5,123 | ≥ 4,500 (aim 5,500) |" in lines
    assert "| torchvision's loop, images/s | none | ≥ 1.3 × |" in lines
    assert len([line for line in lines if line.endswith(" |")]) == 1 + sum(
        1 + len(table.ROWS.get(name, ())) for name in PROGRAMS if name != "names"
    )


def test_as_many_epochs_as_fit() -> None:
    assert cifar10.that_fit(100 * cifar10.SLOWER, 4.0, 80) == 25
    assert cifar10.that_fit(1000, 4.0, 80) == 80
    assert cifar10.that_fit(-5, 4.0, 80) == 0


def test_fewer_epochs_keep_the_shape_of_the_schedule() -> None:
    params = load(str(ROOT / "recipes/cifar10-bn.yaml"), "train", TrainParams)
    half = cifar10.shortened(params, 40)
    assert TrainParams.model_validate_json(half.model_dump_json()) == half
    assert (half.epochs, half.schedule.warmup_epochs, half.schedule.drop_epochs) == (40, 1, [25, 35])
    assert cifar10.shortened(params, 80) == params


class NoStop(Never):
    """A StopSignal that never receives a signal."""

    received = False


@pytest.mark.faults
def test_a_training_that_runs_out_of_time_is_evaluated_at_its_newest_checkpoint(
    tmp_path: Path, shards: ShardSet, narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10, "that_fit", lambda *_: 5000)
    figures, stop = machine.Figures(as_json=False), cast(StopSignal, NoStop())
    evaluating = EvaluateParams.model_validate_json(json.dumps(EVALUATE))
    start = time.monotonic()
    with joined() as group:
        wanted = task(shards, tmp_path, epochs=9000, checkpoint_steps=1000)
        cifar10.in_time(wanted, evaluating, group, stop, start + 12, figures)
    assert 10 < time.monotonic() - start < 20
    assert figures["planned_epochs"] == 5000
    assert cifar10.TRIAL_EPOCHS < figures["epochs"] < 5000
    assert 0 <= figures["top1"] <= 1
    assert figures["mode"] == "dense_Q32-64_flip"
