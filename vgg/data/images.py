"""Decoding image files to pixels: uint8 RGB, height x width x 3."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import Refused
from runtime.shardset import Split

Pixels = NDArray[np.uint8]
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
Image.MAX_IMAGE_PIXELS = None  # Pillow's limit; max_pixels is checked before decoding instead

# EXIF blocks of some ILSVRC files are damaged; they are not used (orientation is not applied, as in Caffe)
warnings.filterwarnings("ignore", module=r"PIL\.(Tiff|Jpeg)ImagePlugin")


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason."""


def open_checked(data: bytes, max_pixels: int) -> Image.Image:
    """Open an image by its header, without decoding.  Raises BadImage if it is not an image or too large."""
    if not data:
        raise BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (OSError, ValueError, SyntaxError):
        raise BadImage("not an image (JPEG, PNG, WebP, BMP)") from None
    too_large(image.width, image.height, max_pixels)
    return image


def too_large(width: int, height: int, max_pixels: int) -> None:
    """Raises BadImage if an image, by its header, has more than max_pixels pixels."""
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


def image_of(split: Split, number: int, max_pixels: int) -> Image.Image:
    """The decoded image of row `number` of a split, RGB.  Raises Refused, with shard and key, if it is damaged."""
    try:
        return decode(split.read(number), max_pixels)
    except BadImage as reason:
        raise Refused(f"{split.address}/{split.where(number)}: {reason}. Shard again.") from None
