"""Geometry of boxes.

A box is (x1, y1, x2, y2) in pixels, half-open: x2 - x1 is its width.  Files of ILSVRC hold inclusive integers, whose
width is xmax - xmin + 1; they are converted once, and then the IoU of the devkit, which adds 1 to every side, is the
plain one.  Functions of Boxes take NumPy arrays and torch tensors, floating-point (…, 4), and return their like.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vgg.data.windows import Window

if TYPE_CHECKING:
    import torch

Boxes = TypeVar("Boxes", "NDArray[np.float64]", "torch.Tensor")


def half_open(inclusive: NDArray[Any], origin: int = 0) -> NDArray[np.float64]:
    """Boxes (…, 4) of a file, both corners inclusive, as half-open ones.  origin: of the first pixel, 0 or 1."""
    return np.asarray(inclusive, np.float64) - _shift(origin)


def inclusive(half_open: NDArray[np.float64], origin: int = 0) -> NDArray[np.float64]:
    """The inverse of half_open(); whole numbers stay whole."""
    return half_open + _shift(origin)


def _shift(origin: int) -> NDArray[np.float64]:
    return np.array([origin, origin, origin - 1, origin - 1], np.float64)


def iou(a: Boxes, b: Boxes) -> Boxes:
    """Intersection over union of every pair: a (n, 4), b (m, 4) -> (n, m).  As in paired_iou()."""
    return paired_iou(a[:, None], b[None])


def paired_iou(a: Boxes, b: Boxes) -> Boxes:
    """Intersection over union, (…,) in [0, 1]: of a (…, 4) with b (…, 4), whose leading sides broadcast.

    0 if boxes are disjoint, also for touching or inverted ones (the devkit says -1, and compares with 0.5).  Of whole
    pixels the result is the quotient of two exact integers.
    """
    shared = area(intersection(a, b))
    union = area(a) + area(b) - shared
    overlap: Boxes = shared / (union + (shared == 0))  # not 0 / 0
    return overlap


def intersection(a: Boxes, b: Boxes) -> Boxes:
    """The common part of boxes, (…, 4); of disjoint ones an empty or inverted box."""
    ax1, ay1, ax2, ay2 = _sides(a)
    bx1, by1, bx2, by2 = _sides(b)
    return _stack(ax1.clip(min=bx1), ay1.clip(min=by1), ax2.clip(max=bx2), ay2.clip(max=by2))


def area(boxes: Boxes) -> Boxes:
    """Square pixels, (…,); 0 for empty and inverted boxes."""
    x1, y1, x2, y2 = _sides(boxes)
    product: Boxes = (x2 - x1).clip(0) * (y2 - y1).clip(0)
    return product


def centred(boxes: Boxes) -> Boxes:
    """(x1, y1, x2, y2) as centre, width and height: (cx, cy, w, h)."""
    x1, y1, x2, y2 = _sides(boxes)
    return _stack((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)


def cornered(centred: Boxes, min_side: float = 0.0) -> Boxes:
    """The inverse of centred().  min_side: shorter sides, also the negative ones of a network, become as long."""
    cx, cy, w, h = _sides(centred)
    w, h = w.clip(min_side), h.clip(min_side)
    return _stack(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)


def to_crop(boxes: Boxes, window: Window, size: float | tuple[float, float]) -> Boxes:
    """Boxes of the source in the coordinates of its crop: the window, resized to size x size or (width, height).

    They are not clipped.  The whole image as the window gives the coordinates of the rescaled image.
    """
    width, height = _both(size)
    (left, top, w, h), (x1, y1, x2, y2) = window, _sides(boxes)
    return _stack((x1 - left) * width / w, (y1 - top) * height / h, (x2 - left) * width / w, (y2 - top) * height / h)


def from_crop(boxes: Boxes, window: Window, size: float | tuple[float, float]) -> Boxes:
    """The inverse of to_crop()."""
    width, height = _both(size)
    (left, top, w, h), (x1, y1, x2, y2) = window, _sides(boxes)
    return _stack(x1 * w / width + left, y1 * h / height + top, x2 * w / width + left, y2 * h / height + top)


def flip(boxes: Boxes, width: float) -> Boxes:
    """Boxes of an image of this width, in the image mirrored left to right."""
    x1, y1, x2, y2 = _sides(boxes)
    return _stack(width - x2, y1, width - x1, y2)


def visible(boxes: Boxes, size: float | tuple[float, float]) -> Boxes:
    """The share of each box's area, (…,) in [0, 1], that lies in its crop (as in to_crop); 0 for empty boxes."""
    whole = area(boxes)
    share: Boxes = area(clamp(boxes, *_both(size))) / (whole + (whole == 0))
    return share


def clamp(boxes: Boxes, width: float, height: float) -> Boxes:
    """Boxes cut off at the edges of an image; those outside become empty."""
    x1, y1, x2, y2 = _sides(boxes)
    return _stack(x1.clip(0, width), y1.clip(0, height), x2.clip(0, width), y2.clip(0, height))


def whole_pixels(
    boxes: NDArray[np.float64], width: int | NDArray[np.int64], height: int | NDArray[np.int64]
) -> NDArray[np.float64]:
    """Boxes (…, 4) as they are written and scored: whole pixels inside the image, at least one of them.

    width, height: of the image; or arrays that broadcast to (…,).  The nearest edges; half a pixel rounds up, so that
    rounding does not depend on the position.  A box outside becomes a pixel, row or column of the edge.  Raises
    ValueError if a box is not finite.
    """
    if not np.isfinite(boxes).all():
        raise ValueError("boxes: not finite")
    x1, y1, x2, y2 = _sides(np.floor(boxes + 0.5))
    x1, y1 = x1.clip(0, width - 1), y1.clip(0, height - 1)
    return _stack(x1, y1, np.maximum(x2, x1 + 1).clip(0, width), np.maximum(y2, y1 + 1).clip(0, height))


def _both(size: float | tuple[float, float]) -> tuple[float, float]:
    return size if isinstance(size, tuple) else (size, size)


def _sides(boxes: Boxes) -> Sequence[Boxes]:
    if boxes.shape[-1] != 4:
        raise ValueError(f"boxes: expected (…, 4), got {tuple(boxes.shape)}")
    return [boxes[..., side] for side in range(4)]


def _stack(*sides: Boxes) -> Boxes:
    if isinstance(sides[0], np.ndarray | np.generic):
        return np.stack(sides, -1)
    import torch  # only for those who use it

    return torch.stack(sides, -1)
