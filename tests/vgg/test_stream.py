"""From the index to batches: the same global batches for any number of ranks, workers and restarts."""

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NUM_TRAIN, NUM_VAL, train_params
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from runtime.errors import StorageFailure
from runtime.shards.batches import SLOTS, Crops
from runtime.shards.loader import Loader
from runtime.shards.shardset import LocalShards, ShardSet
from vgg import draws
from vgg.data import roi
from vgg.data.augment import EIGENVALUES, EIGENVECTORS, Prepare
from vgg.data.images import image_of
from vgg.data.stream import Order, random_windows, training_batches, validation_batches
from vgg.data.windows import AREAS, RATIOS, Window, area_window, centre_window, crop_window

STEPS = 9


def stream(shards: ShardSet, rank: int = 0, world_size: int = 1, first: int = 0, workers: int = 0) -> list[Crops]:
    return list(
        training_batches(
            Loader(rank=rank, world_size=world_size, workers=workers),
            shards.split("train"),
            train_params(),
            range(first, STEPS),
        )
    )


def test_epochs_are_different_permutations(shards: ShardSet) -> None:
    order = Order(np.asarray(shards.split("train").rows["shard"]), seed=1)
    epochs = [order.epoch(epoch).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(NUM_TRAIN)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert Order(order.shards, seed=2).epoch(0).tolist() != epochs[0]


def test_shards_are_shuffled_in_blocks() -> None:
    """An epoch finishes a block of 64 shards before it starts the next, which limits the cache of a node."""
    order = Order(np.repeat(np.arange(200), 3), seed=1).epoch(0)
    for first in range(0, 600, 192):
        assert len({number // 3 for number in order[first : first + 192]}) == min(64, (600 - first) // 3)


def test_batches_continue_across_epochs_without_dropping_images(shards: ShardSet) -> None:
    order = Order(np.asarray(shards.split("train").rows["shard"]), seed=1)
    taken = np.concatenate([numbers for numbers, _ in order.batches(8, 0, STEPS)])
    expected = np.concatenate([order.epoch(epoch) for epoch in range(3)])[: 8 * STEPS]
    assert taken.tolist() == expected.tolist()
    epochs = np.concatenate([epochs for _, epochs in order.batches(8, 0, STEPS)])
    assert epochs.tolist() == [i // NUM_TRAIN for i in range(8 * STEPS)]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(shards: ShardSet, workers: int) -> None:
    alone = stream(shards)
    for world_size in (1, 2, 3, 4, 6):
        ranks = [stream(shards, rank, world_size, workers=workers) for rank in range(world_size)]
        for step, whole in enumerate(alone):
            for rank, share in enumerate(batches[step] for batches in ranks):
                for ours, theirs in zip(share, whole, strict=True):
                    assert torch.equal(ours, theirs[rank::world_size])


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_any_step_gives_the_next_batch(shards: ShardSet, workers: int) -> None:
    straight = stream(shards)
    for first in range(STEPS) if workers == 0 else (3,):
        for resumed, expected in zip(stream(shards, first=first, workers=workers), straight[first:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(resumed, expected, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 13])
def test_validation_sees_every_image_exactly_once(shards: ShardSet, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        loader = Loader(rank=rank, world_size=world_size)
        for crops in validation_batches(loader, shards.split("val"), train_params(batch_size=4)):
            seen += crops.numbers.tolist()
    assert sorted(seen) == list(range(NUM_VAL))


def test_decoding_on_the_device_changes_only_pixels_by_at_most_two(shards: ShardSet) -> None:
    split, params = shards.split("train"), train_params()
    decoder = roi.DeviceDecoder(torch.device("cpu"))  # decoders of a GPU are tested in test_roi.py
    loader = Loader(rank=1, world_size=2, workers=3, decoder=decoder)
    found = list(training_batches(loader, split, params, range(2, STEPS)))
    for ours, theirs in zip(found, stream(shards, 1, 2, 2), strict=True):
        assert (ours.images.int() - theirs.images.int()).abs().max() <= 2
        assert all(torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))
    centres = list(validation_batches(Loader(decoder=decoder), shards.split("val"), params))
    assert torch.cat([crops.numbers for crops in centres]).tolist() == list(range(NUM_VAL))


def workers_of_this_process() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def test_a_killed_worker_is_reported_and_no_batch_is_lost_or_repeated(
    shards: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    before = workers_of_this_process()
    batches = training_batches(Loader(workers=2), shards.split("train"), train_params(), range(STEPS))
    found = [next(batches)]
    victim = next(pid for pid in workers_of_this_process() if pid not in before)
    os.kill(victim, signal.SIGKILL)
    found += batches
    for ours, expected in zip(found, stream(shards), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert "a decoding process died of SIGKILL (as when memory runs out)" in caplog.text


def test_batches_and_their_views_do_not_change_while_loading_continues(shards: ShardSet) -> None:
    expected = stream(shards)
    for count in (1, 2, 3, STEPS):  # a slot is reused when no tensor uses it; with no free slot, batches are copied
        held: list[torch.Tensor] = []
        for step, crops in enumerate(
            training_batches(Loader(workers=2), shards.split("train"), train_params(), range(STEPS)), start=1
        ):
            held = [*held, crops.images[2:5].permute(0, 3, 1, 2)][-count:]  # only a view of the batch is kept
            del crops
            for ours, theirs in zip(held, expected[step - len(held) : step], strict=True):
                assert torch.equal(ours, theirs.images[2:5].permute(0, 3, 1, 2))


def test_memory_of_batches_is_reused(shards: ShardSet) -> None:
    split, params = shards.split("train"), train_params()
    addresses = [crops.images.data_ptr() for crops in training_batches(Loader(workers=2), split, params, range(40))]
    assert len(set(addresses)) <= 2 * SLOTS


def test_workers_that_always_die_end_the_run(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roi, "crops", lambda *_: os._exit(9))
    with pytest.raises(StorageFailure, match="died 4 times, the last of exit code 9"):
        stream(shards, workers=1)


def test_storage_that_hangs_does_not_hang_the_run(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.shards.loader.HUNG_SECONDS", 2)
    monkeypatch.setattr(LocalShards, "read", lambda *_: time.sleep(60))
    start = time.monotonic()
    with pytest.raises(StorageFailure, match="no batch from the 1 decoding processes for 2 s"):
        stream(shards, workers=1)
    assert time.monotonic() - start < 30


def test_draws_are_uniform_normal_and_independent() -> None:
    u = draws.uniform("test", 1, np.arange(200_000))
    assert (u >= 0).all()
    assert (u < 1).all()
    assert np.histogram(u, 20, (0, 1))[0] == pytest.approx(10_000, rel=0.05)
    n = draws.normal("test", 1, np.arange(200_000))
    assert (n.mean(), n.std()) == pytest.approx((0, 1), abs=0.01)
    assert abs(np.corrcoef(u, draws.uniform("test", 2, np.arange(200_000)))[0, 1]) < 0.01
    assert abs(np.corrcoef(u, draws.uniform("other", 1, np.arange(200_000)))[0, 1]) < 0.01


def test_the_order_is_pinned() -> None:
    """A change of these numbers changes every resumed run: it needs a reason and a new format."""
    assert draws.bits("pin", 1, 2, [3, 4]).tolist() == [int(draws.bits("pin", 1, 2, n)) for n in (3, 4)]
    assert draws.permutation("pin", 8, 7).tolist() == PINNED


PINNED = [1, 2, 7, 3, 5, 0, 4, 6]


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (224, 224), (90, 1200), (33, 32)])
@pytest.mark.parametrize("scale", [224, 256, 384, 512])
def test_the_crop_equals_that_of_the_rescaled_image(width: int, height: int, scale: int) -> None:
    """Cutting from the source and resizing equals rescaling to short side S and cutting, up to rounding."""
    short = min(width, height)
    for x, y in ((0.0, 0.0), (0.5, 0.5), (0.999, 0.999)):
        window = crop_window(width, height, scale, 224, x, y)
        assert window.width == window.height == max(1, round(224 * short / scale))
        assert 0 <= window.left <= window.right <= width
        assert 0 <= window.top <= window.bottom <= height
    corners = [crop_window(width, height, scale, 224, x, x) for x in (0.0, 0.9999999)]
    assert (corners[0].left, corners[1].left) == (0, width - corners[1].width)
    centre = centre_window(width, height, scale, 224)
    assert abs(centre.left + centre.right - width) <= 1


def windows(crop: str, sides: list[tuple[int, int]], epoch: int = 0) -> list[Window]:
    """The windows of images 0, 1, … with the given sizes, in an epoch."""
    params = train_params(crop=crop, train_scale=300 if crop == "area" else [256, 512])
    window = random_windows(params, 224, np.arange(len(sides)), np.full(len(sides), epoch))
    return [window(width, height, number) for number, (width, height) in enumerate(sides)]


@pytest.mark.parametrize("crop", ["scale", "area"])
def test_windows_are_pinned_and_differ_by_image_and_epoch(crop: str) -> None:
    """A change of these digests changes every resumed run: it needs a reason and a new format."""
    sides = [(500, 375), (375, 500), (333, 333), (90, 1200), (33, 32)] * 20
    epochs = [windows(crop, sides, epoch) for epoch in range(3)]
    assert hashlib.sha256(json.dumps(epochs).encode()).hexdigest()[:16] == PINNED_WINDOWS[crop]
    assert len({w for epoch in epochs for w in epoch[::5]}) == 60


PINNED_WINDOWS = {"scale": "275738cdf2a08595", "area": "6c47c2e7bf28aff9"}


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (640, 640), (100, 76), (9, 7)])
def test_area_windows_are_inside_and_have_valid_areas_and_ratios(width: int, height: int) -> None:
    for window in windows("area", [(width, height)] * 3000):
        assert 0 <= window.left < window.right <= width
        assert 0 <= window.top < window.bottom <= height
        # sides are rounded to whole pixels, by at most half a pixel
        low, high = ((window.width + d) * (window.height + d) / (width * height) for d in (-0.5, 0.5))
        assert low <= AREAS[1]
        assert high >= AREAS[0]
        assert (window.width + 0.5) / (window.height - 0.5) >= RATIOS[0]
        assert (window.width - 0.5) / (window.height + 0.5) <= RATIOS[1]


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (640, 300), (300, 300)])
def test_area_windows_are_distributed_as_in_torchvision(width: int, height: int) -> None:
    """Means and quantiles of 4,000 windows each, with fixed seeds, within five standard errors."""
    ours = np.array([[w.top, w.left, w.height, w.width] for w in windows("area", [(width, height)] * 4000)])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        image = torch.empty(3, height, width)
        drawn = [RandomResizedCrop.get_params(image, list(AREAS), list(RATIOS)) for _ in range(4000)]
    for found, expected in zip(features(ours), features(np.array(drawn)), strict=True):
        error = 5 * np.hypot(found.std(), expected.std()) / np.sqrt(4000)
        assert found.mean() == pytest.approx(expected.mean(), abs=error)
        for share in (0.1, 0.25, 0.5, 0.75, 0.9):
            reached = np.mean(expected <= np.quantile(found, share))
            assert reached == pytest.approx(share, abs=5 * np.sqrt(2 * share * (1 - share) / 4000) + 0.01)


def features(windows: np.ndarray) -> list[np.ndarray]:
    """Centre, area, ratio and position of windows (top, left, height, width)."""
    top, left, height, width = windows.T.astype(float)
    return [top + height / 2, left + width / 2, height * width, np.log(width / height), top, left]


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (4000, 20, Window(1986, 0, 27, 20)),  # flat: the largest window of ratio 4 : 3
        (20, 4000, Window(0, 1986, 20, 27)),  # tall: ratio 3 : 4
        (1, 1, Window(0, 0, 1, 1)),
    ],
)
def test_images_of_extreme_shape_have_a_central_window(width: int, height: int, expected: Window) -> None:
    assert set(windows("area", [(width, height)] * 200)) == {expected}
    # an image of ordinary shape: the whole image
    assert area_window(500, 400, [0.999], [0.0], 0.5, 0.5) == Window(0, 0, 500, 400)


