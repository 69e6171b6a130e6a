"""Decoding image files to pixels: uint8 RGB, height x width x 3.

What RGB cannot hold is converted by one rule for sharding and for the served model: transparent parts lie on white;
grey of 9 to 16 bits is divided by its white; grey of floating point counts from 0.0, black, to 1.0, white; of several
frames the first is taken.  EXIF orientation is not applied, as in Caffe; only TIFF has one that its reader applies.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import Refused
from runtime.shards.shardset import Split

Pixels = NDArray[np.uint8]
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # those of torchvision's ImageFolder, and GIF
NAMES = "JPEG, PNG, WebP, BMP, GIF, TIFF, PPM"
BACKGROUND = (255, 255, 255)  # white, as a page behind a picture
WHITE_16 = 2**16 - 1
MAX_ASPECT = 100  # dense evaluation at Q = 384 of such an image takes 4 GB a layer
ORIENTATION = 0x0112  # EXIF tag
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value of the second
Image.MAX_IMAGE_PIXELS = None  # Pillow's limit; max_pixels is checked before decoding instead

# EXIF blocks of some ILSVRC files are damaged; they are not used
warnings.filterwarnings("ignore", module=r"PIL\.(Tiff|Jpeg)ImagePlugin")


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason."""


class Decoded(NamedTuple):
    """image: RGB.  format: of the file, as Pillow names it.  notes: what was converted, for people."""

    image: Image.Image
    format: str
    notes: list[str]


def open_checked(data: bytes, max_pixels: int) -> Image.Image:
    """Open an image by its header, without decoding.  Raises BadImage if it is no image, or of a refused size."""
    if not data:
        raise BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # damaged headers, those of TIFF above all, make Pillow raise almost anything
        raise BadImage(f"not an image of a form that is read here ({NAMES})") from None
    expect_size(image.width, image.height, max_pixels)
    return image


def expect_size(width: int, height: int, max_pixels: int) -> None:
    """Raises BadImage if an image, by its header, has more than max_pixels pixels, or is too long and thin."""
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} is more than {max_pixels:,} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width} x {height}: one side is more than {MAX_ASPECT} times the other")


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Decode a whole image to RGB.  Raises BadImage if it is truncated, damaged, or cannot be converted."""
    return decode_with_notes(data, max_pixels).image


def decode_with_notes(data: bytes, max_pixels: int) -> Decoded:
    """As decode(), with what was converted."""
    image = open_checked(data, max_pixels)
    try:
        notes = ["the first of several frames"] if getattr(image, "is_animated", False) else []
        image.load()
        rgb, converted = to_rgb(image)
    except BadImage:
        raise
    except MemoryError:
        raise BadImage("needs more memory than an image of its size should") from None
    except Exception as error:  # as above
        raise BadImage(f"cannot be decoded: {error}") from None
    return Decoded(rgb, image.format or "", notes + converted + orientation_notes(image))


def to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """A loaded image as RGB, and notes.  Pillow's own convert() clips deep grey at 255 and ignores transparency."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        grey, note = _to_grey(image)
        return grey.convert("RGB"), [note]
    if not image.has_transparency_data:
        return image.convert("RGB"), []
    layer = image.convert("RGBA")
    if layer.getchannel("A").getextrema() == (255, 255):
        return layer.convert("RGB"), []
    page = Image.new("RGB", image.size, BACKGROUND)
    page.paste(layer, mask=layer)
    return page, ["transparent parts on white"]


def _to_grey(image: Image.Image) -> tuple[Image.Image, str]:
    """Grey of more than 8 bits scaled to 8, and a note.  Raises BadImage if nothing says which value is white."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        lowest, highest = float(values.min()), float(values.max())
        if not 0 <= lowest <= highest <= 1:  # also false for NaN
            raise BadImage(
                f"floating-point grey from {lowest:g} to {highest:g}; only 0 (black) to 1 (white) is known: scale it"
            )
        scaled, note = np.rint(values * 255), "floating-point grey"
    elif image.mode == "I" and image.format == "TIFF":
        raise BadImage("grey of 32 bits or with a sign: nothing says which value is white; save it with 8 or 16 bits")
    else:
        white = 2 ** int(tags[BITS_PER_SAMPLE][0]) - 1 if tags else WHITE_16
        scaled = (values.astype(np.uint32) * 255 + white // 2) // white
        note = f"{white.bit_length()}-bit grey"
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts only 8 bits
        scaled = 255 - scaled
    if isinstance(transparent := image.info.get("transparency"), int):  # a PNG with one transparent value
        scaled[values == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8)), f"{note} scaled to 8 bits"


def orientation_notes(image: Image.Image) -> list[str]:
    """A note if the image has an EXIF orientation that its pixels do not follow."""
    if "exif" not in image.info:
        return []
    try:
        orientation = int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF blocks raise almost anything; the pixels may still be intact
        return []
    return [f"EXIF orientation {orientation}, not applied"] if orientation > 1 else []


def image_of(split: Split, number: int, max_pixels: int) -> Image.Image:
    """The decoded image of row `number` of a split, RGB.  Raises Refused, with shard and key, if it is damaged."""
    try:
        return decode(split.read(number), max_pixels)
    except BadImage as reason:
        raise Refused(f"{split.address}/{split.where(number)}: {reason}. Shard again.") from None
