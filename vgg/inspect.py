"""One image at sharding: decoded once, in full, under a limit; kept as it is, re-coded, or refused with the reason.

JPEGs go through libjpeg-turbo (simplejpeg), whose warnings are heard: a scan that ends early or does not decode is
damage, though most decoders fill it with grey and say nothing.  Everything else goes through Pillow.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from vgg.images import BadImage, Pixels, decode, open_checked, too_large

cv2.setNumThreads(1)  # a process per core is what packing has already

NUM_SUMS = 11  # see Inspected
FEW_ROWS = 128  # of small images every row counts
KEPT = ("YCbCr", "RGB", "Gray")  # colour spaces that every reader decodes to the same RGB
ORIENTATION = 0x0112  # EXIF tag


class Inspected(NamedTuple):
    """jpeg: the bytes to pack.  sums: int64 (11,): pixels and sums of R, G, B; then of every 15th row (of all, below
    FEW_ROWS) its pixels, sums and sums of squares.  amended: why the bytes are not the original's, or None.  remarks:
    what is worth knowing of an image that was kept as it is."""

    jpeg: bytes
    width: int
    height: int
    sums: NDArray[np.int64]
    amended: str | None
    remarks: list[str]


def inspect(raw: bytes, max_pixels: int, published: bool) -> Inspected:
    """Check an image.  published: keep a JPEG that decodes with warnings (see sources.Source) and remark on them.

    Raises BadImage.
    """
    if not raw:
        raise BadImage("empty file")
    if not raw.startswith(b"\xff\xd8"):
        return _encoded(decode(raw, max_pixels), f"{open_checked(raw, max_pixels).format} re-coded as JPEG")
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(raw, strict=False)
    except KeyError:  # no such colour space: the data end before the frame header
        raise BadImage("not a JPEG that can be decoded: it has no frame header") from None
    except ValueError as error:
        raise BadImage(f"not a JPEG that can be decoded: {error}") from None
    too_large(width, height, max_pixels)
    opened = open_checked(raw, max_pixels)
    if opened.size != (width, height):  # evaluation reads with Pillow
        raise BadImage(f"readers disagree on its size: {width} x {height}, {opened.width} x {opened.height}")
    if colours not in KEPT:
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
    if (turned := _orientation(opened)) > 1:
        remarks.append(f"EXIF orientation {turned}, not applied")
    return Inspected(raw, width, height, _sums(rgb), None, remarks)


def _leniently(raw: bytes) -> Pixels:
    try:
        rgb: Pixels = simplejpeg.decode_jpeg(raw, "RGB", strict=False)
        return rgb
    except ValueError as error:
        raise BadImage(f"cannot be decoded: {error}") from None


def _encoded(image: Image.Image, reason: str) -> Inspected:
    """As a baseline JPEG, quality 95, without chroma subsampling."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    again = inspect(file.getvalue(), image.width * image.height, published=False)
    return again._replace(amended=reason)


def _sums(rgb: Pixels) -> NDArray[np.int64]:
    """Exact: OpenCV adds integers, as doubles far below 2^53; what a norm loses in its square root is rounded back."""
    # Squares of all rows would take a tenth of the decoding, and a deviation only sets a scale.  15 meets every row
    # of the JPEG's blocks; a copy, since OpenCV splits one in half the time.
    some = np.ascontiguousarray(rgb[::15]) if rgb.shape[0] >= FEW_ROWS else rgb
    squares = [cv2.norm(channel, cv2.NORM_L2SQR) for channel in cv2.split(some)]
    sums = [*_pixels_and_sums(rgb), *_pixels_and_sums(some), *squares]
    return np.array([round(value) for value in sums], np.int64)


def _pixels_and_sums(rgb: Pixels) -> list[float]:
    return [rgb.shape[0] * rgb.shape[1], *cv2.sumElems(rgb)[:3]]


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none that can be read."""
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF blocks raise almost anything, and say nothing of the pixels
        return 1
