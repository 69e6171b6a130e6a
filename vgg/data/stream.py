"""From the index to batches: the images of every step, and their crops.

The order of an epoch is a pure function of (seed, epoch); scale, crop, flip, colour shift and dropout of an image are a
pure function of (seed, epoch, image).  Batches continue across the end of an epoch, so every batch is full and no
image is dropped.  The position in a training is therefore one integer, the step, and the global batches do not depend
on the number of ranks, workers and restarts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import Refused
from runtime.shards.batches import ROW, Crops
from runtime.shards.loader import Loader, Make
from runtime.shards.prefetch import fetching
from runtime.shards.shardset import BLOCK_SHARDS, Split
from vgg import draws
from vgg.data import roi
from vgg.data.windows import Window, area_window, centre_window, crop_window
from vgg.params.train import TrainParams

# (JPEGs, windows, output) -> reasons of failures by position: roi.crops or roi.DeviceDecoder.crops
Cut = Callable[[Sequence[bytes], Sequence[Window], Any], dict[int, str]]
Windows = Callable[[int, int, int], Window]  # (width, height, position in the batch) -> window
ATTEMPTS = 10  # to draw an area that fits, as in torchvision's RandomResizedCrop


@dataclass(frozen=True)
class Order:
    """The order of training images over all epochs.  shards: shard number of every image, from the index."""

    shards: np.ndarray
    seed: int

    def epoch(self, epoch: int) -> np.ndarray:
        """All image numbers of an epoch, shuffled: first the shards, then the images of every BLOCK_SHARDS shards."""
        shards = self.of_shards(epoch)
        rank_of_shard = np.empty(len(shards), np.int64)
        rank_of_shard[shards] = np.arange(len(shards))
        block = rank_of_shard[self.shards] // BLOCK_SHARDS
        return np.lexsort((draws.bits("order/images", self.seed, epoch, np.arange(len(self.shards))), block))

    def of_shards(self, epoch: int) -> np.ndarray:
        """All shard numbers in the order in which an epoch reads them, block by block."""
        return draws.permutation("order/shards", int(self.shards.max()) + 1, self.seed, epoch)

    def batches(self, batch_size: int, first_step: int, num_steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(image numbers, their epochs) of the global batches of steps first_step to num_steps - 1."""
        size, current, order = len(self.shards), -1, np.empty(0, np.int64)
        for step in range(first_step, num_steps):
            position = np.arange(step * batch_size, (step + 1) * batch_size)
            numbers, epochs = np.empty(batch_size, np.int64), position // size
            for epoch in np.unique(epochs):
                if epoch != current:
                    current, order = epoch, self.epoch(int(epoch))
                numbers[epochs == epoch] = order[position[epochs == epoch] % size]
            yield numbers, epochs


def random_windows(params: TrainParams, size: int, numbers: np.ndarray, epochs: np.ndarray) -> Windows:
    """Random windows for images `numbers` in `epochs`, both int (n,).  size: side of a crop, pixels."""
    counters = params.seed, epochs, numbers
    x, y = draws.uniform("crop/x", *counters), draws.uniform("crop/y", *counters)
    if params.crop == "area":
        attempts = params.seed, epochs[:, None], numbers[:, None], np.arange(ATTEMPTS)
        areas, ratios = (draws.uniform(f"crop/{what}", *attempts).tolist() for what in ("area", "ratio"))
        return lambda width, height, i: area_window(width, height, areas[i], ratios[i], x[i], y[i])
    smallest, largest = params.scale_range
    scale = smallest + (draws.uniform("scale", *counters) * (largest - smallest + 1)).astype(int)
    return lambda width, height, i: crop_window(width, height, int(scale[i]), size, x[i], y[i])


