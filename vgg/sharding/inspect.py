"""Check one image at sharding: decode it fully, under a limit; keep it unchanged, re-code it, or reject it.

JPEGs go through libjpeg-turbo (simplejpeg), and its warnings count: a scan that ends early or does not decode is
damage, although most decoders silently fill it with grey.  Everything else goes through Pillow.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from vgg.data.images import BadImage, Pixels, decode, open_checked, too_large

cv2.setNumThreads(1)  # packing already runs one process per core

NUM_SUMS = 11  # see Inspected
FEW_ROWS = 128  # below this height, every row is used
KEPT_COLOURS = ("YCbCr", "RGB", "Gray")  # colour spaces that all readers decode to the same RGB
ORIENTATION = 0x0112  # EXIF tag


class Inspected(NamedTuple):
    """jpeg: the bytes to pack.  sums: int64 (11,): number of pixels and sums of R, G, B; then the same and sums of
    squares over every 15th row (every row, below FEW_ROWS).  amended: why the bytes differ from the original, or None.
    remarks: notes on an image that is kept unchanged."""

    jpeg: bytes
    width: int
    height: int
    sums: NDArray[np.int64]
    amended: str | None
    remarks: list[str]


def inspect(raw: bytes, max_pixels: int, published: bool) -> Inspected:
    """Check an image.  published: keep a JPEG that decodes with warnings (see sources.Source) and add remarks.

    Raises BadImage if it is rejected.
    """
    if not raw:
        raise BadImage("empty file")
    if not raw.startswith(b"\xff\xd8"):
        return _encoded(decode(raw, max_pixels), f"{open_checked(raw, max_pixels).format} re-coded as JPEG")
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(raw, strict=False)
    except KeyError:  # unknown colour space: the data end before the frame header
        raise BadImage("not a JPEG that can be decoded: it has no frame header") from None
    except ValueError as error:
        raise BadImage(f"not a JPEG that can be decoded: {error}") from None
    too_large(width, height, max_pixels)
    opened = open_checked(raw, max_pixels)
    if opened.size != (width, height):  # evaluation uses Pillow
        raise BadImage(f"readers disagree on its size: {width} x {height}, {opened.width} x {opened.height}")
    if colours not in KEPT_COLOURS:
        return _encoded(decode(raw, max_pixels), f"{colours} JPEG re-coded as RGB")
    remarks = []
    try:
        rgb = simplejpeg.decode_jpeg(raw, "RGB")
    except ValueError as warning:
        if not published:
            raise BadImage(f"damaged: {warning}") from None
        rgb = _leniently(raw)
        try:
            decode(raw, max_pixels)
        except BadImage:
            return _encoded(Image.fromarray(rgb), f"re-coded, since not every reader decodes it: {warning}")
        remarks.append(f"decodes with a warning: {warning}")
    except MemoryError:
        raise BadImage("needs more memory than an image of its size should") from None
    if (orientation := _orientation(opened)) > 1:
        remarks.append(f"EXIF orientation {orientation}, not applied")
    return Inspected(raw, width, height, _sums(rgb), None, remarks)


def _leniently(raw: bytes) -> Pixels:
    try:
        rgb: Pixels = simplejpeg.decode_jpeg(raw, "RGB", strict=False)
        return rgb
    except ValueError as error:
        raise BadImage(f"cannot be decoded: {error}") from None


def _encoded(image: Image.Image, reason: str) -> Inspected:
    """Re-code as a baseline JPEG, quality 95, without chroma subsampling."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    again = inspect(file.getvalue(), image.width * image.height, published=False)
    return again._replace(amended=reason)


def _sums(rgb: Pixels) -> NDArray[np.int64]:
    """Exact sums: OpenCV adds integers as doubles far below 2^53; rounding removes the error of the norm's root."""
    # Squares of all rows would take a tenth of the decoding time, and the deviation only sets a scale.  A step of 15
    # reaches every row position inside 8 x 8 blocks.  OpenCV splits a contiguous copy in half the time.
    some = np.ascontiguousarray(rgb[::15]) if rgb.shape[0] >= FEW_ROWS else rgb
    squares = [cv2.norm(channel, cv2.NORM_L2SQR) for channel in cv2.split(some)]
    sums = [*_pixels_and_sums(rgb), *_pixels_and_sums(some), *squares]
    return np.array([round(value) for value in sums], np.int64)


def _pixels_and_sums(rgb: Pixels) -> list[float]:
    return [rgb.shape[0] * rgb.shape[1], *cv2.sumElems(rgb)[:3]]


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if missing or unreadable."""
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF blocks raise almost anything; the pixels may still be intact
        return 1
