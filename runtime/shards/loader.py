"""Loading: worker processes decode batches in advance; the next batch is copied while the device computes.

Workers that die are replaced, workers that hang are detected.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from runtime import environment
from runtime.distributed import Group
from runtime.errors import Interrupted, Problem, StorageFailure
from runtime.shards.batches import PREFETCH, Crops, Slots, as_crops
from runtime.stopping import Stop, die_with_parent

log = logging.getLogger("vgg.workers")

HUNG_SECONDS = 900  # without a batch; longer than the patience with an object store
POLL_SECONDS = 1  # interval at which silent worker processes are checked
MAX_DEATHS = 3  # of worker processes, per call of Loader.load

# Makes a batch: (item of `wanted`, output: uint8 (n, *shape), an array, or a tensor if a device decodes)
# -> rows of batches.ROW, one per image written
Make = Callable[[Any, Any], NDArray[np.void]]


def num_workers(device: torch.device, local_world_size: int) -> int:
    """Worker processes of a rank.  On a CPU: 0, because the network needs the cores; VGG_WORKERS overrides it."""
    if (chosen := environment.WORKERS.get()) is not None:
        return chosen
    if device.type == "cpu":
        return 0
    return max(1, min(14, len(os.sched_getaffinity(0)) // local_world_size - 1))


class Decoder(Protocol):
    """Decodes JPEGs instead of the CPU: vgg.data.roi.DeviceDecoder."""

    device: torch.device

    def crops(self, images: Sequence[bytes], windows: Sequence[Any], into: Any) -> dict[int, str]: ...


@dataclass(frozen=True, kw_only=True)
class Loader:
    """How one rank loads its share of every global batch.

    workers: decoding processes; 0: decode in this process, on demand.  pin_memory: put batches in pinned memory, for a
    GPU.  decoder: decodes instead of the CPU; images are then on its device, and `workers` has no effect.
    """

    rank: int = 0
    world_size: int = 1
    workers: int = 0
    pin_memory: bool = False
    decoder: Decoder | None = None

    @classmethod
    def of(cls, group: Group, decoder: Decoder | None) -> Loader:
        """The loader of a rank, with num_workers() processes."""
        return cls(
            rank=group.rank, world_size=group.world_size, workers=num_workers(group.device, group.local_world_size),
            pin_memory=group.device.type == "cuda", decoder=decoder,
        )  # fmt: skip

    def load(
        self, make: Make, wanted: Callable[[int], Iterator[Any]], num_images: int, shape: tuple[int, ...]
    ) -> Iterator[Crops]:
        """The batches that `make` makes from the elements of `wanted(number of batches delivered)`, in order.

        num_images: maximum per batch.  shape: of an image's bytes, (size, size, 3) for crops.
        If a worker dies, the cause is logged and loading continues with the next batch; workers have no state.
        Raises StorageFailure after more than MAX_DEATHS deaths, or without a batch for HUNG_SECONDS.
        """
        if not self.workers or self.decoder:
            device = self.decoder.device if self.decoder else None
            for item in wanted(0):
                images = torch.empty((num_images, *shape), dtype=torch.uint8, device=device)
                rows = make(item, images if device else images.numpy())
                yield self._pinned(as_crops(images[: len(rows)], rows))
            return
        delivered = deaths = 0
        while True:
            slots = Slots(self.workers, num_images, shape)
            batches = _start(_Maker(make, slots), _Wanted(wanted, delivered, slots, self.workers), self.workers)
            waited = 0.0
            try:
                while True:
                    try:
                        item = next(batches, None)
                    except RuntimeError:  # of the DataLoader: timeout or a dead worker; those of _Maker come as values
                        waited += POLL_SECONDS
                        if (lost := _causes_of_death(batches)) or waited >= HUNG_SECONDS:
                            break
                        continue
                    if item is None:
                        return
                    if isinstance(item, Problem):
                        raise item
                    if isinstance(item, _Failure):
                        raise AssertionError(f"in a decoding process:\n{item.traceback}")
                    delivered, waited = delivered + 1, 0.0
                    yield self._pinned(slots.deliver(*item))
            finally:
                del batches  # stops the workers now: as garbage of a traceback they would be waited for, 5 s each
            if not lost:
                raise StorageFailure(
                    f"no batch from the {self.workers} decoding processes for {HUNG_SECONDS} s: storage or machine "
                    "hangs. Run again to continue from the last checkpoint."
                )
            deaths += 1
            if deaths > MAX_DEATHS:
                raise StorageFailure(
                    f"decoding processes died {deaths} times, the last of {lost}. Run again; if memory is short, lower "
                    "VGG_WORKERS."
                )
            log.warning("a decoding process died of %s; continuing with the next batch", lost)

    def _pinned(self, crops: Crops) -> Crops:
        """The batch in pinned memory, if pin_memory is set."""
        if not self.pin_memory:
            return crops
        return Crops(*(t.pin_memory() if t.device.type == "cpu" else t for t in crops))


class Feed:
    """Copies the next batch on a separate CUDA stream while the device computes on the current one.

    batches: on the host (pinned for a GPU), or already on the device.
    """

    def __init__(self, batches: Iterator[Crops], device: torch.device, stop: Stop) -> None:
        self._batches, self._device, self._stop = batches, device, stop
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._next: Crops | None = None
        self.waited_seconds = 0.0  # of the host, for batches; the device is idle for less than that

    def fetch(self) -> bool:
        """Get the next batch and start its copy.  False: there are no more, or a stop was requested meanwhile."""
        start = time.monotonic()
        try:
            with self._stop.interrupts():
                crops = next(self._batches, None)
        except Interrupted:
            crops = None
        self.waited_seconds += time.monotonic() - start
        if crops is not None and self._stream:
            with torch.cuda.stream(self._stream):
                moved = [tensor.to(self._device, non_blocking=True) for tensor in crops]
                crops = Crops(*moved)._replace(numbers=crops.numbers)  # the host reads these
        self._next = crops
        return crops is not None

    def close(self) -> None:
        """Stop the processes that make batches."""
        if isinstance(self._batches, Generator):
            self._batches.close()

    def take(self) -> Crops:
        """The batch of the last fetch()."""
        crops, self._next = self._next, None
        assert crops is not None, "call take() after fetch() returned True"
        if self._stream:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            for tensor in crops._replace(numbers=crops.labels):
                tensor.record_stream(computing)  # the copy stream must not reuse its memory before that
        return crops


@dataclass(frozen=True)
class _Wanted:
    """A sampler: (slot, item) for every batch after those already delivered."""

    after: Callable[[int], Iterator[Any]]
    delivered: int
    slots: Slots
    workers: int

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, item in enumerate(self.after(self.delivered)):  # the DataLoader assigns them round-robin
            yield self.slots.take(number % self.workers), item


class _Failure(NamedTuple):
    """An unexpected exception in a worker, as text."""

    traceback: str


@dataclass(frozen=True)
class _Maker(Dataset[tuple[int, int] | Problem | _Failure]):
    """In a worker: fills the slot of (slot, item); returns (slot, number of images).

    Exceptions are returned as values.  If raised, they would arrive as a RuntimeError, which the DataLoader also raises
    for a timeout and for a dead worker.
    """

    make: Make
    slots: Slots

    def __getitem__(self, task: tuple[int, Any]) -> tuple[int, int] | Problem | _Failure:
        slot, item = task
        images, rows = self.slots.arrays(slot)
        try:
            made = self.make(item, images)
        except Problem as problem:
            return problem
        except Exception:
            return _Failure(traceback.format_exc())
        rows[: len(made)] = made
        return slot, len(made)


def _start(maker: _Maker, wanted: _Wanted, workers: int) -> Any:
    """The iterator of a DataLoader whose workers are running."""
    loader = DataLoader(
        maker,
        batch_size=None,  # an element of `wanted` is a batch already
        sampler=wanted,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        multiprocessing_context="fork",  # workers share the slots with this process
        timeout=POLL_SECONDS,
        worker_init_fn=lambda _: die_with_parent(),  # so that the inherited locks and sockets are released
    )
    batches = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's handler would raise anywhere in the training loop; load() detects deaths itself
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches


def _causes_of_death(batches: Any) -> str:
    """Why the dead workers of a DataLoader's iterator died; empty if all are alive."""
    codes = [worker.exitcode for worker in getattr(batches, "_workers", [])]
    names = [signal.Signals(-code).name if code < 0 else f"exit code {code}" for code in codes if code]
    hint = " (as when memory runs out)" if "SIGKILL" in names else ""
    return ", ".join(names) + hint