@dataclass(frozen=True)
class TrainingCrops:
    """Makes random crops from (image numbers, their epochs): a runtime.shards.loader.Make."""

    split: Split
    params: TrainParams
    cut: Cut

    def __call__(self, wanted: tuple[np.ndarray, np.ndarray], into: Any) -> NDArray[np.void]:
        (numbers, epochs), params = wanted, self.params
        windows = self.windows(numbers, epochs, into.shape[1])
        bad = self.cut([self.split.read(int(number)) for number in numbers], windows, into[: len(numbers)])
        rows = rows_of(self.split, numbers, bad)
        rows["flip"] = (draws.uniform("flip", params.seed, epochs, numbers) < 0.5) & params.flip
        for i in range(3):
            rows["colour"][:, i] = draws.normal(f"colour/{i}", params.seed, epochs, numbers)
        rows["dropout"] = draws.bits("dropout", params.seed, epochs, numbers).view(np.int64)
        return rows

    def windows(self, numbers: np.ndarray, epochs: np.ndarray, size: int) -> list[Window]:
        """The parts of the images that become crops of this side."""
        return windows_of(self.split, numbers, random_windows(self.params, size, numbers, epochs))


@dataclass(frozen=True)
class CentreWindows:
    """Cuts the central window at the validation's scale from the source and resizes it: a runtime.shards.loader.Make.

    Up to two pixels from the centre crop that evaluation takes of the resized image (vgg.evaluation.scaled); it decodes
    only the window.
    """

    split: Split
    params: TrainParams
    cut: Cut

    def __call__(self, numbers: np.ndarray, into: Any) -> NDArray[np.void]:
        windows = self.windows(numbers, into.shape[1])
        bad = self.cut([self.split.read(int(number)) for number in numbers], windows, into[: len(numbers)])
        return rows_of(self.split, numbers, bad)

    def windows(self, numbers: np.ndarray, size: int) -> list[Window]:
        """The parts of the images that become crops of this side."""
        scale = self.params.validation_scale
        return windows_of(self.split, numbers, lambda w, h, _: centre_window(w, h, scale, size))


MakeOf = Callable[[Split, TrainParams, Cut], Make]  # what makes the crops of a split


def windows_of(split: Split, numbers: np.ndarray, window: Windows) -> list[Window]:
    """The windows of images, with the image sizes of the index."""
    rows = split.rows[numbers]
    sides = zip(rows["width"].tolist(), rows["height"].tolist(), strict=True)
    return [window(width, height, position) for position, (width, height) in enumerate(sides)]


def rows_of(split: Split, numbers: np.ndarray, bad: dict[int, str]) -> NDArray[np.void]:
    """Rows of batches.ROW with labels and numbers.  bad: reasons, by position, of images that could not be decoded.

    Raises Refused, naming shard and key, for such an image.
    """
    for position, reason in bad.items():
        raise Refused(f"{split.address}/{split.where(int(numbers[position]))}: {reason}. Shard again.")
    rows = np.zeros(len(numbers), ROW)
    rows["label"], rows["number"] = split.rows[numbers]["label"], numbers
    return rows


def training_batches(
    loader: Loader, split: Split, params: TrainParams, steps: range, crops: MakeOf = TrainingCrops
) -> Iterator[Crops]:
    """The loader's share of the global batches of some steps: every world_size-th image from its rank on."""
    order = Order(np.asarray(split.rows["shard"]), params.seed)

    with fetching(split, order, params.batch_size, steps.start, steps.stop) as requested:

        def wanted(delivered: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            first = steps.start + delivered
            for step, (numbers, epochs) in enumerate(order.batches(params.batch_size, first, steps.stop), first):
                requested(step)
                yield numbers[loader.rank :: loader.world_size], epochs[loader.rank :: loader.world_size]

        largest_share = -(-params.batch_size // loader.world_size)
        make = crops(split, params, _cut(loader))
        yield from loader.load(make, wanted, largest_share, (params.input_size, params.input_size, 3))


def validation_batches(
    loader: Loader, split: Split, params: TrainParams, crops: MakeOf = CentreWindows
) -> Iterator[Crops]:
    """Central crops of the loader's share of a split; over all ranks each image occurs exactly once."""
    size, batch_size = params.input_size, params.batch_size
    mine = np.arange(loader.rank, len(split), loader.world_size)

    def wanted(delivered: int) -> Iterator[np.ndarray]:
        for first in range(delivered * batch_size, len(mine), batch_size):
            yield mine[first : first + batch_size]

    return loader.load(crops(split, params, _cut(loader)), wanted, batch_size, (size, size, 3))


def _cut(loader: Loader) -> Cut:
    return loader.decoder.crops if loader.decoder else roi.crops
