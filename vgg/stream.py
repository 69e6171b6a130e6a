"""From an index to batches: which images a step trains on, and their crops.

The order of an epoch is a pure function of (seed, epoch); the scale, crop, flip and colour shift of an image are a pure
function of (seed, epoch, image).  Batches run on across the border of an epoch, so every batch is full and no image is
dropped.  A position in training is therefore one integer, the step, and any number of ranks and workers, before and
after any restart, sees the same global batches.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vgg import ahead, draws, roi
from vgg.errors import Problem, Refused, StorageFailure, WrongParameters
from vgg.images import Window, centre_window, crop_window
from vgg.index import BLOCK_SHARDS, Split
from vgg.params.train import TrainParams

log = logging.getLogger("vgg.stream")

HUNG_SECONDS = 900  # without a batch; longer than a store is waited for
LOOK_SECONDS = 5  # between two looks after decoding processes that send nothing
MAX_DEATHS = 3  # of decoding processes, in one run of a program


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


class _TrainingCrops(Dataset[Crops | Problem]):
    """A batch's crops, by (image numbers, epochs)."""

    def __init__(self, split: Split, params: TrainParams) -> None:
        self.split, self.params = split, params

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
        sides = zip(
            self.split.rows["width"][numbers].tolist(), self.split.rows["height"][numbers].tolist(), strict=True
        )
        windows = [crop_window(w, h, int(scale[i]), size, float(x[i]), float(y[i])) for i, (w, h) in enumerate(sides)]
        return _crops(self.split, numbers, windows, size, flip, colour.astype(np.float32))


class _CentreCrops(Dataset[Crops | Problem]):
    """The central crops of some images at one scale, by image numbers."""

    def __init__(self, split: Split, scale: int, size: int) -> None:
        self.split, self.scale, self.size = split, scale, size

    def __getitem__(self, numbers: np.ndarray) -> Crops | Problem:
        try:
            return self.crops(numbers)
        except Problem as problem:
            return problem

    def crops(self, numbers: np.ndarray) -> Crops:
        sides = zip(
            self.split.rows["width"][numbers].tolist(), self.split.rows["height"][numbers].tolist(), strict=True
        )
        windows = [centre_window(w, h, self.scale, self.size) for w, h in sides]
        plain = np.zeros(len(numbers), bool), np.zeros((len(numbers), 3), np.float32)
        return _crops(self.split, numbers, windows, self.size, *plain)


def _crops(
    split: Split, numbers: np.ndarray, windows: list[Window], size: int, flip: np.ndarray, colour: np.ndarray
) -> Crops:
    """Read, check and decode.  Raises Refused, naming shard and key, for an image that is not what the index says."""
    images = np.empty((len(numbers), size, size, 3), np.uint8)
    bad = roi.crops([split.read(int(number)) for number in numbers], windows, images)
    for position, reason in bad.items():
        raise Refused(f"{split.address}/{split.where(int(numbers[position]))}: {reason}. Shard again.")
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
    rank: int,
    world_size: int,
    first_step: int,
    num_steps: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[Crops]:
    """This rank's share of every global batch from first_step on: every world_size-th image, beginning with rank."""
    order = Order(np.asarray(split.rows["shard"]), params.seed)

    with ahead.fetching(split, order, params.batch_size, first_step, num_steps) as asked_for:

        def wanted(delivered: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            first = first_step + delivered
            for step, (numbers, epochs) in enumerate(order.batches(params.batch_size, first, num_steps), first):
                asked_for(step)
                yield numbers[rank::world_size], epochs[rank::world_size]

        yield from _loaded(_TrainingCrops(split, params), wanted, workers, pin_memory)


def validation_batches(
    split: Split,
    scale: int,
    size: int,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[Crops]:
    """This rank's share of a split, each image exactly once over all ranks, as central crops."""
    mine = np.arange(rank, len(split), world_size)

    def wanted(delivered: int) -> Iterator[np.ndarray]:
        for first in range(delivered * batch_size, len(mine), batch_size):
            yield mine[first : first + batch_size]

    return _loaded(_CentreCrops(split, scale, size), wanted, workers, pin_memory)


@dataclass(frozen=True)
class _Wanted:
    """A sampler: what is still to be loaded after the batches already delivered."""

    after: Callable[[int], Iterator[Any]]
    delivered: int

    def __iter__(self) -> Iterator[Any]:
        return self.after(self.delivered)


def _loaded(
    dataset: Dataset[Crops | Problem], wanted: Callable[[int], Iterator[Any]], workers: int, pin_memory: bool
) -> Iterator[Crops]:
    """Batches in the order of `wanted(batches already delivered)`, decoded ahead by worker processes.

    A worker that dies is named with its cause, and loading goes on with the very next batch: nothing of it had a state.
    Raises StorageFailure when that happens too often, or when no batch comes for HUNG_SECONDS.
    """
    delivered = deaths = 0
    while True:
        # batch_size None: an element of `wanted` is already a batch, and no element is copied again
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=_Wanted(wanted, delivered),
            num_workers=workers,
            pin_memory=pin_memory,
            timeout=LOOK_SECONDS if workers else 0,
        )
        batches: Any = iter(loader)
        if workers and threading.current_thread() is threading.main_thread():
            # torch's handler would raise wherever the training loop happens to be; here the loss is noticed in order
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        waited = 0.0
        while True:
            try:
                item = next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:
                # a timeout, which tells nothing yet; workers that are gone; the socket of one that died while it
                # handed a batch over, a moment before it counts as dead; or an error of the data set
                timed_out = "timed out" in str(error)
                lost = _causes(batches, patience=0.0 if timed_out else 1.0)
                if not lost and not timed_out:
                    raise
                waited += LOOK_SECONDS
                if lost or waited >= HUNG_SECONDS:
                    break
                continue
            if item is None:
                return
            if isinstance(item, Problem):
                raise item
            delivered, waited = delivered + 1, 0.0
            yield item
        del batches  # ends the workers
        if not lost:
            raise StorageFailure(
                f"no batch came from the {workers} decoding processes for {HUNG_SECONDS} s: the storage they read "
                "from, or the machine, hangs. Training goes on from its last checkpoint when run again."
            )
        deaths += 1
        if deaths > MAX_DEATHS:
            raise StorageFailure(
                f"decoding processes died {deaths} times, last of {lost}. Run again; if memory is short, lower "
                "VGG_WORKERS."
            )
        log.warning("a decoding process died of %s; going on with the next batch", lost)


def _causes(batches: Any, patience: float) -> str:
    """What the dead workers of a DataLoader's iterator died of; empty if none did within `patience` seconds."""
    workers = getattr(batches, "_workers", [])
    until = time.monotonic() + patience
    while not any(worker.exitcode for worker in workers) and time.monotonic() < until:
        time.sleep(0.01)
    codes = [worker.exitcode for worker in workers]
    names = [signal.Signals(-code).name if code < 0 else f"exit code {code}" for code in codes if code]
    hint = " (as when memory runs out)" if "SIGKILL" in names else ""
    return ", ".join(names) + hint
