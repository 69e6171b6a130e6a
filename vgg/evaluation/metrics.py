"""Exact metrics on any number of ranks, from sums over images instead of averages of averages."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def ranks_of_labels(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The number of classes ranked before the label, int64 (n,): 0 is a top-1 hit, below 5 a top-5 hit.

    scores: float (n, classes), finite.  labels: int64 (n,).  Equal scores are ordered by class index, so the result is
    unique.  Raises ValueError for other shapes, which would otherwise broadcast silently.
    """
    if scores.ndim != 2 or labels.shape != (len(scores),):
        raise ValueError(
            f"scores (n, classes) and labels (n,) expected, got {tuple(scores.shape)}, {tuple(labels.shape)}"
        )
    own = scores.gather(1, labels[:, None])
    classes = torch.arange(scores.shape[1], device=scores.device)
    return ((scores > own) | ((scores == own) & (classes < labels[:, None]))).sum(1)


@dataclass
class Counts:
    """Sums over images.  total: float64 (4,): images, how many are right in two senses, sum of the loss.

    Counts are integers far below 2^53 and therefore exact in float64.  A single tensor needs one all-reduce and one
    transfer from the device.
    """

    total: torch.Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> Counts:
        return cls(torch.zeros(4, dtype=torch.float64, device=device))

    def add(self, loss: torch.Tensor, num_images: int | torch.Tensor, right: torch.Tensor) -> None:
        """Add images, without waiting for the device.  loss: (), summed over them.  right: (2,)."""
        self.total[1:3] += right
        self.total[3] += loss.detach()
        self.total[0] += num_images

    def values(self, errors: tuple[str, str]) -> dict[str, float]:
        """num_images, the two errors (fractions) under these names, loss (mean).  Waits for the device."""
        images, first, second, loss = self.total.tolist()
        divisor = images or 1.0
        return {
            "num_images": int(images),
            errors[0]: (images - first) / divisor,
            errors[1]: (images - second) / divisor,
            "loss": loss / divisor,
        }
