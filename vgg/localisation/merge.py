"""Many boxes of one class become few: the greedy merging of OverFeat (arXiv 1312.6229, §4.3), as appendix A uses it.

The two boxes that match best become their mean, and their scores add up, until no pair matches well enough.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vgg.localisation.boxes import area

Floats = NDArray[np.float64]


class Merged(NamedTuple):
    """Boxes (m, 4), each the mean of its members; scores, sums over members, (m,) or (m, k); sizes, int64 (m,).

    In the order of their first members.  The final box is that of the highest score.
    """

    boxes: Floats
    scores: Floats
    sizes: NDArray[np.int64]


def merge(boxes: Floats, scores: Floats, threshold: float, match: str = "centre_iou") -> Merged:
    """Merge pairs of boxes, the best match first, while their match score is at most `threshold`.

    boxes: (n, 4), half-open, of positive width and height.  scores: (n,), or (n, k) if k classes share the boxes.
    match: a key of MATCHES.  Of equal match scores the pair with the lowest indices is first.  Raises ValueError for
    other boxes or shapes.  All operations are correctly rounded, so the result has the same bytes on any machine.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape[:1] != boxes.shape[:1]:
        raise ValueError(f"boxes (n, 4) and scores (n, …) expected, got {boxes.shape} and {scores.shape}")
    areas = area(boxes)
    if not ((areas > 0) & (areas < np.inf)).all() or not np.isfinite(scores).all():
        raise ValueError("boxes and scores must be finite, and boxes have a positive width and height")
    match_scores = MATCHES[match]
    sums, totals, sizes = np.array(boxes.T, np.float64), np.array(scores, np.float64), np.ones(len(boxes), np.int64)
    means = _measured(sums)
    pairs = match_scores(means[:, :, None], means[:, None])
    np.fill_diagonal(pairs, np.inf)
    absorbed = np.zeros(len(boxes), bool)
    for _ in range(len(boxes) - 1):
        first, second = divmod(int(pairs.argmin()), len(pairs))  # first < second: the matrix is symmetric
        if pairs[first, second] > threshold:
            break
        sums[:, first] += sums[:, second]
        totals[first] += totals[second]
        sizes[first] += sizes[second]
        means[:, first] = _measured(sums[:, first] / sizes[first])
        absorbed[second] = True
        row = match_scores(means[:, first, None], means)
        row[absorbed] = row[first] = np.inf
        pairs[second] = pairs[:, second] = np.inf
        pairs[first] = pairs[:, first] = row
    kept = ~absorbed
    return Merged(means[:4, kept].T, totals[kept], sizes[kept])


def centre_iou(a: Floats, b: Floats) -> Floats:
    """Distance of the centres, in units of the side of a square of the mean area, + 1 - IoU: free of scale.

    a, b: as from _measured(); their other sides broadcast.
    """
    squared, shared = _compare(a, b)
    areas = a[6] + b[6]
    score: Floats = np.sqrt(2 * squared / areas) + (1 - shared / (areas - shared))
    return score


def overfeat_literal(a: Floats, b: Floats) -> Floats:
    """As OverFeat words it: distance of the centres, pixels, + area of the intersection, square pixels.

    It falls with less overlap, so disjoint neighbours merge before boxes that overlap.
    """
    squared, shared = _compare(a, b)
    score: Floats = np.sqrt(squared) + shared
    return score


def _measured(boxes: Floats) -> Floats:
    """x1, y1, x2, y2 (4, …) with centre and area: x1, y1, x2, y2, cx, cy, area (7, …)."""
    sides = boxes[2:] - boxes[:2]
    return np.concatenate([boxes, (boxes[:2] + boxes[2:]) / 2, sides[:1] * sides[1:]])


def _compare(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Squared distance of the centres, area of the intersection."""
    sides = np.maximum(np.minimum(a[2:4], b[2:4]) - np.maximum(a[:2], b[:2]), 0)
    between = a[4:6] - b[4:6]
    return between[0] * between[0] + between[1] * between[1], sides[0] * sides[1]


MATCHES = {"centre_iou": centre_iou, "overfeat_literal": overfeat_literal}
