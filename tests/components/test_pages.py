"""MLflow's pages in a real browser: three runs of the whole pipeline, and what one can read there.

Needs Chromium (apt-get install chromium); without it these tests fail.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browser
from conftest import EVALUATE, REGISTER, SHARD, TRAIN, draw_images, environment, flags, program
from mlflow import MlflowClient
from mlflow.entities import Run
from ports import free_port

from components.tracking import access

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
RATES = (0.001, 0.002, 0.004)  # higher ones diverge with two images a step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """Where the tiny pipeline has run three times, with different learning rates."""
    place = tmp_path_factory.mktemp("pages")
    shutil.copy(empty_database, place / "mlflow.db")
    draw_images(place / "images")
    stages = ["shard", "train", "evaluate", "register"]
    for rate in RATES:
        params = {
            "shard": SHARD, "train": {**TRAIN, "learning_rate": rate, "batch_size": 2, "flip": rate > 0.001},
            "evaluate": EVALUATE, "register": REGISTER,
        }  # fmt: skip
        (place / "params.yaml").write_text(json.dumps(params))
        for stage in stages:
            done = program(
                stage, *flags(stage, place, place / "params.yaml"), cwd=place, timeout=900, VGG_GIT_COMMIT="a" * 40
            )
            assert done.returncode == 0, done.stderr
        (place / "m/evaluate.json").rename(place / f"evaluate-{rate}.json")
        shutil.rmtree(place / "model")
        stages = stages[-3:]  # as under DVC: the shards are the same
    return place


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """What `make ui` prints."""
    command = [sys.executable, "-m", "components.tracking", "ui", "--port", str(free_port())]
    shown = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert shown.stdout
        line = shown.stdout.readline().strip()
        assert line.startswith("http://127.0.0.1:"), shown.communicate(timeout=10)
        yield line
    finally:
        shown.send_signal(signal.SIGINT)
        _, log = shown.communicate(timeout=60)
        assert "Traceback" not in log


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def parents(folder: Path) -> list[Run]:
    """The pipeline runs, in the order of RATES."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name(access.EXPERIMENT)
    assert experiment
    order = ["attributes.start_time ASC"]
    return client.search_runs([experiment.experiment_id], "tags.`vgg.stage` = 'pipeline'", order_by=order)


def percent(folder: Path, rate: float) -> str:
    return f"{100 * json.loads((folder / f'evaluate-{rate}.json').read_text())['top1_error']:.2f} %"


def names(folder: Path) -> list[str]:
    return [f"folder · A · 32 px · rate {rate:g} → {percent(folder, rate)}" for rate in RATES]


def test_the_list(folder: Path, address: str, page: Page) -> None:
    """A fresh browser starts in the half about training, with names that say the results."""
    text = page.open(address, *names(folder), "top1_error_percent", "train.learning_rate")
    assert "Training runs" not in text, "the half about language models"
    assert all(f" {rate:g} " in text for rate in RATES)
    text = page.open(f"{address}&compareRunsMode=CHART", "Training (4)", "Results (3)")
    assert text.index("error_percent/train_top1 vs error_percent/val_top1") < text.index("Results (3)")
    assert "loss/train vs loss/val" in text


def test_a_parent(folder: Path, address: str, page: Page, parents: list[Run]) -> None:
    server, run = address.partition("/#/")[0], parents[1]
    where = f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    headline = f"{percent(folder, RATES[1])} top-1 and "
    shown = (names(folder)[1], headline, "Parameters (19)", "Registered models tiny")
    text = page.open(f"{where}?workflowType=machine_learning", *shown)
    assert "v2" in text.partition("Registered models")[2]
    assert "train.learning_rate" in text and "top1_error_percent" in text
    children = page.wait("evaluate").partition("Child runs")[2].partition("Source")[0]
    assert [name for name in ("register", "evaluate", "train") if name not in children] == []
    assert "checkpoint_steps" not in text
    text = page.open(f"{where}/model-metrics?workflowType=machine_learning", "error_percent (3)", "loss (2)")
    sections = ["error_percent (3)", "loss (2)", "schedule (1)", "speed (2)", "Model metrics ("]
    assert [text.index(name) for name in sections] == sorted(text.index(name) for name in sections)
    page.open(f"{where}/artifacts/eval/report.html?workflowType=machine_learning", "confusion.png", "report.html")


def test_the_comparison(folder: Path, address: str, page: Page, parents: list[Run]) -> None:
    server, experiment = address.partition("/#/")[0], parents[0].info.experiment_id
    runs = json.dumps([run.info.run_id for run in parents])
    where = f"{server}/#/compare-runs?runs={runs}&experiments=[%22{experiment}%22]&workflowType=machine_learning"
    text = page.open(where, "Comparing 3 Runs", "train.learning_rate", *names(folder))
    values = text.rpartition("train.learning_rate")[2].split("train.", 1)[0].split()
    assert values[:3] == [f"{rate:g}" for rate in RATES]


def test_a_version(folder: Path, address: str, page: Page) -> None:
    server = address.partition("/#/")[0]
    text = page.open(
        f"{server}/#/models/tiny/versions/1?workflowType=machine_learning", "Version 1", "weights_sha256",
        f"{percent(folder, RATES[0])} top-1 and ", "13 images of folder", "Outputs (",
    )  # fmt: skip
    assert "{" not in text, "raw JSON"
    database = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(database, database)
    model_id = client.get_model_version("tiny", "1").source.removeprefix("models:/")
    [experiment] = client.search_experiments(filter_string=f"name = '{access.EXPERIMENT}'")
    where = f"{server}/#/experiments/{experiment.experiment_id}/models/{model_id}?workflowType=machine_learning"
    assert "folder (#" in page.open(where, "Metrics (4)", "top1_error_percent")


@pytest.mark.parametrize("width", [1280, 400])
def test_the_report_on_a_laptop_and_on_a_phone(width: int, folder: Path, page: Page) -> None:
    """Every section is there; nothing but tables is wider than the screen; images are shown; captions can be read."""
    page.size(width, 900)
    address = f"file://{folder}/m/report.html"
    text = page.open(address, "What to do next")
    for section in ("What was trained", "Results", "Learning curves", "Calibration", "Classes", "Confusion", "Images"):
        assert section in text
    assert percent(folder, RATES[-1]) in text.replace("\xa0", " ")
    assert page.run("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.run("[...document.images].length > 0 && [...document.images].every(i => i.naturalWidth > 0)")
    smallest = (
        "Math.min(...[...document.querySelectorAll('figcaption')].map(f => parseFloat(getComputedStyle(f).fontSize)))"
    )
    assert page.run(smallest) >= 12
    assert page.run("performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length") == 0
