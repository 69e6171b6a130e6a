"""Predictions of every image, and the numbers that summarise them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vgg.evaluation.metrics import ranks_of_labels

TOP = 5
CALIBRATION_BINS = 15  # as in Guo et al. 2017 (arXiv 1706.04599)
Z = 1.959963984540054  # of a two-sided interval of 95 %


def row_type(num_modes: int) -> np.dtype[Any]:
    """Type of a prediction: number, label; per mode the TOP best classes, their probabilities, rank and loss.

    rank: of the label; 0 is a top-1 hit.  loss: nats.  Unused entries of classes are -1.
    """
    mode = np.dtype([("classes", "<i4", (TOP,)), ("probabilities", "<f4", (TOP,)), ("rank", "<i4"), ("loss", "<f4")])
    return np.dtype([("number", "<u4"), ("label", "<u4"), ("modes", mode, (num_modes,))])


def rows_of(numbers: NDArray[np.int64], labels: NDArray[np.int64], posteriors: torch.Tensor) -> NDArray[np.void]:
    """Rows of row_type.  posteriors: float32 (n, modes, classes), finite."""
    rows = np.zeros(len(numbers), row_type(posteriors.shape[1]))
    rows["number"], rows["label"] = numbers, labels
    truth = torch.from_numpy(labels)
    for mode, probabilities in enumerate(posteriors.unbind(1)):
        # stable, so that equal probabilities are ordered by class, as in ranks_of_labels
        best = torch.sort(probabilities, dim=1, descending=True, stable=True)
        count = min(TOP, probabilities.shape[1])
        rows["modes"]["classes"][:, mode] = -1
        rows["modes"]["classes"][:, mode, :count] = best.indices[:, :count].numpy()
        rows["modes"]["probabilities"][:, mode, :count] = best.values[:, :count].numpy()
        rows["modes"]["rank"][:, mode] = ranks_of_labels(probabilities, truth).numpy()
        own = probabilities.gather(1, truth[:, None]).squeeze(1)
        rows["modes"]["loss"][:, mode] = -own.clamp_min(torch.finfo(torch.float32).tiny).log().numpy()
    return rows


def summary(
    rows: NDArray[np.void], names: Sequence[str], costs: NDArray[np.uint8] | None = None
) -> dict[str, dict[str, Any]]:
    """The metrics of every mode, by name.  rows: of row_type, one per image.

    top1_error, top5_error: fractions, with their 95 % intervals (Wilson).  loss: negative log-likelihood, nats.
    calibration_error: see below.  hierarchical_error: if costs, uint8 (classes, classes), are known: mean cost of the
    best of the five classes, as ILSVRC-2010 scored.
    """
    results = {}
    for number, name in enumerate(names):
        mode = rows["modes"][:, number]
        top1, top5 = int((mode["rank"] >= 1).sum()), int((mode["rank"] >= TOP).sum())
        results[name] = {
            "num_images": len(rows),
            "top1_error": top1 / len(rows),
            "top1_interval": wilson(top1, len(rows)),
            "top5_error": top5 / len(rows),
            "top5_interval": wilson(top5, len(rows)),
            "loss": float(mode["loss"].astype(np.float64).mean()),
            "calibration_error": calibration_error(mode["probabilities"][:, 0], mode["rank"] == 0),
        }
        if costs is not None:
            results[name]["hierarchical_error"] = hierarchical_error(rows["label"], mode["classes"], costs)
    return results


def wilson(count: int, total: int) -> list[float]:
    """The 95 % interval of a fraction (Wilson 1927): [lower, upper]."""
    share, spread = count / total, Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # at 0 and 1 one end is exact
    return [0.0 if count == 0 else centre - half, 1.0 if count == total else centre + half]


def calibration(confidence: NDArray[np.float32], right: NDArray[np.bool_]) -> list[tuple[int, float, float]]:
    """(images, mean confidence, accuracy) of CALIBRATION_BINS equal intervals of confidence.

    confidence: of the best class, in [0, 1].  Empty intervals are (0, 0, 0).
    """
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    sums = [
        np.bincount(bins, values.astype(np.float64), CALIBRATION_BINS) / np.maximum(counts, 1)
        for values in (confidence, right)
    ]
    return [(int(n), float(mean), float(hits)) for n, mean, hits in zip(counts, *sums, strict=True)]


def calibration_error(confidence: NDArray[np.float32], right: NDArray[np.bool_]) -> float:
    """Mean difference of confidence and accuracy over images (expected calibration error, Guo et al. 2017)."""
    bins = calibration(confidence, right)
    return sum(count * abs(mean - accuracy) for count, mean, accuracy in bins) / len(confidence)


def hierarchical_error(labels: NDArray[np.uint32], classes: NDArray[np.int32], costs: NDArray[np.uint8]) -> float:
    """Mean over images of the lowest cost of a class in the first five: the height of the lowest common ancestor."""
    each = np.where(classes >= 0, costs[labels[:, None].astype(np.int64), np.maximum(classes, 0)], 255)
    return float(each.min(1).astype(np.float64).mean())


def class_errors(rows: NDArray[np.void], num_classes: int) -> NDArray[np.int64]:
    """Per class: images, top-1 errors and top-5 errors of the last mode; int64 (classes, 3)."""
    counts = np.zeros((num_classes, 3), np.int64)
    ranks = rows["modes"][:, -1]["rank"]
    np.add.at(counts, rows["label"], np.stack([np.ones_like(ranks), ranks >= 1, ranks >= TOP], 1))
    return counts
