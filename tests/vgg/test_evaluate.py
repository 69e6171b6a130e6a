"""Evaluation: every image once, results independent of batches and ranks, refusals, and the program."""

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ALONE, EVALUATE, NUM_VAL, executor_input, flags, once, program, train_params
from conftest import environment as environment_of_programs
from mlflow import MlflowClient
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.functional import center_crop
from torchvision.transforms.functional import resize as resize_as_torchvision
from trainings import run

from runtime import environment
from runtime.errors import Refused
from runtime.shards.shardset import ShardSet, Split
from vgg.data.images import decode
from vgg.evaluation.evaluate import Evaluation, chunks_by_size, evaluate
from vgg.evaluation.fusion import Partner
from vgg.evaluation.modes import Base, bases_of
from vgg.evaluation.parts import Parts, part_type
from vgg.evaluation.predictions import row_type, rows_of
from vgg.evaluation.scaled import centre_crop, pixels_seen, resize, short_side, size_at
from vgg.evaluation.views import Picture, Views
from vgg.network.trained import Trained
from vgg.params.evaluate import EvaluateParams


def parameters(**changes: object) -> EvaluateParams:
    return EvaluateParams(**{**EVALUATE, **changes})


@pytest.fixture
def trained(narrow: None, shards: ShardSet, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A narrow network."""
    return trained_once("narrow", shards, tmp_path, tmp_path_factory)


@pytest.fixture
def whole(shards: ShardSet, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """As trained, but of the width that programs know."""
    return trained_once("whole", shards, tmp_path, tmp_path_factory)


def trained_once(name: str, shards: ShardSet, folder: Path, factory: pytest.TempPathFactory) -> Trained:
    """<folder>/model, a copy of what the first test that wants it has trained."""
    made = once(factory, name, lambda first: run(shards, first / "model", epochs=1))
    shutil.copytree(made / "model", folder / "model")
    return Trained.open(folder / "model")


def pictures(params: EvaluateParams, split: Split, numbers: Iterable[int]) -> list[Picture]:
    images = (torch.from_numpy(np.array(decode(split.read(number), 10**6))) for number in numbers)
    return [Picture.of(image, bases_of(params), params.filter) for image in images]


def evaluated(params: EvaluateParams, trained: Trained, shards: ShardSet, parts: Parts | None = None) -> Evaluation:
    found = evaluate(params, trained, shards, ALONE, lambda *_: None, parts)
    assert found
    return found


def test_modes(shards: ShardSet, trained: Trained) -> None:
    found = evaluated(parameters(methods=["centre_crop", "dense", "multi_crop"]), trained, shards)
    assert found.modes == [
        "centre_crop_Q32", "centre_crop_Q64", "dense_Q32_flip", "dense_Q64_flip", "dense_Q32-64_flip",
        "multi_crop_Q32_flip", "multi_crop_Q64_flip", "multi_crop_Q32-64_flip", "multi_crop_and_dense_Q32-64_flip",
    ]  # fmt: skip
    assert found.metrics["headline"] == found.modes[-1] == found.network_mode
    assert found.predictions["label"].tolist() == shards.split("val").rows["label"].tolist()
    for number, result in enumerate(found.metrics["modes"].values()):
        assert result["num_images"] == NUM_VAL
        assert result["top5_error"] == 0  # of three classes
        low, high = result["top1_interval"]
        assert low <= result["top1_error"] <= high
        kept = found.posteriors(number)
        assert kept.dtype == np.float16
        np.testing.assert_allclose(kept.astype(float).sum(1), 1, atol=2e-3)
        best = found.predictions["modes"]["probabilities"][:, number, 0]
        np.testing.assert_allclose(kept.max(1), best, atol=1e-3)
    dense, crops, both = (found.posteriors(found.modes.index(name)).astype(float) for name in (
        "dense_Q32-64_flip", "multi_crop_Q32-64_flip", "multi_crop_and_dense_Q32-64_flip"))  # fmt: skip
    np.testing.assert_allclose(both, (dense + crops) / 2, atol=2e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_numbers_of_an_image_do_not_depend_on_the_others(precision: str, shards: ShardSet, whole: Trained) -> None:
    """Bit for bit: other batches, another order, and threads."""
    params = parameters(precision=precision, test_scales=[33, 64])
    reference = evaluated(params, whole, shards)
    for batch_pixels in (1, 17_000):
        other = evaluated(params.model_copy(update={"batch_pixels": batch_pixels}), whole, shards)
        assert np.array_equal(other.predictions, reference.predictions)
    numbers = [5, 0, 9]
    views = Views(params, whole.network(), whole.manifest["pixels"], torch.device("cpu"))
    found = views(pictures(params, shards.split("val"), numbers)).posteriors
    rows = rows_of(np.array(numbers), reference.predictions["label"][numbers].astype(np.int64), found)
    assert np.array_equal(rows, reference.predictions[numbers])


@pytest.mark.parametrize("configuration", ["A", pytest.param("A-LRN", marks=pytest.mark.faults)])
def test_posteriors_equal_an_explicit_computation(configuration: str, shards: ShardSet, tmp_path: Path) -> None:
    """Of one image: resize, cut, mirror, mean over positions, softmax, mean."""
    run(shards, tmp_path / "other", epochs=1, configuration=configuration)
    trained = Trained.open(tmp_path / "other")
    params, split = parameters(methods=["centre_crop", "dense", "multi_crop"]), shards.split("val")
    model, pixels = trained.network(), trained.manifest["pixels"]
    mean, std = (torch.tensor(pixels[k])[:, None, None] for k in ("mean", "std"))
    picture = decode(split.read(0), 10**6)

    def scores(data: np.ndarray) -> torch.Tensor:
        """Of an image of any size, and of its mirror image: (2, classes)."""
        x = ((torch.from_numpy(data.copy()).permute(2, 0, 1).float() - mean) / std)[None]
        found = []
        for view in (x, x.flip(-1)):
            maps = model.features(view)
            positions = [model.classifier(maps[:, :, i, j]) for i, j in np.ndindex(*maps.shape[2:])]
            found.append(torch.stack(positions).mean(0)[0])
        return torch.stack(found)

    expected: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for q in params.test_scales:
            height, width = short_side(picture.height, picture.width, q)
            data = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
            expected[f"dense_Q{q}_flip"] = scores(data).softmax(1).mean(0)
            corners = [(round(i * (height - 32) / 4), round(j * (width - 32) / 4)) for i in range(5) for j in range(5)]
            crops = [scores(data[top : top + 32, left : left + 32]) for top, left in corners]
            expected[f"multi_crop_Q{q}_flip"] = torch.cat(crops).softmax(1).mean(0)
            short = min(picture.size)
            sides = int(q * picture.width / short), int(q * picture.height / short)
            data = np.asarray(center_crop(picture.resize(sides, Image.Resampling.BILINEAR), [32]))
            expected[f"centre_crop_Q{q}"] = scores(data)[0].softmax(0)
        for method in ("dense", "multi_crop"):
            each = [expected[f"{method}_Q{q}_flip"] for q in params.test_scales]
            expected[f"{method}_Q32-64_flip"] = torch.stack(each).mean(0)
        views = Views(params, model, pixels, torch.device("cpu"))
        found = views(pictures(params, split, [0])).posteriors[0]
    for mode, posteriors in zip(views.modes[:-1], found, strict=False):  # Pillow and torch round pixels differently
        torch.testing.assert_close(posteriors, expected.pop(mode.name), atol=5e-3, rtol=0)
    assert not expected


def test_average_of_scores_and_softmax_per_position(shards: ShardSet, trained: Trained) -> None:
    """Options other than the paper's, from the score map."""
    split, model, pixels = shards.split("val"), trained.network(), trained.manifest["pixels"]
    for options in ({"average": "scores"}, {"softmax": "per_position"}):
        params = parameters(methods=["dense"], flip=False, **options)
        views = Views(params, model, pixels, torch.device("cpu"))
        [picture] = pictures(params, split, [3])
        with torch.inference_mode():
            found = views([picture]).posteriors[0]
            maps = [views.net(views.prepare(image[None]))[0].flatten(1) for image in picture.scaled.values()]
        if "average" in options:
            expected = torch.stack([scores.mean(1) for scores in maps]).mean(0).softmax(0)
        else:
            expected = torch.stack([scores.softmax(0).mean(1) for scores in maps]).mean(0)
        torch.testing.assert_close(found[-1], expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="set softmax: after_mean"):
        parameters(average="scores", softmax="per_position")


def test_headline_and_embedding(shards: ShardSet, trained: Trained) -> None:
    """Without the other modes the headline is the same, bit for bit; the embedding averages fc7."""
    params, split = parameters(), shards.split("val")
    model, pixels = trained.network(), trained.manifest["pixels"]
    views = Views(params, model, pixels, torch.device("cpu"), only_headline=True)
    [picture] = pictures(params, split, [1])
    found = views([picture], embed=True)
    everything = Views(params, model, pixels, torch.device("cpu"))([picture])
    assert torch.equal(found.posteriors[0, -1], everything.posteriors[0, -1])
    expected = []
    with torch.no_grad():
        for q in params.test_scales:
            x = views.prepare(picture.scaled[short_side(picture.height, picture.width, q)][None])
            for view in (x, x.flip(-1)):
                maps = model.features(view)
                fc7 = [model.classifier[:5](maps[:, :, i, j]) for i, j in np.ndindex(*maps.shape[2:])]
                expected.append(torch.stack(fc7).mean(0))
    assert found.embeddings is not None
    assert found.embeddings.shape == (1, model.architecture.classifier_width)
    assert found.embeddings.min() >= 0 < found.embeddings.max()
    torch.testing.assert_close(found.embeddings, torch.stack(expected).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
def test_resize_equals_pillow_within_two_grey_levels(kernel: str, images: Path) -> None:
    picture = Image.open(images / "train" / "cat" / "0003.jpg").convert("RGB")
    for size in ((32, 48), (200, 150), (67, 101)):
        ours = resize(torch.from_numpy(np.array(picture))[None], *size, kernel)[0].numpy().astype(int)
        theirs = np.asarray(picture.resize((size[1], size[0]), Image.Resampling[kernel.upper()])).astype(int)
        assert np.abs(ours - theirs).max() <= (1 if kernel == "bilinear" else 2)


@pytest.mark.parametrize(("width", "height"), [(33, 33), (500, 375), (375, 501), (64, 47), (401, 303)])
def test_the_centre_crop_is_torchvisions(width: int, height: int) -> None:
    """Resize, then CenterCrop, on odd sizes."""
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))
    theirs = center_crop(resize_as_torchvision(picture, [32 + 4]), [32])
    base = Base("centre_crop", 36)
    ours = centre_crop(resize(torch.from_numpy(np.array(picture))[None], *size_at(base, height, width)), 32)[0]
    assert np.abs(ours.numpy().astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def sizes_of_val(shards: ShardSet) -> NDArray[np.int64]:
    rows = shards.split("val").rows
    return np.stack([rows["height"], rows["width"]], -1).astype(np.int64)


def test_every_image_is_in_one_chunk_within_its_pixels(shards: ShardSet) -> None:
    sizes, seen = sizes_of_val(shards), []
    for numbers in chunks_by_size(sizes, np.arange(NUM_VAL), [32, 64], 30_000):
        pixels = max(np.prod(short_side(*sizes[n].tolist(), 64)) for n in numbers)
        assert len(numbers) == 1 or pixels * len(numbers) <= 30_000
        seen += numbers.tolist()
    assert sorted(seen) == list(range(NUM_VAL))


def test_many_crops_make_short_chunks() -> None:
    """296 digits at 32 pixels fit into one batch; 150 crops of each do not."""
    bases = bases_of(parameters(methods=["multi_crop"], test_scales=[32, 33, 34]))
    sizes = np.full((296, 2), 32, np.int64)
    assert pixels_seen(bases, True, 32, 32, 32) == 150 * 32 * 32
    seen = partial(pixels_seen, bases, True, 32)
    chunks = list(chunks_by_size(sizes, np.arange(296), [34], 400_000, seen))
    assert max(map(len, chunks)) == 2 * 400_000 // (150 * 32 * 32)
    assert sorted(np.concatenate(chunks).tolist()) == list(range(296))
    assert len(list(chunks_by_size(sizes, np.arange(296), [34], 400_000))) == 1


def test_a_killed_evaluation_goes_on(shards: ShardSet, trained: Trained, tmp_path: Path, monkeypatch: Any) -> None:
    """After a kill nothing is evaluated twice, except what a damaged part held; the results are the same bits."""
    monkeypatch.setattr("vgg.evaluation.evaluate.SAVE_SECONDS", 0.0)
    params, reference = parameters(batch_pixels=9_000), evaluated(parameters(), trained, shards)
    stopped = None

    def stop_after_five(done: int, _total: int) -> None:
        nonlocal stopped
        if done >= 5:
            stopped = done
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(params, trained, shards, ALONE, stop_after_five, Parts(tmp_path / "parts", "a"))
    saved = list((tmp_path / "parts").rglob("*.npy"))
    assert saved
    flipped = bytearray(saved[0].read_bytes())
    flipped[-1] ^= 1
    saved[0].write_bytes(flipped)
    steps: list[int] = []
    parts = Parts(tmp_path / "parts", "a")
    found = evaluate(params, trained, shards, ALONE, lambda done, _: steps.append(done), parts)
    assert found
    assert np.array_equal(found.predictions, reference.predictions)
    assert found.metrics == reference.metrics
    assert 0 < steps[0] < NUM_VAL - 1
    assert len(steps) < len(list(chunks_by_size(sizes_of_val(shards), np.arange(NUM_VAL), [32, 64], 9_000)))
    other = Parts(tmp_path / "parts", "b")
    other.open(part_type(1, 1))
    assert not len(other.numbers())
    assert not list((tmp_path / "parts").rglob("*.npy"))


def test_fusion_averages_networks_by_key(shards: ShardSet, trained: Trained, tmp_path: Path) -> None:
    """Joined by key, in whatever order the other evaluation has its images; refused on other images or classes."""
    alone = evaluated(parameters(), trained, shards)
    keys = np.asarray(shards.split("val").rows["key"])
    run(shards, tmp_path / "second", epochs=1, seed=5)
    second = evaluated(parameters(), Trained.open(tmp_path / "second"), shards)
    backwards = Partner("other", keys[::-1], shards.classes_sha256, second.posteriors(4)[::-1])
    partner = backwards.joined(keys, shards.classes_sha256)
    found = evaluate(parameters(), trained, shards, ALONE, lambda *_: None, partners=[partner])
    assert found
    assert found.modes == [*alone.modes, "fusion"]
    assert found.network_mode == alone.modes[-1]
    expected = (alone.posteriors(4).astype(float) + second.posteriors(4).astype(float)) / 2
    np.testing.assert_allclose(found.posteriors(5), expected, atol=1e-3)
    assert np.array_equal(found.predictions["modes"]["classes"][:, -1, 0], expected.argmax(1))
    assert np.array_equal(found.predictions["modes"][:, :-1], alone.predictions["modes"])
    assert found.metrics["headline"] == "fusion"
    with pytest.raises(Refused, match="other classes"):
        backwards.joined(keys, "0" * 64)
    for other, text in ((keys[1:], "It lacks 1, as "), (np.append(keys, b"new"), "is of other images")):
        with pytest.raises(Refused, match=text):
            Partner("other", other, shards.classes_sha256, second.posteriors(0)).joined(keys, shards.classes_sha256)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_write_the_same_files_as_one(
    ranks: int, shards: ShardSet, whole: Trained, params_file: Path, tmp_path: Path
) -> None:
    arguments = flags("evaluate", tmp_path, params_file)
    for folder, command in (("alone", ["evaluate"]), ("together", ["launch", ranks, "components.evaluate"])):
        done = program(str(command[0]), *command[1:], *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("← headline") == 1
        (tmp_path / folder).mkdir()
        (tmp_path / "m/evaluate.record.json").unlink()  # names the number of ranks
        for output in ("predictions", "m"):
            (tmp_path / output).rename(tmp_path / folder / output)
    assert len(files(tmp_path / "alone")) == 14
    assert files(tmp_path / "together") == files(tmp_path / "alone")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("vgg-imagenet")
    assert experiment
    runs = client.search_runs([experiment.experiment_id], "tags.`vgg.stage` = 'evaluate'")
    assert [run.info.status for run in runs] == ["FINISHED"]  # the same work is one run


def test_weights_that_are_not_finite_are_refused(shards: ShardSet, trained: Trained) -> None:
    network = trained.network()
    with torch.no_grad():
        network.features[0].weight[0, 0, 0, 0] = torch.nan
    broken = mock.MagicMock(wraps=trained, manifest=trained.manifest)
    broken.network = lambda: network
    with pytest.raises(Refused, match="a score is not finite"):
        evaluate(parameters(), broken, shards, ALONE, lambda *_: None)


def test_other_classes_are_refused(shards: ShardSet, trained: Trained) -> None:
    shards.classes_sha256 = "0" * 64
    with pytest.raises(Refused, match="trained on other classes"):
        evaluate(parameters(), trained, shards, ALONE, lambda *_: None)


def test_unfinished_and_damaged_trainings_are_refused_with_78(
    shards: ShardSet, whole: Trained, params_file: Path, tmp_path: Path
) -> None:
    weights = next((tmp_path / "model").glob("step-*/weights.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = program("evaluate", *flags("evaluate", tmp_path, params_file), cwd=tmp_path)
    assert (done.returncode, "weights.safetensors" in done.stderr) == (78, True), done.stderr
    (tmp_path / "model" / "manifest.json").unlink()
    done = program("evaluate", *flags("evaluate", tmp_path, params_file), cwd=tmp_path)
    assert (done.returncode, "is not finished" in done.stderr) == (78, True), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "m").exists()


def test_decoding_processes_make_the_same_pictures(
    shards: ShardSet, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(batch_pixels=17_000)
    reference = evaluated(params, trained, shards)
    monkeypatch.setenv(environment.WORKERS.name, "2")
    assert np.array_equal(evaluated(params, trained, shards).predictions, reference.predictions)


def test_the_program_writes_metrics_predictions_and_pictures(
    shards: ShardSet, whole: Trained, params_file: Path, tmp_path: Path
) -> None:
    done = program(
        "evaluate", *flags("evaluate", tmp_path, params_file),
        "--executor-input", executor_input(tmp_path / "out.json"), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "m/evaluate.json").read_text())
    assert metrics["num_images"] == NUM_VAL
    assert 0 <= metrics["top5_error"] <= metrics["top1_error"] <= 1
    assert "← headline" in done.stderr
    rows = np.load(tmp_path / "predictions/predictions.npy", allow_pickle=False)
    assert rows.dtype == row_type(5)
    wrong = int((rows["modes"]["rank"][:, -1] > 0).sum())
    assert metrics["top1_error"] == wrong / NUM_VAL
    assert len((tmp_path / "predictions/mistakes.csv").read_text().splitlines()) == 1 + wrong
    picture = Image.open(io.BytesIO((tmp_path / "predictions/confusion.png").read_bytes()))
    assert min(picture.size) > 100
    assert metrics["training"]["configuration"] == train_params().configuration
    page = (tmp_path / "m/report.html").read_text(encoding="utf-8")
    for said in ("epochs, batch", "bilinear filter", "over positions, then softmax", "rounded down", "What to do next"):
        assert said in page
    output = json.loads((tmp_path / "out.json").read_text())
    assert output["artifacts"]["metrics"]["artifacts"][0]["metadata"]["top1_error"] == metrics["top1_error"]
    assert output["parameterValues"]["predictions"].startswith(str(tmp_path / "predictions#"))
    assert train_params().configuration == "A"


@pytest.mark.faults
def test_fused_compared_and_not_registered(shards: ShardSet, whole: Trained, params_file: Path, tmp_path: Path) -> None:
    """Fused with itself nothing changes but the name; both evaluations compare as equal; a fusion is no version."""
    done = program("evaluate", *flags("evaluate", tmp_path, params_file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "m/evaluate.json").read_text())
    (tmp_path / "predictions").rename(tmp_path / "first")
    parameters_file = json.loads(params_file.read_text())
    parameters_file["evaluate"]["fuse"] = [str(tmp_path / "first")]
    params_file.write_text(json.dumps(parameters_file))
    done = program("evaluate", *flags("evaluate", tmp_path, params_file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    fused = json.loads((tmp_path / "m/evaluate.json").read_text())
    assert (fused["headline"], fused["top1_error"]) == ("fusion", metrics["top1_error"])
    assert [network["configuration"] for network in fused["fused"]] == ["A", "A"]
    done = program(
        "evaluate", "compare", str(tmp_path / "first"), str(tmp_path / "predictions"), "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    compared = json.loads(done.stdout)
    assert (compared["num_images"], compared["mcnemar_p"], compared["difference"]) == (NUM_VAL, 1.0, 0.0)
    done = program("register", *flags("register", tmp_path, params_file), cwd=tmp_path)
    assert (done.returncode, "fusion of several networks" in done.stderr) == (78, True), done.stderr


SLOWLY = """
import sys, time
import vgg.evaluation.evaluate as evaluation
from components import program
from components.evaluate.__main__ import main
evaluation.SAVE_SECONDS = 0.0
at_once = evaluation.Views.__call__
evaluation.Views.__call__ = lambda *args: time.sleep(0.3) or at_once(*args)
program.run(lambda: main(sys.argv[1:]))
"""


@pytest.mark.faults
def test_the_killed_program_goes_on_and_writes_the_same_metrics(
    shards: ShardSet, whole: Trained, params_file: Path, tmp_path: Path
) -> None:
    parameters_file = json.loads(params_file.read_text())
    parameters_file["evaluate"]["batch_pixels"] = 1
    params_file.write_text(json.dumps(parameters_file))
    arguments = flags("evaluate", tmp_path, params_file)
    command = [sys.executable, "-c", SLOWLY, *map(str, arguments)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment_of_programs(), stderr=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("predictions.parts/*/*.npy"))) < 3:
            assert killed.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        killed.kill()
    assert not (tmp_path / "m/evaluate.json").exists()
    done = program("evaluate", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "images were evaluated before" in done.stderr
    assert not (tmp_path / "predictions.parts").exists()
    after_kill = (tmp_path / "m/evaluate.json").read_bytes()
    shutil.rmtree(tmp_path / "predictions")
    done = program("evaluate", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "evaluated before" not in done.stderr
    assert (tmp_path / "m/evaluate.json").read_bytes() == after_kill