def test_area_crops_are_resized_windows_for_any_number_of_ranks(shards: ShardSet) -> None:
    split, params = shards.split("train"), train_params(crop="area", train_scale=36)
    whole = list(training_batches(Loader(workers=2), split, params, range(STEPS)))
    ranks = [
        list(training_batches(Loader(rank=rank, world_size=3), split, params, range(4, STEPS))) for rank in range(3)
    ]
    for step, shares in enumerate(zip(*ranks, strict=True), 4):
        for rank, share in enumerate(shares):
            assert all(torch.equal(a, b[rank::3]) for a, b in zip(share, whole[step], strict=True))
    order = Order(np.asarray(split.rows["shard"]), params.seed)
    for crops, (numbers, epochs) in zip(whole, order.batches(params.batch_size, 0, STEPS), strict=True):
        window = random_windows(params, params.input_size, numbers, epochs)
        for i, number in enumerate(numbers):
            image = image_of(split, int(number), 10**6)
            box = window(image.width, image.height, i).box
            resized = image.crop(box).resize((32, 32), Image.Resampling.BILINEAR)
            assert np.abs(crops.images[i].numpy().astype(int) - np.asarray(resized)).max() <= 2


def test_prepare_flips_shifts_and_subtracts_the_mean() -> None:
    images = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    flip, colour = torch.tensor([False, True, False]), torch.randn(3, 3)
    mean, std = [1.0, 2.0, 3.0], [2.0, 2.0, 4.0]
    found = Prepare(mean, std, 0.1)(images, flip, colour)
    assert found.shape == (3, 3, 8, 8)
    assert found.is_contiguous(memory_format=torch.channels_last)
    vectors, values = torch.tensor(EIGENVECTORS), torch.tensor(EIGENVALUES)
    for i in range(3):
        expected = images[i].permute(2, 0, 1).float()
        expected = expected.flip(-1) if flip[i] else expected
        shift = vectors @ (0.1 * colour[i] * values)
        expected = (expected + shift[:, None, None] - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
            :, None, None
        ]
        torch.testing.assert_close(found[i], expected)
    orthonormal = vectors.T @ vectors
    torch.testing.assert_close(orthonormal, torch.eye(3), atol=2e-3, rtol=0)
