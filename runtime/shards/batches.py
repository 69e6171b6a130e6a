"""Batches of crops, and the shared memory in which decoding processes deliver them."""

from __future__ import annotations

import mmap
import weakref
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

ROW = np.dtype(  # one image; the fields are those of Crops
    [("label", "<i8"), ("number", "<i8"), ("flip", "?"), ("colour", "<f4", 3), ("dropout", "<i8"), ("box", "<f4", 4)]
)
PREFETCH = 2  # batches that a decoding process prepares in advance
SLOTS = PREFETCH + 3  # per process: the prefetched ones, one in transit, two still used by the consumer


class Crops(NamedTuple):
    """A batch, or part of one.

    images: uint8 (n, size, size, 3) RGB; in evaluation (n, bytes).
    labels: int64 (n,).  numbers: int64 (n,), rows of the index.
    flip: bool (n,).  colour: float32 (n, 3), standard normal, the three alphas of the RGB shift.
    dropout: int64 (n,), 64 random bits per image that select the outputs of fc6 and fc7 to drop.
    boxes: float32 (n, 4), what localisation is to find; 0 in classification.
    """

    images: torch.Tensor
    labels: torch.Tensor
    numbers: torch.Tensor
    flip: torch.Tensor
    colour: torch.Tensor
    dropout: torch.Tensor
    boxes: torch.Tensor


def as_crops(images: torch.Tensor, rows: NDArray[np.void]) -> Crops:
    """A batch from images, uint8 (n, …), and rows, (n,) of ROW.  The rows are copied."""
    return Crops(images, *(torch.from_numpy(rows[name].copy()) for name in ROW.fields or ()))


class Slots:
    """Shared memory for the batches of the decoding processes, allocated before they fork and reused.

    torch allocates new shared memory for every batch.  That costs a process a tenth of its time, because the kernel
    clears every page, and it needs a large /dev/shm, which containers do not have.
    shape: of the bytes of an image.
    """

    def __init__(self, workers: int, num_images: int, shape: tuple[int, ...]) -> None:
        self._shape = (num_images, *shape)
        num_bytes = int(np.prod(self._shape)) + num_images * ROW.itemsize
        self._memory = [mmap.mmap(-1, max(1, num_bytes)) for _ in range(workers * SLOTS)]
        self._free = [list(range(first, first + SLOTS)) for first in range(0, workers * SLOTS, SLOTS)]

    def take(self, worker: int) -> int:
        """A slot for the next batch of a process."""
        return self._free[worker].pop()  # the one freed last, so that a process touches as few slots as possible

    def arrays(self, slot: int) -> tuple[NDArray[np.uint8], NDArray[np.void]]:
        """Writable views of a slot: images, uint8 (num_images, *shape), and rows, (num_images,) of ROW."""
        memory, num_pixels = self._memory[slot], int(np.prod(self._shape))
        images = np.frombuffer(memory, np.uint8, num_pixels).reshape(self._shape)
        return images, np.frombuffer(memory, ROW, self._shape[0], num_pixels)

    def deliver(self, slot: int, num_images: int) -> Crops:
        """The batch in a slot.  The slot is free again as soon as nothing uses its images."""
        images, rows = self.arrays(slot)
        images = images[:num_images]
        free = self._free[slot // SLOTS]
        if not free:  # the consumer keeps its batches; decoding must continue
            images = images.copy()
            free.append(slot)
        else:
            # tensors and their views keep a reference to this array until their storage is freed
            weakref.finalize(images, free.append, slot).atexit = False
        return as_crops(torch.from_numpy(images), rows[:num_images])
