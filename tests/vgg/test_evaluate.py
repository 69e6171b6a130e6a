"""Evaluation: every image once, results independent of batches and ranks, refusals, and the program."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALONE, EVALUATE, NUM_VAL, executor_input, flags, program, train_params
from mlflow import MlflowClient
from PIL import Image
from trainings import run

from runtime.errors import Refused
from runtime.shards.shardset import ShardSet
from vgg.data.images import decode
from vgg.evaluation.evaluate import Views, batches_of_one_size, evaluate, resize, row_type, short_side, sizes_of
from vgg.network.trained import Trained
from vgg.params.evaluate import EvaluateParams


def parameters(**changes: object) -> EvaluateParams:
    return EvaluateParams(**{**EVALUATE, **changes})


@pytest.fixture
def trained(shards: ShardSet, tmp_path: Path) -> Trained:
    run(shards, tmp_path / "model", epochs=1)
    return Trained.open(tmp_path / "model")


def test_modes_counts_and_batching(shards: ShardSet, trained: Trained) -> None:
    found = evaluate(parameters(), trained, shards, ALONE, lambda *_: None)
    assert found.modes == ["centre_Q64_flip", "dense_Q32_flip", "dense_Q64_flip", "dense_Q32-64_flip"]
    assert found.metrics["headline"] == "dense_Q32-64_flip"
    assert found.predictions["label"].tolist() == shards.split("val").rows["label"].tolist()
    for result in found.metrics["modes"].values():
        assert result["num_images"] == NUM_VAL
        assert result["top5_error"] == 0  # of three classes
    alone = evaluate(parameters(batch_pixels=1), trained, shards, ALONE, lambda *_: None)
    assert np.array_equal(alone.predictions["modes"]["classes"], found.predictions["modes"]["classes"])
    np.testing.assert_allclose(alone.predictions["modes"]["loss"], found.predictions["modes"]["loss"], atol=1e-4)


def test_posteriors_equal_an_explicit_computation(shards: ShardSet, trained: Trained) -> None:
    """Of one image: resize to every scale, mirror, mean over positions, softmax, mean."""
    params, split = parameters(), shards.split("val")
    model, pixels = trained.network(), trained.manifest["pixels"]
    mean, std = (torch.tensor(pixels[k])[:, None, None] for k in ("mean", "std"))
    picture = decode(split.read(0), 10**6)
    expected = []
    with torch.no_grad():
        for scale in params.test_scales:
            height, width = short_side(picture.height, picture.width, scale)
            data = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
            x = ((torch.from_numpy(data.copy()).permute(2, 0, 1).float() - mean) / std)[None]
            views = []
            for view in (x, x.flip(-1)):
                maps = model.features(view)
                scores = torch.stack([model.classifier(maps[:, :, i, j]) for i, j in np.ndindex(*maps.shape[2:])]).mean(
                    0
                )
                views.append(scores.softmax(1))
            expected.append((views[0] + views[1]) / 2)
    views = Views(params, model, pixels, torch.device("cpu"))
    found = views.posteriors(torch.from_numpy(np.array(picture))[None])
    torch.testing.assert_close(found[1], expected[0], atol=5e-3, rtol=0)  # Pillow and torch round pixels differently
    torch.testing.assert_close(found[3], (expected[0] + expected[1]) / 2, atol=5e-3, rtol=0)


def test_headline_and_embedding(shards: ShardSet, trained: Trained) -> None:
    """The headline is that of the evaluation, bit for bit; the embedding averages fc7 over positions and views."""
    params, split = parameters(), shards.split("val")
    model = trained.network()
    views = Views(params, model, trained.manifest["pixels"], torch.device("cpu"))
    images = torch.from_numpy(np.array(decode(split.read(1), 10**6)))[None]
    posterior, embedding = views.headline(images)
    assert torch.equal(posterior, views.posteriors(images)[-1])
    expected = []
    with torch.no_grad():
        for scale in params.test_scales:
            x = views.prepare(resize(images, *short_side(*images.shape[1:3], scale)))
            for view in (x, x.flip(-1)):
                maps = model.features(view)
                fc7 = [model.classifier[:5](maps[:, :, i, j]) for i, j in np.ndindex(*maps.shape[2:])]
                expected.append(torch.stack(fc7).mean(0))
    assert embedding.shape == (1, model.architecture.classifier_width)
    assert embedding.min() >= 0 < embedding.max()
    torch.testing.assert_close(embedding, torch.stack(expected).mean(0), atol=1e-5, rtol=1e-4)


def test_resize_equals_pillow_within_one_grey_level(images: Path) -> None:
    picture = Image.open(images / "train" / "cat" / "0003.jpg").convert("RGB")
    for size in ((32, 48), (200, 150), (67, 101)):
        ours = resize(torch.from_numpy(np.array(picture))[None], *size)[0].numpy().astype(int)
        theirs = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(ours - theirs).max() <= 1


def test_every_image_is_in_one_batch_of_images_of_its_size(shards: ShardSet) -> None:
    split, seen = shards.split("val"), []
    for numbers in batches_of_one_size(sizes_of(split), [32, 64], 30_000):
        sizes = {(int(split.rows[n]["width"]), int(split.rows[n]["height"])) for n in numbers}
        assert len(sizes) == 1
        seen += numbers.tolist()
    assert sorted(seen) == list(range(NUM_VAL))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_write_the_same_files_as_one(
    ranks: int, shards: ShardSet, trained: Trained, params_file: Path, tmp_path: Path
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
    assert len(files(tmp_path / "alone")) == 9
    assert files(tmp_path / "together") == files(tmp_path / "alone")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("vgg-imagenet")
    assert experiment
    runs = client.search_runs([experiment.experiment_id], "tags.`vgg.stage` = 'evaluate'")
    assert [run.info.status for run in runs] == ["FINISHED"]  # the same work is one run


def test_other_classes_are_refused(shards: ShardSet, trained: Trained) -> None:
    shards.classes_sha256 = "0" * 64
    with pytest.raises(Refused, match="trained on other classes"):
        evaluate(parameters(), trained, shards, ALONE, lambda *_: None)


def test_unfinished_and_damaged_trainings_are_refused_with_78(
    shards: ShardSet, trained: Trained, params_file: Path, tmp_path: Path
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


def test_the_program_writes_metrics_predictions_and_pictures(
    shards: ShardSet, trained: Trained, params_file: Path, tmp_path: Path
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
    assert rows.dtype == row_type(4)
    wrong = int((rows["modes"]["rank"][:, -1] > 0).sum())
    assert metrics["top1_error"] == wrong / NUM_VAL
    assert len((tmp_path / "predictions/mistakes.csv").read_text().splitlines()) == 1 + wrong
    for name in ("confusion.png", "mistakes.png"):
        picture = Image.open(io.BytesIO((tmp_path / "predictions" / name).read_bytes()))
        assert min(picture.size) > 100
    output = json.loads((tmp_path / "out.json").read_text())
    assert output["artifacts"]["metrics"]["artifacts"][0]["metadata"]["top1_error"] == metrics["top1_error"]
    assert output["parameterValues"]["predictions"].startswith(str(tmp_path / "predictions#"))
    assert train_params().configuration == "A"
