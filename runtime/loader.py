"""Batches, decoded ahead by processes that may die or hang, and copied to the device while it computes."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from runtime import environment
from runtime.batches import PREFETCH, Crops, Slots, as_crops
from runtime.distributed import Group
from runtime.errors import Interrupted, Problem, StorageFailure
from runtime.stopping import Stop, die_with_parent

log = logging.getLogger("vgg.workers")

HUNG_SECONDS = 900  # without a batch; longer than a store is waited for
LOOK_SECONDS = 1  # between two looks after decoding processes that send nothing
MAX_DEATHS = 3  # of decoding processes, in one run of a program

# (what is wanted, uint8 (n, size, size, 3) to write into: an array, or a tensor of a device that decodes itself)
# -> rows of batches.ROW, one for every image written
Make = Callable[[Any, Any], NDArray[np.void]]


def num_workers(device: torch.device, local_world_size: int) -> int:
    """Decoding processes of a rank.  On a CPU the network needs the cores itself; VGG_WORKERS overrides."""
    if (chosen := environment.WORKERS.get()) is not None:
        return chosen
    if device.type == "cpu":
        return 0
    return max(1, min(14, len(os.sched_getaffinity(0)) // local_world_size - 1))


class Decoder(Protocol):
    """What decodes JPEGs instead of the CPU: vgg.data.roi.DeviceDecoder."""

    device: torch.device

    def crops(self, images: Sequence[bytes], windows: Sequence[Any], into: Any) -> dict[int, str]: ...


@dataclass(frozen=True, kw_only=True)
class Loader:
    """How one rank gets its share of every global batch.

    workers: decoding processes; 0: decode in this process, when asked.  pin_memory: of batches on the host, for a GPU.
    decoder: what decodes, if not the CPU; images are on its device then, and `workers` has no effect.
    """

    rank: int = 0
    world_size: int = 1
    workers: int = 0
    pin_memory: bool = False
    decoder: Decoder | None = None

    @classmethod
    def of(cls, group: Group, decoder: Decoder | None) -> Loader:
        """The loader of a rank, with as many processes as its machine has cores for."""
        return cls(
            rank=group.rank, world_size=group.world_size, workers=num_workers(group.device, group.local_world_size),
            pin_memory=group.device.type == "cuda", decoder=decoder,
        )  # fmt: skip

    def load(self, make: Make, wanted: Callable[[int], Iterator[Any]], num_images: int, size: int) -> Iterator[Crops]:
        """What `make` makes of every element of `wanted(batches already delivered)`, in order.

        num_images: of a batch, at most.  size: of its images, pixels.
        A worker that dies is reported with its cause, and loading continues with the very next batch: nothing of it had
        a state.  Raises StorageFailure when that happens too often, or when no batch comes for HUNG_SECONDS.
        """
        if self.workers and self.decoder is None:
            batches = _by_workers(make, wanted, num_images, size, self.workers)
        else:
            device = self.decoder.device if self.decoder else None
            batches = _here(make, wanted(0), (num_images, size, size, 3), device)
        for crops in batches:
            yield Crops(*(t.pin_memory() if t.device.type == "cpu" else t for t in crops)) if self.pin_memory else crops


class Feed:
    """One batch in hand, the next one on its way: copied by a stream of its own, behind the computation.

    batches: on the host (pinned for a GPU), or already on the device.
    """

    def __init__(self, batches: Iterator[Crops], device: torch.device, stop: Stop) -> None:
        self._batches, self._device, self._stop = batches, device, stop
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._next: Crops | None = None
        self.waited_seconds = 0.0  # for batches; what of it the device spent idle is less

    def fetch(self) -> bool:
        """Get the next batch and start its copy.  False: there is none, or a stop was asked for while waiting."""
        began = time.monotonic()
        try:
            with self._stop.interrupts():
                crops = next(self._batches, None)
        except Interrupted:
            crops = None
        self.waited_seconds += time.monotonic() - began
        if crops is not None and self._stream:
            with torch.cuda.stream(self._stream):
                moved = [tensor.to(self._device, non_blocking=True) for tensor in crops]
                crops = Crops(*moved)._replace(numbers=crops.numbers)  # those the host reads
        self._next = crops
        return crops is not None

    def take(self) -> Crops:
        """The batch that fetch() brought."""
        crops, self._next = self._next, None
        assert crops is not None, "take() follows a fetch() that was true"
        if self._stream:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            for tensor in crops._replace(numbers=crops.labels):
                tensor.record_stream(computing)  # its memory is not the copying stream's to use again before that
        return crops


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
