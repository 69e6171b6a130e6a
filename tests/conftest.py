"""Common fixtures: a folder of 43 generated images, and VGG with a narrow classifier."""

from __future__ import annotations

import atexit
import fcntl
import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from forked import Programs
from PIL import Image

from runtime.distributed import Group
from runtime.shards.shardset import ShardSet
from runtime.stopping import STOP_SIGNALS
from runtime.targets import Directory
from vgg.network.model import CONFIGURATIONS
from vgg.params.shard import ShardParams
from vgg.params.train import TrainParams
from vgg.sharding.pack import pack
from vgg.sharding.sources import Folder
from vgg.training.run import Run, start
from vgg.training.task import Task, describe

ALONE = Group(0, 1, 0, 1, torch.device("cpu"))
ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)
gc.disable()  # while the tests are collected: a third of that time were collections of what the imports make

SHARD = {
    "source": "folder",
    "check_md5": True,
    "seed": 1,
    "samples_per_shard": 7,
    "max_pixels": 1_000_000,
    "on_bad_image": "fail",
    "max_quarantined": 0,
}
TRAIN = {
    "configuration": "A",
    "batch_norm": False,
    "classifier_width": 16,
    "input_size": 32,
    "init": "kaiming",
    "crop": "scale",
    "train_scale": [32, 40],
    "decoder": "cpu",
    "flip": True,
    "colour_shift": 0.1,
    "standardise": True,
    "dropout": 0.5,
    "epochs": 2,
    "batch_size": 8,
    "micro_batch_size": "auto",
    "gradient_compression": "none",
    "learning_rate": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0005,
    "schedule": {"rule": "steps", "warmup_epochs": 0, "drop_factor": 10, "drop_epochs": [1]},
    "precision": "fp32",
    "deterministic": False,
    "seed": 1,
    "checkpoint_steps": 2,
    "keep_checkpoints": 2,
}
EVALUATE = {
    "weights": "last",
    "methods": ["centre_crop", "dense"],
    "test_scales": [32, 64],
    "flip": True,
    "average": "posteriors",
    "softmax": "after_mean",
    "filter": "bilinear",
    "ceil_pooling": False,
    "fuse": [],
    "precision": "fp32",
    "batch_pixels": 30_000,
}
REGISTER = {
    "model_name": "tiny",
    "exports": [],
    "gate": {
        "max_top1_error": 1.0,
        "max_top5_error": 1.0,
        "max_regression": 1.0,
        "confidence": 0.95,
        "incomparable_champion": "refuse",
    },
}
NUM_TRAIN, NUM_VAL = 30, 13


def draw(path: Path, seed: int, size: tuple[int, int] = (48, 36)) -> None:
    """Write a smooth random image; the file ending determines the format."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)


def photograph(size: tuple[int, int], seed: int = 1) -> Image.Image:
    """An image with edges and fine texture, like a photograph: smooth ones would hide errors of a resize."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    fine = random.integers(-40, 41, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + fine, 0, 255).astype(np.uint8))


def draw_images(root: Path) -> None:
    """<root>/{train,val}/{cat,dog,emu}/*.jpg of several sizes."""
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for i in range(count):
            name = ("cat", "dog", "emu")[i % 3]
            size = ((48, 36), (36, 48), (40, 40), (101, 67))[i % 4]
            draw(root / split / name / f"{i:04d}.jpg", i + (1000 if split == "val" else 0), size)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """<tmp>/images, drawn."""
    draw_images(tmp_path / "images")
    return tmp_path / "images"


