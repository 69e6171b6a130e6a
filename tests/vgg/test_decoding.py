"""What RGB cannot hold: deep grey, transparency, several frames; sharding and the served model convert alike."""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image
from samples import encoded, exif, pictures

from vgg.data.images import BadImage, decode, decode_with_notes
from vgg.sharding.inspect import inspect

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)  # of 8 bits
LARGE = 10**6


def tiff(pixels: np.ndarray[Any, Any], bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A little-endian grey TIFF of one strip: forms that Pillow reads but does not write."""
    if bits == 12:  # two values in three bytes
        even, odd = pixels.ravel()[::2].astype(int), pixels.ravel()[1::2].astype(int)
        packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], -1).astype(np.uint8).tobytes()
    else:
        packed = pixels.tobytes()
    height, width = pixels.shape
    entries = [
        (256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1),
        (278, 4, height), (279, 4, len(packed)), (339, 3, sample_format),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", 10) + directory + bytes(4)


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (encoded(Image.fromarray(RAMP * 257), "PNG"), "16-bit grey"),
        (encoded(Image.fromarray(RAMP * 257), "TIFF"), "16-bit grey"),
        (encoded(Image.fromarray((RAMP * 257).astype(">u2")), "TIFF"), "16-bit grey"),
        (encoded(Image.fromarray(RAMP * 257), "PPM"), "16-bit grey"),  # mode I
        (tiff(((255 - RAMP) * 257), 16, photometric=0), "16-bit grey"),  # 0 is white
        (tiff(np.rint(RAMP / 255 * 4095).astype(np.uint16), 12), "12-bit grey"),
        (tiff((RAMP / 255).astype(np.float32), 32, sample_format=3), "floating-point grey"),
    ],
)
def test_deep_grey_is_scaled_and_listed(data: bytes, note: str) -> None:
    found = decode_with_notes(data, LARGE)
    assert found.notes == [f"{note} scaled to 8 bits"]
    assert np.array_equal(np.asarray(found.image), np.stack([RAMP] * 3, -1))
    packed = inspect(data, LARGE)
    assert packed.amended == f"{found.format} re-coded as JPEG; {note} scaled to 8 bits"
    assert np.asarray(decode(packed.jpeg, LARGE)).mean() == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(np.full((16, 16), np.nan, np.float32), 32, sample_format=3), "floating-point grey from nan to nan"),
        (tiff(RAMP.astype(np.float32), 32, sample_format=3), "floating-point grey from 0 to 255; only 0"),
        (tiff((RAMP - 0.5).astype(np.float32), 32, sample_format=3), "from -0.5 to 254.5"),
        (encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "grey of 32 bits or with a sign"),
        (tiff(RAMP.astype(np.int16), 16, sample_format=2), "grey of 32 bits or with a sign"),
    ],
)
def test_what_cannot_be_scaled_is_refused_by_name(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        inspect(data, LARGE)


def half_transparent(mode: str) -> Image.Image:
    """Red (or grey 80), its left half with alpha 0."""
    image = Image.new("RGB", (32, 32), "red") if mode == "RGBA" else Image.new("L", (32, 32), 80)
    image.putalpha(Image.fromarray(np.repeat([[0, 255]], 32, 0).repeat(16, 1).astype(np.uint8)))
    return image


@pytest.mark.parametrize(
    ("image", "form", "right"),
    [
        (half_transparent("RGBA"), "PNG", (255, 0, 0)),
        (half_transparent("RGBA"), "TIFF", (255, 0, 0)),
        (half_transparent("RGBA"), "WEBP", (255, 0, 0)),
        (half_transparent("RGBA"), "GIF", (255, 0, 0)),
        (half_transparent("LA"), "PNG", (80, 80, 80)),
    ],
)
def test_transparent_parts_lie_on_white(image: Image.Image, form: str, right: tuple[int, int, int]) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    found = decode_with_notes(encoded(image, form, **options), LARGE)
    assert found.notes == ["transparent parts on white"]
    assert [found.image.getpixel(at) for at in ((3, 3), (28, 28))] == [(255, 255, 255), right]


def test_transparent_values_lie_on_white() -> None:
    """A palette with alpha, one transparent colour, one transparent grey of 16 bits; half alpha is mixed."""
    palette = pictures()[2].quantize(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow would warn of what it ignores
        found = decode_with_notes(encoded(palette, "PNG", transparency=bytes(8)), LARGE)
    assert (found.image.getextrema(), found.notes) == (((255, 255),) * 3, ["transparent parts on white"])
    colour = encoded(Image.new("RGB", (8, 8), (10, 20, 30)), "PNG", transparency=(10, 20, 30))
    assert decode(colour, LARGE).getextrema() == ((255, 255),) * 3
    deep = encoded(Image.fromarray(RAMP * 257), "PNG", transparency=257 * 7)
    assert np.asarray(decode(deep, LARGE))[0, 6:9, 0].tolist() == [6, 255, 8]
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 51))
    assert decode(encoded(half, "PNG"), LARGE).getpixel((0, 0)) == (204, 204, 204)


def test_opaque_and_plain_modes_are_only_re_coded() -> None:
    picture = pictures()[2]
    for form, mode in (("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"), ("PNG", "L"), ("BMP", "RGB"), ("TIFF", "CMYK")):
        found = decode_with_notes(encoded(picture.convert(mode), form), LARGE)
        assert (found.notes, found.format, found.image.mode) == ([], form, "RGB")
        assert np.array_equal(np.asarray(found.image), np.asarray(picture.convert(mode).convert("RGB")))


@pytest.mark.parametrize(("form", "options"), [("GIF", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_of_several_frames_the_first_is_taken_and_listed(form: str, options: dict[str, Any]) -> None:
    first, second = Image.new("RGB", (32, 24), (250, 0, 0)), Image.new("RGB", (32, 24), (0, 0, 250))
    data = encoded(first, form, save_all=True, append_images=[second], **options)
    found = inspect(data, LARGE)
    assert found.amended == f"{form} re-coded as JPEG; the first of several frames"
    assert decode(data, LARGE).getpixel((9, 9)) == (250, 0, 0)


def test_the_orientation_of_exif_is_listed_and_not_applied() -> None:
    picture = pictures()[2]
    for form in ("JPEG", "PNG", "WEBP"):
        found = inspect(encoded(picture, form, exif=exif(6)), LARGE)
        assert (found.width, found.height) == picture.size
        assert "EXIF orientation 6, not applied" in [*found.remarks, *(found.amended or "").split("; ")]
    turned = inspect(encoded(picture, "TIFF", exif=exif(6)), LARGE)  # its reader applies it
    assert (turned.width, turned.height, turned.amended) == (*picture.size[::-1], "TIFF re-coded as JPEG")


def test_a_pointer_says_how_to_get_the_image() -> None:
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 110000\n"
    for pointer, remedy in ((lfs, "git lfs pull"), (b"/annex/objects/SHA256E-s110000--00.jpg\n", "git annex get")):
        with pytest.raises(BadImage, match=f"a pointer of .*, not the image: {remedy}"):
            inspect(pointer, LARGE)


def test_an_image_too_long_for_a_jpeg_is_refused() -> None:
    for size in ((65_501, 656), (656, 65_501)):
        with pytest.raises(BadImage, match="as a JPEG it may have at most 65,500 pixels a side"):
            inspect(encoded(Image.new("L", size), "PNG"), 50 * LARGE)
    assert inspect(encoded(Image.new("L", (65_500, 655)), "PNG"), 50 * LARGE).width == 65_500


def test_damaged_and_unknown_files_have_a_reason() -> None:
    data = encoded(pictures()[2], "TIFF", compression="tiff_lzw")
    for broken in (data[: len(data) // 2], b"II*\0" + bytes(40), b"GIF89a", b"P6 5", b"%PDF-1.4"):
        with pytest.raises(BadImage, match=r"not an image of a form that is read here \(JPEG, PNG|cannot be decoded"):
            decode(broken, LARGE)
    assert Image.open(io.BytesIO(data)).format == "TIFF"


@pytest.mark.parametrize(("size", "allowed"), [((800, 8), True), ((8, 801), False)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_threads_of_pixels_are_refused_at_sharding(size: tuple[int, int], allowed: bool, kind: str) -> None:
    """Evaluation, which makes the short side Q pixels long, would run out of memory after the training."""
    data = encoded(Image.new("RGB", size), kind)
    if allowed:
        assert inspect(data, LARGE)[1:3] == size
    else:
        with pytest.raises(BadImage, match="8 x 801: one side is more than 100 times the other"):
            inspect(data, LARGE)
