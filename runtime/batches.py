"""A batch of crops, and the memory in which decoding processes hand batches over."""

from __future__ import annotations

import mmap
import weakref
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

ROW = np.dtype(  # of an image, as in Crops
    [("label", "<i8"), ("number", "<i8"), ("flip", "?"), ("colour", "<f4", 3), ("dropout", "<i8")]
)
PREFETCH = 2  # batches that a decoding process works ahead
SLOTS = PREFETCH + 3  # of a process: those ahead, one on its way, two that the consumer still looks at


class Crops(NamedTuple):
    """Some images of a batch.  images: uint8 (n, size, size, 3) RGB.  labels: int64 (n,).  numbers: rows of the index,
    int64 (n,).  flip: bool (n,).  colour: float32 (n, 3), standard normal, the three alphas of the RGB shift.  dropout:
    int64 (n,), 64 random bits that decide which outputs of fc6 and fc7 this image goes without."""

    images: torch.Tensor
    labels: torch.Tensor
    numbers: torch.Tensor
    flip: torch.Tensor
    colour: torch.Tensor
    dropout: torch.Tensor


def as_crops(images: torch.Tensor, rows: NDArray[np.void]) -> Crops:
    """images: (n, size, size, 3) uint8.  rows: (n,) of ROW, copied."""
    return Crops(images, *(torch.from_numpy(rows[name].copy()) for name in ROW.fields or ()))


class Slots:
    """Room for the batches of some decoding processes, made before they fork and used again and again.

    torch's own way, new shared memory for every batch, costs a process a tenth of its time (the kernel clears every
    page, and takes it back) and needs a large /dev/shm, which containers do not have.
    """

    def __init__(self, workers: int, num_images: int, size: int) -> None:
        self._shape = (num_images, size, size, 3)
        num_bytes = int(np.prod(self._shape)) + num_images * ROW.itemsize
        self._memory = [mmap.mmap(-1, max(1, num_bytes)) for _ in range(workers * SLOTS)]
        self._free = [list(range(first, first + SLOTS)) for first in range(0, workers * SLOTS, SLOTS)]

    def take(self, worker: int) -> int:
        """A slot for a process's next batch."""
        return self._free[worker].pop()  # the one freed last: a process touches no more of them than it must

    def arrays(self, slot: int) -> tuple[NDArray[np.uint8], NDArray[np.void]]:
        """Images (num_images, size, size, 3) uint8 and rows (num_images,) of ROW, to be written."""
        memory, num_pixels = self._memory[slot], int(np.prod(self._shape))
        images = np.frombuffer(memory, np.uint8, num_pixels).reshape(self._shape)
        return images, np.frombuffer(memory, ROW, self._shape[0], num_pixels)

    def deliver(self, slot: int, num_images: int) -> Crops:
        """The batch in a slot, which is free again as soon as nothing uses its images."""
        images, rows = self.arrays(slot)
        images = images[:num_images]
        free = self._free[slot // SLOTS]
        if not free:  # the consumer keeps its batches; decoding must go on
            images = images.copy()
            free.append(slot)
        else:
            # a tensor holds this very array until its storage goes, whatever views were made of it
            weakref.finalize(images, free.append, slot).atexit = False
        return as_crops(torch.from_numpy(images), rows[:num_images])
