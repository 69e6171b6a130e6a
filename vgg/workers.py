"""Processes that decode batches ahead of whoever consumes them, and what becomes of it when they die or hang."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from vgg.batches import PREFETCH, Crops, Slots, as_crops
from vgg.errors import Problem, StorageFailure, WrongParameters
from vgg.stopping import die_with_parent

log = logging.getLogger("vgg.workers")

HUNG_SECONDS = 900  # without a batch; longer than a store is waited for
LOOK_SECONDS = 1  # between two looks after decoding processes that send nothing
MAX_DEATHS = 3  # of decoding processes, in one run of a program

# (what is wanted, uint8 (n, size, size, 3) to write into: an array, or a tensor of a device that decodes itself)
# -> rows of batches.ROW, one for every image written
Make = Callable[[Any, Any], NDArray[np.void]]


def num_workers(device: torch.device, local_world_size: int) -> int:
    """Decoding processes of this rank.  On a CPU the network needs the cores itself; VGG_WORKERS overrules."""
    if chosen := os.environ.get("VGG_WORKERS"):
        if not chosen.isdigit():
            raise WrongParameters(f"VGG_WORKERS: {chosen!r} is no number of processes")
        return int(chosen)
    if device.type == "cpu":
        return 0
    return max(1, min(14, len(os.sched_getaffinity(0)) // local_world_size - 1))


def loaded(
    make: Make,
    wanted: Callable[[int], Iterator[Any]],
    num_images: int,
    size: int,
    workers: int,
    pin_memory: bool,
    device: torch.device | None = None,
) -> Iterator[Crops]:
    """What `make` makes of every element of `wanted(batches already delivered)`, in order.

    num_images: of a batch, at most.  size: of its images.  workers: decoding processes; 0: decode here, when asked.
    device: where images are decoded, if not by the CPU: here then, whatever `workers` says.
    A worker that dies is named with its cause, and loading goes on with the very next batch: nothing of it had a state.
    Raises StorageFailure when that happens too often, or when no batch comes for HUNG_SECONDS.
    """
    if workers and device is None:
        batches = _by_workers(make, wanted, num_images, size, workers)
    else:
        batches = _here(make, wanted(0), (num_images, size, size, 3), device)
    for crops in batches:
        yield Crops(*(t.pin_memory() if t.device.type == "cpu" else t for t in crops)) if pin_memory else crops


def _here(make: Make, wanted: Iterator[Any], shape: tuple[int, ...], device: torch.device | None) -> Iterator[Crops]:
    for item in wanted:
        images = torch.empty(shape, dtype=torch.uint8, device=device)
        rows = make(item, images if device else images.numpy())
        yield as_crops(images[: len(rows)], rows)


@dataclass(frozen=True)
class _Wanted:
    """A sampler: what is still to be loaded after the batches already delivered, and the slot where it shall go."""

    after: Callable[[int], Iterator[Any]]
    delivered: int
    slots: Slots
    workers: int

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, item in enumerate(self.after(self.delivered)):  # the DataLoader gives them out in turn
            yield self.slots.take(number % self.workers), item


@dataclass(frozen=True)
class _Made(Dataset[tuple[int, int] | Problem]):
    """Of (slot, what is wanted): the slot and how many images it holds now."""

    make: Make
    slots: Slots

    def __getitem__(self, task: tuple[int, Any]) -> tuple[int, int] | Problem:
        slot, item = task
        images, rows = self.slots.arrays(slot)
        try:
            made = self.make(item, images)
        except Problem as problem:  # raised in a worker process it would arrive as a traceback's text
            return problem
        rows[: len(made)] = made
        return slot, len(made)


def _by_workers(
    make: Make, wanted: Callable[[int], Iterator[Any]], num_images: int, size: int, workers: int
) -> Iterator[Crops]:
    delivered = deaths = 0
    while True:
        slots = Slots(workers, num_images, size)
        loader = DataLoader(
            _Made(make, slots),
            batch_size=None,  # an element of `wanted` is a batch already
            sampler=_Wanted(wanted, delivered, slots, workers),
            num_workers=workers,
            prefetch_factor=PREFETCH,
            multiprocessing_context="fork",  # the slots are memory of this process
            timeout=LOOK_SECONDS,
            worker_init_fn=lambda _: die_with_parent(),  # and let go of the locks and sockets that came with the fork
        )
        batches: Any = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # torch's handler would raise wherever the training loop happens to be; here the loss is noticed in order
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        waited = 0.0
        while True:
            try:
                item = next(batches, None)
            except RuntimeError as error:  # of a timeout, which tells nothing yet, or of workers that are gone
                lost = _causes(batches)
                if not lost and "timed out" not in str(error):
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
            yield slots.deliver(*item)
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


def _causes(batches: Any) -> str:
    """What the dead workers of a DataLoader's iterator died of; empty if none did."""
    codes = [worker.exitcode for worker in getattr(batches, "_workers", [])]
    names = [signal.Signals(-code).name if code < 0 else f"exit code {code}" for code in codes if code]
    hint = " (as when memory runs out)" if "SIGKILL" in names else ""
    return ", ".join(names) + hint
