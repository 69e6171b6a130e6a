"""Crop windows: the part of the source image that becomes a crop.

The paper rescales an image isotropically to short side S and cuts a random 224x224 crop (§3.1).  Cutting a window of
side 224 * short / S from the source and resizing only the window gives the same crop, up to rounding to whole source
pixels.  Later practice draws area and aspect ratio of the window instead, and resizes it to a square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

AREAS = (0.08, 1.0)  # of area_window: share of the image's pixels
RATIOS = (3 / 4, 4 / 3)  # of area_window: width / height


class Window(NamedTuple):
    """A rectangle of whole source pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def right(self) -> int:
        return self.left + self.width

    @property
    def bottom(self) -> int:
        return self.top + self.height

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom), as in Pillow."""
        return self.left, self.top, self.right, self.bottom


def crop_window(width: int, height: int, scale: int, size: int, x: float, y: float) -> Window:
    """The source window of a size x size crop from the image rescaled to short side `scale`.

    x, y: position of the crop in [0, 1): 0 is the left or top edge, 0.5 the centre.
    """
    short = min(width, height)
    side = max(1, min(short, round(size * short / scale)))
    return Window(int(x * (width - side + 1)), int(y * (height - side + 1)), side, side)


def centre_window(width: int, height: int, scale: int, size: int) -> Window:
    """The source window of the central crop."""
    window = crop_window(width, height, scale, size, 0.0, 0.0)
    return _central(width, height, window.width, window.height)


def area_window(width: int, height: int, areas: Sequence[float], ratios: Sequence[float], x: float, y: float) -> Window:
    """A window of random area and aspect ratio, as in torchvision's RandomResizedCrop with its defaults.

    areas, ratios: in [0, 1), one of each per attempt (torchvision makes 10): position in AREAS, and position in RATIOS
    on a logarithmic scale.  Returns the first window that fits into the image; if none does, the largest central window
    with a ratio in RATIOS.  x, y: as in crop_window.
    """
    for area, ratio in zip(areas, ratios, strict=True):
        pixels = width * height * (AREAS[0] + area * (AREAS[1] - AREAS[0]))
        drawn = RATIOS[0] * (RATIOS[1] / RATIOS[0]) ** ratio
        w, h = round(math.sqrt(pixels * drawn)), round(math.sqrt(pixels / drawn))
        if 0 < w <= width and 0 < h <= height:
            return Window(int(x * (width - w + 1)), int(y * (height - h + 1)), w, h)
    nearest = min(max(width / height, RATIOS[0]), RATIOS[1])
    return _central(width, height, min(width, round(height * nearest)), min(height, round(width / nearest)))


def _central(width: int, height: int, w: int, h: int) -> Window:
    return Window((width - w) // 2, (height - h) // 2, w, h)
