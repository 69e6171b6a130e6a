"""Small valid images of every format that sharding accepts, and helpers to edit the bytes of a JPEG."""

from __future__ import annotations

import importlib.util
import io
import struct
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:  # noqa: A002
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@cache
def photographs() -> list[bytes]:
    """The two photographs of scikit-learn, found without importing it."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "datasets" / "images"
    return [(folder / name).read_bytes() for name in ("china.jpg", "flower.jpg")]


@cache
def pictures() -> list[Image.Image]:
    whole = [Image.open(io.BytesIO(data)).convert("RGB") for data in photographs()]
    return [*whole, *(p.resize(size, Image.Resampling.BICUBIC) for p in whole for size in ((161, 107), (64, 97)))]


@cache
def jpegs() -> list[bytes]:
    """Valid JPEGs of every kind that is kept unchanged."""
    found = list(photographs())
    for picture in pictures()[2:]:
        found += [
            encoded(picture, subsampling=0, quality=95),
            encoded(picture, subsampling=1, quality=90),
            encoded(picture, subsampling=2, quality=75),
            encoded(picture, progressive=True, quality=85),
            encoded(picture, optimize=True, quality=60, restart_marker_rows=1),
            encoded(picture.convert("L"), quality=80),
            encoded(picture, exif=exif(6)),
        ]
    return found


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


@cache
def others(format: str) -> list[bytes]:  # noqa: A002
    small = pictures()[2:]
    if format == "PNG":
        return [encoded(p.convert(mode), format) for p in small for mode in ("RGB", "P", "L", "RGBA", "1", "I;16")]
    if format == "WEBP":
        return [encoded(p, format, lossless=lossless) for p in small for lossless in (False, True)]
    if format == "TIFF":
        plain = [encoded(p.convert(mode), format) for p in small[:2] for mode in ("RGB", "P", "L", "RGBA", "1", "CMYK")]
        deep = [encoded(p.convert(mode), format) for p in small[:2] for mode in ("I;16", "F")]
        packed = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        return [*plain, *deep, *(encoded(p, format, compression=kind) for p in small[:2] for kind in packed)]
    if format == "GIF":
        animated = encoded(small[0], format, save_all=True, append_images=[small[0].rotate(90)])
        return [animated, *(encoded(p.convert(mode), format) for p in small for mode in ("RGB", "P", "L", "RGBA"))]
    if format == "PPM":
        return [encoded(p.convert(mode), format) for p in small for mode in ("RGB", "L", "1", "I;16")]
    return [encoded(p.convert(mode), format) for p in small for mode in ("RGB", "P", "1")]


def segments(jpeg: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, end) of every segment up to the first scan's header; the scan starts where the last one ends."""
    found, at = [], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        found.append((jpeg[at + 1], at, end))
        at = end
    return [*found, (0xDA, at, at + 2 + int.from_bytes(jpeg[at + 2 : at + 4]))]


def frame_at(jpeg: bytes) -> int:
    """Position of SOF: ff cX, length (2), precision, height (2), width (2), components, then 3 bytes for each."""
    return next(start for marker, start, _ in segments(jpeg) if marker in (0xC0, 0xC1, 0xC2))


def put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """The same JPEG with a false size in its header."""
    return put(jpeg, frame_at(jpeg) + 5, struct.pack(">HH", height, width))
