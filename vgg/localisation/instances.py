"""The boxes of the images of a split, by the rows of its index."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vgg import draws


@dataclass(frozen=True)
class Instances:
    """Boxes of every image's own class.

    first: int64 (images + 1,); those of image i are boxes[first[i] : first[i + 1]].  boxes: float64 (n, 4), half-open,
    pixels of the source.
    """

    first: NDArray[np.int64]
    boxes: NDArray[np.float64]

    @property
    def has_box(self) -> NDArray[np.bool_]:
        """bool (images,)."""
        return np.diff(self.first) > 0

    def of(self, number: int) -> NDArray[np.float64]:
        """The boxes of an image, (k, 4)."""
        return self.boxes[self.first[number] : self.first[number + 1]]

    def of_images(self, chosen: NDArray[np.bool_]) -> Instances:
        """Those of the chosen images, which are numbered anew.  chosen: bool (images,)."""
        counts = np.diff(self.first)
        kept = self.boxes[np.repeat(chosen, counts)]
        return Instances(np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[chosen])]), kept)

    def largest(self) -> Instances:
        """Only the largest box of every image, the first of equal ones."""
        size = (self.boxes[:, 2] - self.boxes[:, 0]) * (self.boxes[:, 3] - self.boxes[:, 1])
        kept = [first + int(size[first:last].argmax()) for first, last in pairwise(self.first.tolist()) if last > first]
        has_box = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.has_box)])
        return Instances(has_box, self.boxes[kept])

    def drawn(self, seed: int, epochs: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """One box of each image, (n, 4), a function of (seed, epoch, image).  Every image must have one."""
        counts = self.first[numbers + 1] - self.first[numbers]
        chosen = (draws.uniform("box", seed, epochs, numbers) * counts).astype(np.int64)
        drawn: NDArray[np.float64] = self.boxes[self.first[numbers] + chosen]
        return drawn
