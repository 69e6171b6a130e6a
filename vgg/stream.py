"""From an index to batches: which images a step trains on, and their crops.

The order of an epoch is a pure function of (seed, epoch); the scale, crop, flip and colour shift of an image are a pure
function of (seed, epoch, image).  Batches run on across the border of an epoch, so every batch is full and no image is
dropped.  A position in training is therefore one integer, the step, and any number of ranks and workers, before and
after any restart, sees the same global batches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vgg import draws
from vgg.errors import Problem, WrongParameters
from vgg.images import Pixels, centre_window, crop, crop_window
from vgg.index import Split
from vgg.params.train import TrainParams

BLOCK_SHARDS = 64  # shards that are shuffled together: what a node must hold when shards come from afar


class Crops(NamedTuple):
    """Some images of a batch.  images: uint8 (n, size, size, 3) RGB.  labels: int64 (n,).  numbers: rows of the index,
    int64 (n,).  flip: bool (n,).  colour: float32 (n, 3), standard normal, the three alphas of the RGB shift."""

    images: torch.Tensor
    labels: torch.Tensor
    numbers: torch.Tensor
    flip: torch.Tensor
    colour: torch.Tensor


@dataclass(frozen=True)
class Order:
    """The endless order of a training set.  shards: shard of every image, as in the index."""

    shards: np.ndarray
    seed: int

    def epoch(self, epoch: int) -> np.ndarray:
        """All image numbers, shuffled: shards first, then the images inside every block of BLOCK_SHARDS shards."""
        num_shards = int(self.shards.max()) + 1
        rank_of_shard = np.empty(num_shards, np.int64)
        rank_of_shard[draws.permutation("order/shards", num_shards, self.seed, epoch)] = np.arange(num_shards)
        block = rank_of_shard[self.shards] // BLOCK_SHARDS
        return np.lexsort((draws.bits("order/images", self.seed, epoch, np.arange(len(self.shards))), block))

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


class _TrainingCrops(Dataset[Crops | Problem]):
    """A batch's crops, by (image numbers, epochs)."""

    def __init__(self, split: Split, params: TrainParams, max_pixels: int) -> None:
        self.split, self.params, self.max_pixels = split, params, max_pixels

    def __getitem__(self, wanted: tuple[np.ndarray, np.ndarray]) -> Crops | Problem:
        try:
            return self.crops(*wanted)
        except Problem as problem:  # raised in a worker process it would arrive as a traceback's text
            return problem

    def crops(self, numbers: np.ndarray, epochs: np.ndarray) -> Crops:
        seed, (smallest, largest) = self.params.seed, self.params.scale_range
        scale = smallest + (draws.uniform("scale", seed, epochs, numbers) * (largest - smallest + 1)).astype(int)
        x, y = draws.uniform("crop/x", seed, epochs, numbers), draws.uniform("crop/y", seed, epochs, numbers)
        flip = (draws.uniform("flip", seed, epochs, numbers) < 0.5) & self.params.flip
        colour = np.stack([draws.normal(f"colour/{i}", seed, epochs, numbers) for i in range(3)], -1)
        size = self.params.input_size
        images = np.empty((len(numbers), size, size, 3), np.uint8)
        for i, number in enumerate(numbers):
            image = self.split.image(int(number), self.max_pixels)
            window = crop_window(image.width, image.height, int(scale[i]), size, float(x[i]), float(y[i]))
            images[i] = crop(image, window, size)
        return _crops(self.split, images, numbers, flip, colour.astype(np.float32))


class _CentreCrops(Dataset[Crops | Problem]):
    """The central crops of some images at one scale, by image numbers."""

    def __init__(self, split: Split, scale: int, size: int, max_pixels: int) -> None:
        self.split, self.scale, self.size, self.max_pixels = split, scale, size, max_pixels

    def __getitem__(self, numbers: np.ndarray) -> Crops | Problem:
        try:
            return self.crops(numbers)
        except Problem as problem:
            return problem

    def crops(self, numbers: np.ndarray) -> Crops:
        images = np.empty((len(numbers), self.size, self.size, 3), np.uint8)
        for i, number in enumerate(numbers):
            image = self.split.image(int(number), self.max_pixels)
            images[i] = crop(image, centre_window(image.width, image.height, self.scale, self.size), self.size)
        return _crops(
            self.split, images, numbers, np.zeros(len(numbers), bool), np.zeros((len(numbers), 3), np.float32)
        )


def _crops(split: Split, images: Pixels, numbers: np.ndarray, flip: np.ndarray, colour: np.ndarray) -> Crops:
    labels = split.rows["label"][numbers].astype(np.int64)
    return Crops(*(torch.from_numpy(a) for a in (images, labels, numbers, flip, colour)))


def num_workers(device: torch.device, local_world_size: int) -> int:
    """Decoding processes of this rank.  On a CPU the network needs the cores itself; VGG_WORKERS overrules."""
    if chosen := os.environ.get("VGG_WORKERS"):
        if not chosen.isdigit():
            raise WrongParameters(f"VGG_WORKERS: {chosen!r} is no number of processes")
        return int(chosen)
    if device.type == "cpu":
        return 0
    return max(1, min(14, len(os.sched_getaffinity(0)) // local_world_size - 1))


def training_batches(
    split: Split,
    params: TrainParams,
    max_pixels: int,
    rank: int,
    world_size: int,
    first_step: int,
    num_steps: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[Crops]:
    """This rank's share of every global batch from first_step on: every world_size-th image, beginning with rank."""
    order = Order(np.asarray(split.rows["shard"]), params.seed)

    class Wanted:
        def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for numbers, epochs in order.batches(params.batch_size, first_step, num_steps):
                yield numbers[rank::world_size], epochs[rank::world_size]

    return _loaded(_TrainingCrops(split, params, max_pixels), Wanted(), workers, pin_memory)


def validation_batches(
    split: Split,
    scale: int,
    size: int,
    max_pixels: int,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[Crops]:
    """This rank's share of a split, each image exactly once over all ranks, as central crops."""
    mine = np.arange(rank, len(split), world_size)
    wanted = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return _loaded(_CentreCrops(split, scale, size, max_pixels), wanted, workers, pin_memory)


def _loaded(dataset: Dataset[Crops | Problem], wanted: object, workers: int, pin_memory: bool) -> Iterator[Crops]:
    # batch_size None: an element of `wanted` is already a batch, and no element is copied again
    loader = DataLoader(dataset, batch_size=None, sampler=wanted, num_workers=workers, pin_memory=pin_memory)  # type: ignore[arg-type]
    for item in loader:
        if isinstance(item, Problem):
            raise item
        yield item
