"""The localise stage as a program: annotations in, boxes out, twice the same, and what does not fit is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NUM_TRAIN, NUM_VAL, environment, program
from killing import killed
from localised import annotate, finished, flags, outputs, prepared, project, shards, straight  # noqa: F401  # fixtures
from mlflow import MlflowClient

from components.localise import pictures, published
from runtime.shards.shardset import ShardSet
from vgg.localisation import devkit, metric
from vgg.localisation.boxset import BoxSet
from vgg.localisation.results import Results
from vgg.network.trained import Trained


def test_from_annotations_to_boxes(finished: Path) -> None:
    project, shards = finished, ShardSet(finished / "shards")
    said = (project / "stderr").read_text()
    assert "class given (Table 8)" in said and "mean box (nothing learnt)" in said
    metrics = json.loads((project / "m/localise.json").read_text())
    boxes = BoxSet.open(project / "boxes", shards)
    assert [int(boxes.split(name).has_box.sum()) for name in ("train", "val")] == [NUM_TRAIN, NUM_VAL]
    counted = [metrics["classification"]["num_images"]]
    assert metrics["num_blacklisted"] == 2
    counted += [found["num_images"] for kind in ("localisation", "class_given") for found in metrics[kind].values()]
    assert counted == [NUM_VAL] + 7 * [NUM_VAL - 2]  # the devkit's two denominators
    assert metrics["floors"]["mean_box"] == 0.0  # they are all in the middle
    assert metrics["top5_localisation_error"] <= metrics["top1_localisation_error"]
    assert metrics["top5_classification_error"] == 0.0  # there are three classes
    # the official format scores as the metrics say
    split = shards.split("val")
    keys = [split.key(number) for number in range(len(split))]
    guesses, found = devkit.read_predictions(project / "localisations/val.pred.det.txt", keys, [1, 2, 3])
    true = boxes.split("val")
    right = metric.judge(split.rows["label"].astype(np.int64), guesses, metric.best_ious(true.first, true.boxes, found))
    errors = metric.summary(metric.counts(right, np.isin(np.argsort(np.argsort(keys)), (1, 4))))["localisation"]
    assert errors == metrics["localisation"]["merged"]
    assert json.loads((project / "m/dvc.json").read_text()).keys() == {
        "top5_localisation_error", "class_given_error", "centre_crop_error", "mean_iou",
    }  # fmt: skip
    assert len((project / "m/localise.csv").read_text().splitlines()) == 2
    page = (project / "m/localisation.html").read_text(encoding="utf-8")
    for section in ("What was trained", "The class given", "Five guesses", "Overlap", "Classes", "Images", "do next"):
        assert section in page
    assert page.count('class="tile"') == 3 * (NUM_VAL - 2)  # three kinds, only images that count
    assert not re.search(r'(href|src)="(?!data:)', page)
    assert "Beside the paper" not in page  # these are not its images


def test_the_run_in_mlflow(finished: Path) -> None:
    client = MlflowClient(f"sqlite:///{finished}/mlflow.db")
    experiment = client.get_experiment_by_name("vgg-imagenet")
    assert experiment
    runs = {run.data.tags["vgg.stage"]: run for run in client.search_runs([experiment.experiment_id])}
    metrics = json.loads((finished / "m/localise.json").read_text())
    for stage in ("localise", "pipeline"):
        found = runs[stage].data.metrics
        for name in ("top5_localisation_error", "class_given_error", "centre_crop_error"):
            assert found[f"{name}_percent"] == pytest.approx(100 * metrics[name], abs=1e-4)
        artifacts = [file.path for file in client.list_artifacts(runs[stage].info.run_id, "localise")]
        assert artifacts == ["localise/localisation.html"]
    assert runs["localise"].data.metrics["mean_box/class_given_error_percent"] == 100 * metrics["floors"]["mean_box"]
    assert "% top-5 localisation error" in runs["localise"].data.tags["mlflow.note.content"]
    assert "vgg.weights_sha256" not in runs["pipeline"].data.tags  # those are of the classification network


def test_the_papers_rows_stand_only_beside_its_own_images_and_protocol() -> None:
    network = {"configuration": "D", "batch_norm": False, "input_size": 224}
    params = {"regression": "per_class", "trainable": "all", "train_scale": 384, "test_scales": [384, 352], "fuse": []}
    metrics = {
        "dataset": "kaggle", "num_images": 50_000, "num_blacklisted": 0,
        "class_given": {"centre_crop": {"error": 0.34, "interval": [0.33, 0.35]}},
        "localisation": {"merged": {"top5_error": 0.28, "top5_interval": [0.27, 0.29]}},
    }  # fmt: skip

    def theirs(**changes: Any) -> list[float]:
        changed = [{name: changes.get(name, value) for name, value in d.items()} for d in (metrics, params, network)]
        return [row.theirs for row in published.rows(*changed)]

    assert theirs() == [33.1, 27.5]
    assert theirs(test_scales=[384]) == [33.1, 28.2]
    assert theirs(train_scale=256, test_scales=[256]) == [29.5]
    assert (theirs(trainable="fc"), theirs(regression="single", trainable="fc")) == ([34.3], [36.4])
    assert theirs(fuse=["other"]) == [33.1]
    for others in ({"dataset": "folder"}, {"num_images": 49_999}, {"num_blacklisted": 1}, {"batch_norm": True}):
        assert theirs(**others) == []


def test_class_names_are_escaped(finished: Path) -> None:
    shards = ShardSet(finished / "shards")
    shards.class_names = [f'<script>{name}</script>&"' for name in shards.class_names]
    arrays = {name: np.load(finished / f"localisations/{name}.npy") for name in ("guesses", "boxes", "given")}
    true = BoxSet.open(finished / "boxes", shards).split("val")
    labels = shards.split("val").rows["label"].astype(np.int64)
    ious = np.linspace(0, 1, 4 * NUM_VAL).reshape(4, NUM_VAL)
    results = Results(labels, **arrays, guess_ious=ious[:3, :, None], given_ious=ious, counted=np.ones(NUM_VAL, bool))
    for kind in pictures.kinds(results):
        html = pictures.tiles(shards, true, results, kind.numbers)
        assert "&lt;script&gt;" in html and "<script" not in html and '&"' not in html
    best, worst, _ = (kind.numbers.tolist() for kind in pictures.kinds(results))
    assert (best[0], worst[0]) == (NUM_VAL - 1, 0)


@pytest.mark.faults
def test_again_nothing_is_trained_and_a_partner_must_be_a_localiser(project: Path) -> None:
    done = program("localise", *flags(project), cwd=project)
    assert done.returncode == 0, done.stderr
    first, boxes = (project / "m/localise.json").read_bytes(), project / "boxes/train.boxes.npy"
    data = boxes.read_bytes()
    boxes.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # what lies there is not used
    done = program("localise", *flags(project), cwd=project)
    assert done.returncode == 0, done.stderr
    assert "images a step" not in done.stderr
    assert (project / "m/localise.json").read_bytes() == first and boxes.read_bytes() == data
    next((project / "images/annotations/val").rglob("*.xml")).unlink()  # not believed to be as before
    changed = program("localise", *flags(project), cwd=project)
    assert (changed.returncode, "without a box of its class" in changed.stderr) == (65, True), changed.stderr
    annotate(project / "images", ShardSet(project / "shards"))
    edit(project, '"fuse": []', f'"fuse": ["{project}/localiser"]')  # with itself nothing moves but the scores
    done = program("localise", *flags(project), cwd=project)
    assert done.returncode == 0, done.stderr
    fused = json.loads((project / "m/localise.json").read_text())
    assert fused["class_given"]["centre_crop"] == json.loads(first)["class_given"]["centre_crop"]
    edit(project, f'"fuse": ["{project}/localiser"]', f'"fuse": ["{project}/model"]')
    done = program("localise", *flags(project), cwd=project)
    assert (done.returncode, "no localiser of the classes" in done.stderr) == (78, True), done.stderr


def start(project: Path, *command: str) -> subprocess.Popen[bytes]:
    """Start a program of the stage; by default the real one."""
    arguments = [*(command or ("-m", "components.localise")), *map(str, flags(project))]
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=project, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True
    )


def kill_when(child: subprocess.Popen[bytes], there: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL


@pytest.mark.faults
def test_killed_while_it_trains_and_run_again(project: Path, straight: dict[str, bytes]) -> None:
    """kill -9 of the program: boxes, weights, localisations and metrics have the bytes of the undisturbed run."""
    kill_when(start(project), lambda: list(project.glob("localiser/step-*[0-9]")))
    assert not (project / "localiser/manifest.json").exists()
    done = program("localise", *flags(project), cwd=project)
    assert (done.returncode, "continuing" in done.stderr) == (0, True), done.stderr
    assert outputs(project) == straight


SLOWLY = """
import sys, time
from components import program
from components.localise.__main__ import main
from vgg.localisation.dense import Dense
at_once = Dense.__call__
Dense.__call__ = lambda *args: open("looked", "a").write(".") and time.sleep(0.2) or at_once(*args)
program.run(lambda: main(sys.argv[1:]))
"""


@pytest.mark.faults
@pytest.mark.parametrize("after", [1, 7, NUM_VAL])
def test_killed_while_it_tests_and_run_again(after: int, project: Path, straight: dict[str, bytes]) -> None:
    looked = project / "looked"
    kill_when(start(project, "-c", SLOWLY), lambda: looked.exists() and looked.stat().st_size >= after)
    assert (project / "localiser/manifest.json").exists() and not (project / "m/localise.json").exists()
    done = program("localise", *flags(project), cwd=project)
    assert (done.returncode, "images a step" in done.stderr) == (0, False), done.stderr
    assert outputs(project) == straight


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_killed_between_any_two_files(project: Path, straight: dict[str, bytes]) -> None:
    """At moments all over the run: what is finished is whole, and the next run ends with the same bytes."""
    command = [sys.executable, "-m", "components.localise", *map(str, flags(project))]
    code, moments = killed(command, "files", 0, project)
    assert (code, moments > 60, outputs(project) == straight) == (0, True, True)
    for at in range(5, moments, moments // 8):
        for made in ("boxes", "localiser", "localisations", "m", ".tracking"):
            shutil.rmtree(project / made, ignore_errors=True)
        code, reached = killed(command, "files", at, project)
        assert code == -signal.SIGKILL or reached < at
        assert not (project / "m/localise.json").exists() or outputs(project) == straight
        done = program("localise", *flags(project), cwd=project)
        assert (done.returncode, outputs(project) == straight) == (0, True), f"moment {at}: {done.stderr}"


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [2, 5])
def test_several_ranks_give_the_same_as_one(ranks: int, project: Path, straight: dict[str, bytes]) -> None:
    """Tested by several ranks, the same network has the same boxes to the last byte, each image once; trained by them,
    it is the same within float tolerance."""
    for path, data in straight.items():
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        if not path.startswith(("localisations/", "m/")):
            (project / path).write_bytes(data)
    done = program("launch", ranks, "components.localise", *flags(project), cwd=project, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("class given (Table 8)") == 1 and "images a step" not in done.stderr
    assert outputs(project) == straight
    (project / "localiser").rename(project / "alone")
    done = program("launch", ranks, "components.localise", *flags(project), cwd=project, timeout=240)
    assert done.returncode == 0, done.stderr
    ours = Trained.open(project / "localiser").step
    alone = Trained.open(project / "alone").step
    for name, tensor in ours.weights().items():
        assert (tensor - alone.weights()[name]).norm() <= 2e-2 * alone.weights()[name].norm(), name
    for row, expected in zip(ours.state["history"], alone.state["history"], strict=True):
        assert row == pytest.approx(expected, rel=1e-2)
    metrics = json.loads((project / "m/localise.json").read_text())
    assert {found["num_images"] for found in metrics["class_given"].values()} == {NUM_VAL - 2}
    assert metrics["classification"]["num_images"] == NUM_VAL


def edit(project: Path, old: str, new: str) -> None:
    path = project / "params.yaml"
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("break_it", "code", "said"),
    [
        (lambda p: next((p / "images/annotations/val").rglob("*.xml")).unlink(), 65, "without a box of its class"),
        (lambda p: edit(p, '"fc"', '"FC"'), 64, "localise.trainable"),
        (
            lambda p: (p / "blacklist.txt").write_text("1\n14\n"),
            65,
            "'14' is no image; expected different numbers from 1 to 13",
        ),
        *(
            pytest.param(*other, marks=pytest.mark.faults)
            for other in (
                (lambda p: edit(p, '"localise"', '"localize"'), 64, "localize: unknown section"),
                (lambda p: edit(p, '"train_scale": 36', '"train_scale": 31'), 64, "localise.train_scale"),
                (lambda p: (p / "blacklist.txt").unlink(), 64, "localise.blacklist blacklist.txt: No such file"),
            )
        ),
    ],
    ids=["no box", "parameter", "blacklist", "section", "scale", "no blacklist"],
)
def test_what_does_not_fit_is_named(break_it: Any, code: int, said: str, project: Path) -> None:
    break_it(project)
    done = program("localise", *flags(project), cwd=project)
    assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr
    assert not (project / "m/localise.json").exists()
