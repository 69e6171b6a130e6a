"""Fusion (§4.4): the average of the posteriors of several networks, as their evaluations have kept them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.errors import Refused
from vgg.evaluation.modes import Mode
from vgg.evaluation.parts import Parts
from vgg.evaluation.predictions import row_type, rows_of

ROWS = 4096  # of posteriors that are sorted at a time


@dataclass(frozen=True)
class Partner:
    """Another evaluation.  where: for messages.  keys: of its images.  posteriors: float16 (images, classes)."""

    where: str
    keys: NDArray[np.bytes_]
    classes_sha256: str
    posteriors: NDArray[np.float16]

    def joined(self, keys: NDArray[np.bytes_], classes_sha256: str) -> Partner:
        """This evaluation, its images in the order of `keys`.

        Raises Refused if it is of other classes, or if it lacks an image or has one more.
        """
        if self.classes_sha256 != classes_sha256:
            raise Refused(f"{self.where}: is of other classes, so it cannot be fused with this evaluation.")
        order = np.argsort(self.keys, kind="stable")
        place = np.searchsorted(self.keys, keys, sorter=order)
        found = order[np.minimum(place, len(order) - 1)] if len(order) else np.zeros(0, np.int64)
        same = len(order) and np.array_equal(self.keys[found], keys) and len(self.keys) == len(keys)
        if not same:
            missing = np.setdiff1d(keys, self.keys)
            example = f" It lacks {len(missing):,}, as {missing[0].decode(errors='replace')}." if len(missing) else ""
            raise Refused(
                f"{self.where}: is of other images ({len(self.keys):,}, here {len(keys):,}).{example} "
                "Evaluate both networks on the same shards."
            )
        return Partner(self.where, keys, classes_sha256, self.posteriors[found])


def fused(
    rows: NDArray[np.void], parts: Parts, modes: Sequence[Mode], partners: Sequence[Partner]
) -> tuple[NDArray[np.void], Callable[[int], NDArray[np.float16]], Mode]:
    """Rows and posteriors with one more mode: the average of the last mode and the partners, all counted equally."""
    last = len(modes) - 1
    together = parts.posteriors(last).astype(np.float32)
    for partner in partners:
        together += partner.posteriors
    together /= 1 + len(partners)
    mode = Mode("fusion", (), False, ())
    joined = np.zeros(len(rows), row_type(len(modes) + 1))
    joined["number"], joined["label"], joined["modes"][:, : len(modes)] = rows["number"], rows["label"], rows["modes"]
    numbers, labels = rows["number"].astype(np.int64), rows["label"].astype(np.int64)
    for first in range(0, len(rows), ROWS):
        part = slice(first, first + ROWS)
        own = rows_of(numbers[part], labels[part], torch.from_numpy(together[part])[:, None])
        joined["modes"][part, -1] = own["modes"][:, 0]
    kept = together.astype(np.float16)
    return joined, lambda number: kept if number == len(modes) else parts.posteriors(number), mode
