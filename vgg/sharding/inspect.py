"""Check one image at sharding: decode it fully, under a limit; keep it unchanged, amend it, or reject it.

JPEGs go through libjpeg-turbo (simplejpeg), and its warnings count, for every source alike: a scan that ends early or
does not decode is damage, although most decoders silently fill it with grey.  Harmless are an unknown JFIF revision,
bytes left over before the end or between two segments of the header, and odd limits of a sequential scan: every row is
decoded, and without them the file decodes to the same pixels.  Everything else goes through Pillow.
"""

from __future__ import annotations

import io
import re
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from vgg.data.images import BadImage, Pixels, decode, decode_with_notes, expect_size, open_checked, orientation_notes

cv2.setNumThreads(1)  # packing already runs one process per core

NUM_SUMS = 11  # see Inspected
FEW_ROWS = 128  # below this height, every row is used
KEPT_COLOURS = ("YCbCr", "RGB", "Gray")  # colour spaces that all readers decode to the same RGB
MAX_REPAIRS = 4  # of one image
MAX_SIDE = 65_500  # pixels; libjpeg writes no more
POINTERS = {  # files that stand for one that is not here, by their first bytes
    b"version https://git-lfs": "a pointer of Git LFS, not the image: git lfs pull",
    b"/annex/objects/": "a pointer of git-annex, not the image: git annex get",
}

REVISION = re.compile("unknown JFIF revision")
LEFT_OVER = re.compile("([0-9]+) extraneous bytes before marker 0x([0-9a-f]{2})")
LIMITS = re.compile("Invalid SOS parameters for sequential JPEG")
END_OF_IMAGE, START_OF_SCAN = "d9", b"\xda"
MARKER = re.compile(rb"\xff([^\0\xff])", re.DOTALL)
JFIF = re.compile(rb"(\xff\xe0..JFIF\0)[^\x01].", re.DOTALL)  # up to the revision, and a revision other than 1.x
# a scan of 1 to 3 components up to its limits, and the limits (first and last coefficient, bit positions)
SCAN = re.compile(rb"(\xff\xda\0(?:\x08\x01..|\x0a\x02....|\x0c\x03......))...", re.DOTALL)


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


def inspect(raw: bytes, max_pixels: int) -> Inspected:
    """Check an image.  Raises BadImage if it is rejected."""
    if not raw:
        raise BadImage("empty file")
    for start, reason in POINTERS.items():
        if raw.startswith(start):
            raise BadImage(reason)
    if not raw.startswith(b"\xff\xd8"):
        found = decode_with_notes(raw, max_pixels)
        return _encoded(found.image, "; ".join([f"{found.format} re-coded as JPEG", *found.notes]))
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(raw, strict=False)
    except KeyError:  # unknown colour space: the data end before the frame header
        raise BadImage("not a JPEG that can be decoded: it has no frame header") from None
    except ValueError as error:
        raise BadImage(f"not a JPEG that can be decoded: {error}") from None
    expect_size(width, height, max_pixels)
    opened = open_checked(raw, max_pixels)
    if opened.size != (width, height):  # evaluation uses Pillow
        raise BadImage(f"readers disagree on its size: {width} x {height}, {opened.width} x {opened.height}")
    is_kept = colours in KEPT_COLOURS
    try:
        rgb, clean, warnings = _decoded(raw, "RGB" if is_kept else "CMYK", max_pixels)
    except MemoryError:
        raise BadImage("needs more memory than an image of its size should") from None
    if not is_kept:
        found = decode_with_notes(raw, max_pixels)
        return _encoded(found.image, "; ".join([f"{colours} JPEG re-coded as RGB", *found.notes]))
    remarks, amended = [f"decodes with a warning: {warning}" for warning in warnings], None
    if not all(_is_read_by_all(warning) for warning in warnings):
        raw, amended, remarks = clean, f"repaired, with the same pixels: {'; '.join(warnings)}", []
    remarks += orientation_notes(opened)
    return Inspected(raw, width, height, _sums(rgb), amended, remarks)


def _decoded(raw: bytes, colours: str, max_pixels: int) -> tuple[Pixels, bytes, list[str]]:
    """The pixels of a JPEG, a copy that decodes to the same without warnings, and the warnings, all of them harmless.

    Raises BadImage for any other warning.  libjpeg tells only the first one: its cause is removed from the copy, which
    is decoded again, until there is no warning or one of damage.
    """
    data, warnings = raw, list[str]()
    while True:
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(data, colours)
            break
        except ValueError as error:
            repaired = _without_cause(data, str(error))
            if repaired is None or len(warnings) == MAX_REPAIRS:
                raise BadImage(f"damaged: {error}") from None
            data, warnings = repaired, [*warnings, str(error)]
    if warnings and decode(data, max_pixels).tobytes() != decode(raw, max_pixels).tobytes():
        raise BadImage(f"damaged: {'; '.join(warnings)}")
    return pixels, data, warnings


def _without_cause(data: bytes, warning: str) -> bytes | None:
    """A copy of a JPEG without the cause of a harmless warning; None for any other."""
    if REVISION.search(warning):
        return JFIF.sub(b"\\g<1>\x01\x01", data)
    if LIMITS.search(warning):
        return SCAN.sub(b"\\g<1>\0\x3f\0", data)
    left_over = LEFT_OVER.search(warning)
    if left_over is None:
        return None
    header, scan = _header(data)
    if left_over[2] != END_OF_IMAGE:
        # between two scans, or inside one, lies nothing by intention: the codes before it are bad
        return header + data[scan:] if len(header) < scan else None
    end = data.find(b"\xff\xd9", scan)
    while data[end - 1] == 0xFF:  # fill bytes, which the warning does not count
        end -= 1
    return data[: end - int(left_over[1])] + data[end:] if end - int(left_over[1]) > scan else None


def _header(data: bytes) -> tuple[bytes, int]:
    """The segments of a JPEG up to the first scan, without what lies between them, and where the scan's data begin."""
    segments, at = [data[:2]], 2
    while match := MARKER.search(data, at):
        at = match.end() + int.from_bytes(data[match.end() : match.end() + 2])
        segments.append(data[match.start() : at])
        if match[1] == START_OF_SCAN:
            break
    return b"".join(segments), at


def _is_read_by_all(warning: str) -> bool:
    """Whether the decoder of training's crops, which reads headers by itself, takes an image with this warning."""
    left_over = LEFT_OVER.search(warning)
    return bool(left_over[2] == END_OF_IMAGE if left_over else REVISION.search(warning))


def _encoded(image: Image.Image, reason: str) -> Inspected:
    """Re-code as a baseline JPEG, quality 95, without chroma subsampling."""
    if max(image.size) > MAX_SIDE:
        raise BadImage(f"{image.width} x {image.height}: as a JPEG it may have at most {MAX_SIDE:,} pixels a side")
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    again = inspect(file.getvalue(), image.width * image.height)
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