NARROW = {  # A, B and D with at most an eighth of the channels
    "A": ((8,), (16,), (32, 32), (32, 32), (32, 32)),
    "B": ((8, 8), (16, 16), (32, 32), (32, 32), (32, 32)),
    "D": ((8, 8), (16, 16), (32, 32, 32), (32, 32, 32), (32, 32, 32)),
}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use narrow networks, for tests that train several times in this process."""
    for name, stages in NARROW.items():
        monkeypatch.setitem(CONFIGURATIONS, name, stages)


def train_params(**changes: Any) -> TrainParams:
    return TrainParams.model_validate_json(json.dumps({**TRAIN, **changes}))


def task(shards: ShardSet, directory: Path = Path("none"), **changes: Any) -> Task:
    """The tiny training.  changes: of parameters."""
    return Task(params=train_params(**changes), shards=shards, directory=directory, code={})


def started(shards: ShardSet, group: Group = ALONE, **changes: Any) -> Run:
    """A run of the tiny training at step 0."""
    return start(task(shards, **changes), describe(task(shards, **changes), group.device), group)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first, so that workers end at the same time."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """What the imports have made stays: no later collection of garbage needs to look at it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        gc.freeze()
        atexit.register(gc.unfreeze)  # at the very end Triton counts what is left
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Restore the handlers of the stop signals: programs that ran in this process leave theirs, which forked processes
    inherit, and obey no SIGTERM with."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        return (yield)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first of all test processes creates and all use."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, done = shared / name, shared / f"{name}.done"
    with open(shared / f"{name}.once", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture
def shards(images: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """<tmp>/shards, of <tmp>/images; packed once, a copy for every test."""

    def make(folder: Path) -> None:
        pack(ShardParams(**SHARD), Folder(images), Directory(folder / "shards"), "test", num_workers=1)

    shutil.copytree(once(tmp_path_factory, "packed", make) / "shards", tmp_path / "shards")
    return ShardSet(tmp_path / "shards")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, created once because it takes seconds."""

    def make(folder: Path) -> None:
        script = f"import mlflow; mlflow.MlflowClient('sqlite:///{folder}/mlflow.db').search_experiments()"
        subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment(), check=True, timeout=60)

    return once(tmp_path_factory, "mlflow", make) / "mlflow.db"


@pytest.fixture
def client(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An MLflow client with a database for this test; this process is a step of pipeline run 'run-1'."""
    from components.tracking import access

    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("VGG_JOURNAL", str(tmp_path / "journal"))
    monkeypatch.setenv("VGG_PIPELINE_RUN", "run-1")
    return access.connect()


@pytest.fixture
def params_file(tmp_path: Path, empty_database: Path) -> Path:
    """The params.yaml of the tiny run, as JSON, in a folder with an MLflow database."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    path = tmp_path / "params.yaml"
    path.write_text(json.dumps({"shard": SHARD, "train": TRAIN, "evaluate": EVALUATE, "register": REGISTER}, indent=1))
    return path


def environment(**changes: str) -> dict[str, str]:
    """The environment of a program under test: without the caller's variables for tracking, store and cluster."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "VGG_", "AWS_"))}
    # as many threads as this process: another number would sum in another order and change bits
    return {**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **changes}


UNCHANGED = environment()


@functools.cache
def programs() -> Programs:
    return Programs(UNCHANGED)


def program(
    stage: str, *arguments: object, cwd: Path, timeout: float = 150, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the program of a stage to its end."""
    words, variables = [f"components.{stage}", *map(str, arguments)], environment(**env)
    if programs().can_run(variables):
        return programs().run(words[0], words[1:], cwd, variables, timeout)
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout
    )


def flags(stage: str, tmp_path: Path, params: object) -> list[object]:
    """The arguments of a stage, with all files in tmp_path."""
    t = tmp_path
    common = ["--params", params]
    return {
        "shard": [*common, "--images", t / "images", "--shards", t / "shards", "--metrics", t / "m/shard.json"],
        "train": [
            *common, "--shards", t / "shards", "--initial", t / "initial", "--checkpoint", t / "model",
            "--curves", t / "m/curves.csv", "--metrics", t / "m/train.json",
        ],
        "evaluate": [
            *common, "--shards", t / "shards", "--checkpoint", t / "model",
            "--predictions", t / "predictions", "--confusion", t / "m/confusion.csv", "--report", t / "m/report.html",
            "--metrics", t / "m/evaluate.json",
        ],
        "register": [
            *common, "--shards", t / "shards", "--checkpoint", t / "model", "--predictions", t / "predictions",
            "--evaluation", t / "m/evaluate.json", "--metrics", t / "m/register.json",
        ],
    }[stage]  # fmt: skip


def executor_input(output_file: object) -> str:
    """Kubeflow's ExecutorInput, as far as the programs read it."""
    return json.dumps({"inputs": {}, "outputs": {"outputFile": str(output_file)}})


def compile_package(path: Path, params: str = "params.yaml") -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.submit", "--compile", str(path), "--params", params],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def package_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled pipeline."""
    return once(tmp_path_factory, "kfp", lambda folder: compile_package(folder / "package.yaml")) / "package.yaml"


@pytest.fixture(scope="session")
def localised_package_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled pipeline with the step localise."""

    def make(folder: Path) -> None:
        compile_package(folder / "package.yaml", "recipes/digit-scenes.yaml")

    return once(tmp_path_factory, "kfp-localise", make) / "package.yaml"


@pytest.fixture(scope="session")
def package(package_file: Path) -> list[dict[str, Any]]:
    """The compiled pipeline: [pipeline spec, platform spec]."""
    return list(yaml.load_all(package_file.read_text(), yaml.CSafeLoader))


def all_tasks(package: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tasks of all levels, by name."""
    dags = [package[0]["root"]["dag"], *(c["dag"] for c in package[0]["components"].values() if "dag" in c)]
    return {name: task for dag in dags for name, task in dag["tasks"].items()}


def make_repository(where: Path) -> Path:
    """Add the files of this checkout that dvc repro needs to a folder with params.yaml and images."""
    for name in ("vgg", "runtime", "components"):
        shutil.copytree(ROOT / name, where / name, ignore=shutil.ignore_patterns("__pycache__"))
    (where / "data/initial").mkdir(parents=True)
    (where / "images").rename(where / "data/images")
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore"):
        (where / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, where / name)
    shutil.copytree(ROOT / ".dvc/plots", where / ".dvc/plots")
    return where
