"""From JPEG bytes to pixels: decoding, and the paper's crop taken straight from the source.

The paper rescales an image isotropically to short side S and cuts a random 224x224 crop (§3.1).  The same pixels come
from cutting a window of side 224 * short / S out of the source and resizing only that: the window is whole source
pixels, the resize antialiased bilinear.  Pixels are uint8 RGB, height x width x 3, throughout.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit; ours is a parameter, and holds before decoding

# EXIF blocks of some ILSVRC files are damaged; orientation is not applied (Caffe-era loaders did not), so they are moot
warnings.filterwarnings("ignore", module=r"PIL\.(Tiff|Jpeg)ImagePlugin")


class BadImage(ValueError):
    """An image that cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Window:
    """A square of whole source pixels: left and top edge, side."""

    left: int
    top: int
    side: int


def crop_window(width: int, height: int, scale: int, size: int, x: float, y: float) -> Window:
    """The source window of a size x size crop from the image rescaled to short side `scale`.

    x, y: position of the crop in [0, 1): 0 is the left or top edge; 0.5 the centre.
    """
    short = min(width, height)
    side = max(1, min(short, round(size * short / scale)))
    return Window(int(x * (width - side + 1)), int(y * (height - side + 1)), side)


def centre_window(width: int, height: int, scale: int, size: int) -> Window:
    """The source window of the central crop."""
    window = crop_window(width, height, scale, size, 0.0, 0.0)
    return Window((width - window.side) // 2, (height - window.side) // 2, window.side)


def open_checked(data: bytes, max_pixels: int) -> Image.Image:
    """Open an image by its header, without decoding.  Raises BadImage if it is none, or larger than max_pixels."""
    if not data:
        raise BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (OSError, ValueError, SyntaxError):
        raise BadImage("not an image (JPEG, PNG, WebP, BMP)") from None
    too_large(image.width, image.height, max_pixels)
    return image


def too_large(width: int, height: int, max_pixels: int) -> None:
    """Raises BadImage for an image of more than max_pixels, by what its header says."""
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} is more than {max_pixels:,} pixels")


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Decode a whole image to RGB.  Raises BadImage if it is truncated or damaged."""
    image = open_checked(data, max_pixels)
    try:
        image.load()
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, IndexError) as error:
        raise BadImage(f"cannot be decoded: {error}") from None
    except MemoryError:
        raise BadImage("needs more memory than an image of its size should") from None
