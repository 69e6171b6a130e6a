"""From an index to batches: which images a step trains on, and their crops.

The order of an epoch is a pure function of (seed, epoch); scale, crop, flip, colour shift and dropout of an image are a
pure function of (seed, epoch, image).  Batches run on across the border of an epoch, so every batch is full and no
image is dropped.  A position in training is therefore one integer, the step, and any number of ranks and workers,
before and after any restart, sees the same global batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.batches import ROW, Crops
from runtime.errors import Refused
from runtime.loader import Loader
from runtime.prefetch import fetching
from runtime.shardset import BLOCK_SHARDS, Split
from vgg import draws
from vgg.data import roi
from vgg.data.windows import Window, area_window, centre_window, crop_window
from vgg.params.train import TrainParams

# (JPEGs, windows, images to write into) -> reasons by position: roi.crops, or that of a roi.DeviceDecoder
Cut = Callable[[Sequence[bytes], Sequence[Window], Any], dict[int, str]]
Windows = Callable[[int, int, int], Window]  # of (width, height, position in the batch)
ATTEMPTS = 10  # at a random area that fits, as torchvision's RandomResizedCrop makes


@dataclass(frozen=True)
class Order:
    """The endless order of a training set.  shards: shard of every image, as in the index."""

    shards: np.ndarray
    seed: int

    def epoch(self, epoch: int) -> np.ndarray:
        """All image numbers, shuffled: shards first, then the images inside every block of BLOCK_SHARDS shards."""
        shards = self.of_shards(epoch)
        rank_of_shard = np.empty(len(shards), np.int64)
        rank_of_shard[shards] = np.arange(len(shards))
        block = rank_of_shard[self.shards] // BLOCK_SHARDS
        return np.lexsort((draws.bits("order/images", self.seed, epoch, np.arange(len(self.shards))), block))

    def of_shards(self, epoch: int) -> np.ndarray:
        """All shard numbers, shuffled: the order in which an epoch comes to them, block by block."""
        return draws.permutation("order/shards", int(self.shards.max()) + 1, self.seed, epoch)

    def batches(self, batch_size: int, first_step: int, num_steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(image numbers, their epochs) of every global batch from first_step on."""
        size, held, order = len(self.shards), -1, np.empty(0, np.int64)
        for step in range(first_step, num_steps):
            position = np.arange(step * batch_size, (step + 1) * batch_size)
            numbers, epochs = np.empty(batch_size, np.int64), position // size
            for epoch in np.unique(epochs):
                if epoch != held:
                    held, order = epoch, self.epoch(int(epoch))
                numbers[epochs == epoch] = order[position[epochs == epoch] % size]
            yield numbers, epochs


def random_windows(params: TrainParams, size: int, numbers: np.ndarray, epochs: np.ndarray) -> Windows:
    """The random windows of images `numbers` in `epochs`, both int (n,).  size: side of a crop, pixels."""
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
    """Makes the random crops of (image numbers, their epochs): a runtime.loader.Make."""

    split: Split
    params: TrainParams
    cut: Cut

    def __call__(self, wanted: tuple[np.ndarray, np.ndarray], into: Any) -> NDArray[np.void]:
        (numbers, epochs), params = wanted, self.params
        windows = windows_of(self.split, numbers, random_windows(params, into.shape[1], numbers, epochs))
        bad = self.cut([self.split.read(int(number)) for number in numbers], windows, into[: len(numbers)])
        rows = rows_of(self.split, numbers, bad)
        rows["flip"] = (draws.uniform("flip", params.seed, epochs, numbers) < 0.5) & params.flip
        for i in range(3):
            rows["colour"][:, i] = draws.normal(f"colour/{i}", params.seed, epochs, numbers)
        rows["dropout"] = draws.bits("dropout", params.seed, epochs, numbers).view(np.int64)
        return rows


@dataclass(frozen=True)
class CentreCrops:
    """Makes the central crops, at one scale, of image numbers: a runtime.loader.Make."""

    split: Split
    scale: int
    cut: Cut

    def __call__(self, numbers: np.ndarray, into: Any) -> NDArray[np.void]:
        size = into.shape[1]
        windows = windows_of(self.split, numbers, lambda w, h, _: centre_window(w, h, self.scale, size))
        bad = self.cut([self.split.read(int(number)) for number in numbers], windows, into[: len(numbers)])
        return rows_of(self.split, numbers, bad)


def windows_of(split: Split, numbers: np.ndarray, window: Windows) -> list[Window]:
    """The windows of images, by their sizes in the index.  window: of (width, height, position)."""
    rows = split.rows[numbers]
    sides = zip(rows["width"].tolist(), rows["height"].tolist(), strict=True)
    return [window(width, height, position) for position, (width, height) in enumerate(sides)]


def rows_of(split: Split, numbers: np.ndarray, bad: dict[int, str]) -> NDArray[np.void]:
    """Rows of batches.ROW with labels and numbers.  bad: reasons, by position, of images that could not be decoded.

    Raises Refused, naming shard and key, for an image that is not what the index says.
    """
    for position, reason in bad.items():
        raise Refused(f"{split.address}/{split.where(int(numbers[position]))}: {reason}. Shard again.")
    rows = np.zeros(len(numbers), ROW)
    rows["label"], rows["number"] = split.rows[numbers]["label"], numbers
    return rows


def training_batches(loader: Loader, split: Split, params: TrainParams, steps: range) -> Iterator[Crops]:
    """The loader's share of the global batches of some steps: every world_size-th image, beginning with its rank."""
    order = Order(np.asarray(split.rows["shard"]), params.seed)

    with fetching(split, order, params.batch_size, steps.start, steps.stop) as requested:

        def wanted(delivered: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            first = steps.start + delivered
            for step, (numbers, epochs) in enumerate(order.batches(params.batch_size, first, steps.stop), first):
                requested(step)
                yield numbers[loader.rank :: loader.world_size], epochs[loader.rank :: loader.world_size]

        largest_share = -(-params.batch_size // loader.world_size)
        make = TrainingCrops(split, params, _cut(loader))
        yield from loader.load(make, wanted, largest_share, params.input_size)


def validation_batches(loader: Loader, split: Split, scale: int, size: int, batch_size: int) -> Iterator[Crops]:
    """The loader's share of a split, each image exactly once over all ranks, as central crops."""
    mine = np.arange(loader.rank, len(split), loader.world_size)

    def wanted(delivered: int) -> Iterator[np.ndarray]:
        for first in range(delivered * batch_size, len(mine), batch_size):
            yield mine[first : first + batch_size]

    return loader.load(CentreCrops(split, scale, _cut(loader)), wanted, batch_size, size)


def _cut(loader: Loader) -> Cut:
    return loader.decoder.crops if loader.decoder else roi.crops
