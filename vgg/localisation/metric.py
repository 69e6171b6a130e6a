"""The metric of ILSVRC's localisation task, as its devkit computes it.

A guess is right if its class is, and its box overlaps any instance of that class with an IoU of at least 0.5; an image
is right if one of its first five guesses is.  From 2013 on the devkit leaves blacklisted images out of localisation,
but not out of classification: the two errors have different denominators.

Everything is counted in integers; arrays of counts can be added up over parts of the data.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vgg.evaluation.predictions import TOP, wilson
from vgg.localisation.boxes import paired_iou

THRESHOLD = 0.5  # an IoU of exactly this is right


class Right(NamedTuple):
    """Bool (n, TOP) each; column k is about the first k + 1 guesses.

    classified: one has the right class.  localised: one has the right class and a right box.
    """

    classified: NDArray[np.bool_]
    localised: NDArray[np.bool_]


def best_ious(
    first: NDArray[np.int64], boxes: NDArray[np.float64], predicted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The IoU of every predicted box with the instance that it overlaps most, (n, k).

    predicted: (n, k, 4).  boxes: (m, 4), the instances of the images' own classes; those of image i are boxes[first[i]]
    to boxes[first[i + 1] - 1].  first: (n + 1,).  All half-open.  Raises ValueError for an image without a box, or
    other shapes.
    """
    n = len(predicted)
    if predicted.ndim != 3 or first.shape != (n + 1,) or first[0] != 0 or first[-1] != len(boxes):
        raise ValueError(
            f"predicted (n, k, 4), first (n + 1,) and boxes (first[n], 4) expected, "
            f"got {predicted.shape}, {first.shape} and {boxes.shape}"
        )
    counts = np.diff(first)
    if (counts < 1).any():
        raise ValueError(f"image {int((counts < 1).argmax())} has no box of its class")
    overlaps = paired_iou(np.repeat(predicted, counts, 0), boxes[:, None])
    best: NDArray[np.float64] = np.maximum.reduceat(overlaps, first[:-1], 0)
    return best


def judge(labels: NDArray[np.integer], guesses: NDArray[np.integer], ious: NDArray[np.float64]) -> Right:
    """Which images are right.

    labels: (n,), class indices.  guesses: (n, k), 1 <= k <= TOP, class indices, best first; -1: no guess.
    ious: (n, k), of the guesses' boxes, as of best_ious().  Raises ValueError for other shapes.
    """
    n, k = guesses.shape
    if labels.shape != (n,) or ious.shape != (n, k) or not 1 <= k <= TOP:
        raise ValueError(
            f"labels (n,), guesses (n, k) and ious (n, k), k from 1 to {TOP}, expected, "
            f"got {labels.shape}, {guesses.shape} and {ious.shape}"
        )
    same_class = guesses == labels[:, None]
    same_box = same_class & (ious >= THRESHOLD)
    padding = ((0, 0), (0, TOP - k))
    return Right(*(np.pad(np.logical_or.accumulate(hits, 1), padding, "edge") for hits in (same_class, same_box)))


def counts(right: Right, blacklisted: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """Images, and wrong images within 1 to TOP guesses: int64 (2, 1 + TOP), of classification and of localisation.

    blacklisted: (n,), images that do not count for localisation.
    """
    if (right.localised & ~right.classified).any():
        raise AssertionError("an image is localised without being classified")
    n = len(right.classified)
    kept = np.ones(n, bool) if blacklisted is None else ~blacklisted
    return np.array(
        [[n, *(~right.classified).sum(0)], [kept.sum(), *(~right.localised[kept]).sum(0)]],
        np.int64,
    )


def summary(counts: NDArray[np.int64]) -> dict[str, dict[str, Any]]:
    """The errors of counts(), possibly added up: "classification" and "localisation".

    Each: num_images, and for k of 1 to TOP topk_error, a fraction, with topk_interval (Wilson, 95 %).
    """
    if (counts[0, 1:] > counts[1, 1:] + counts[0, 0] - counts[1, 0]).any():
        raise AssertionError(f"fewer images are wrong in localisation than in classification: {counts.tolist()}")
    classification, localisation = (_errors(*row) for row in counts.tolist())
    return {"classification": classification, "localisation": localisation}


def _errors(num_images: int, *wrong: int) -> dict[str, Any]:
    errors: dict[str, Any] = {"num_images": num_images}
    for k, count in enumerate(wrong, 1):
        errors[f"top{k}_error"], errors[f"top{k}_interval"] = count / num_images, wilson(count, num_images)
    return errors


def class_counts(
    labels: NDArray[np.integer],
    ious: NDArray[np.float64],
    num_classes: int,
    blacklisted: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """Images and right boxes by class, the class being given (the paper's Table 8): int64 (num_classes, 2).

    labels: (n,).  ious: (n,), of the one box that is predicted for the image's class.  blacklisted: as in counts().
    """
    if labels.shape != ious.shape or labels.ndim != 1:
        raise ValueError(f"labels (n,) and ious (n,) expected, got {labels.shape} and {ious.shape}")
    kept = slice(None) if blacklisted is None else ~blacklisted
    result = np.zeros((num_classes, 2), np.int64)
    np.add.at(result, labels[kept], np.stack([np.ones(len(labels), bool), ious >= THRESHOLD], 1)[kept])
    return result


def class_given(counts: NDArray[np.int64]) -> dict[str, Any]:
    """num_images, error with interval, and mean_corloc (over classes) of class_counts(), possibly added up."""
    images, right = counts.sum(0).tolist()
    return {
        "num_images": images,
        "error": (images - right) / images,
        "interval": wilson(images - right, images),
        "mean_corloc": float(np.nanmean(corloc(counts))),
    }


def corloc(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Correct localisation: the share of right boxes by class, of class_counts(); NaN for classes without images."""
    images, right = counts.T.astype(np.float64)
    shares: NDArray[np.float64] = right / np.where(images > 0, images, np.nan)
    return shares
