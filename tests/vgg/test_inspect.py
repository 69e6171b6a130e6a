"""libjpeg's warnings: harmless ones keep an image, shown by a decoding without them; all others refuse it."""

from __future__ import annotations

import numpy as np
import pytest
import simplejpeg
from samples import encoded, frame_at, jpegs, pictures, put, segments

from vgg.data import roi
from vgg.data.images import BadImage, decode
from vgg.data.windows import Window
from vgg.sharding.inspect import inspect

LARGE = 10**6
PLAIN, PROGRESSIVE = encoded(pictures()[2]), encoded(pictures()[2], progressive=True)
REVISION = b"\xff\xd8" + PLAIN[2:11] + b"\x03" + PLAIN[12:]
TABLES = segments(PLAIN)[1][1]  # before the quantisation tables


def left_over(jpeg: bytes, size: int, at: int = -2) -> bytes:
    return jpeg[:at] + b"\x12" * size + jpeg[at:]


def test_the_cases_are_those_of_libjpeg() -> None:
    for data, warning in (
        (REVISION, "unknown JFIF revision number 3.01"),
        (left_over(PROGRESSIVE, 100), "extraneous bytes before marker 0xd9"),
        (left_over(PLAIN, 5, TABLES), "5 extraneous bytes before marker 0xdb"),
    ):
        with pytest.raises(ValueError, match=warning):
            simplejpeg.decode_jpeg(data, "RGB")


@pytest.mark.parametrize(
    "data", [REVISION, left_over(PLAIN, 100), left_over(PROGRESSIVE, 100), left_over(REVISION, 99)]
)
def test_a_harmless_warning_is_a_remark(data: bytes) -> None:
    found = inspect(data, LARGE)
    assert (found.jpeg, found.amended) == (data, None)
    assert found.remarks
    assert all(remark.startswith("decodes with a warning: ") for remark in found.remarks)
    assert len(found.remarks) == 1 + (data[:30] == REVISION[:30] and len(data) > len(REVISION))


@pytest.mark.parametrize(
    "data",
    [
        left_over(PLAIN, 5, TABLES),
        left_over(left_over(PLAIN, 700), 1, frame_at(PLAIN)),
        put(PLAIN, segments(PLAIN)[-1][2] - 3, b"\1\0\0"),  # limits that a sequential scan does not have
    ],
)
def test_what_the_decoder_of_crops_would_refuse_is_repaired_with_the_same_pixels(data: bytes) -> None:
    found = inspect(data, LARGE)
    assert found.amended
    assert found.amended.startswith("repaired, with the same pixels: ")
    simplejpeg.decode_jpeg(found.jpeg, "RGB")  # without a warning
    assert np.array_equal(np.asarray(decode(found.jpeg, LARGE)), np.asarray(decode(data, LARGE)))
    into = np.zeros((1, 40, 40, 3), np.uint8)
    assert roi.crops([found.jpeg], [Window(0, 0, 40, 40)], into) == {}


@pytest.mark.parametrize("cut", [1, 30, 1000])
def test_damage_behind_a_harmless_warning_is_refused(cut: int) -> None:
    """libjpeg only tells its first warning."""
    for data in (REVISION, left_over(PLAIN, 5, TABLES), left_over(REVISION, 5, TABLES)):
        with pytest.raises(BadImage, match=r"damaged: .*[Pp]remature end"):
            inspect(data[:-cut], LARGE)


def test_bad_codes_are_refused_for_every_source_and_colour() -> None:
    optimal = encoded(pictures()[2], optimize=True)  # whose tables have no codes to spare
    cmyk = encoded(pictures()[2].convert("CMYK"))
    second = PROGRESSIVE.index(b"\xff\xda", segments(PROGRESSIVE)[-1][2])  # the header of the second scan
    for damaged, reason in (
        (put(PROGRESSIVE, second + 300, b"\xfe\xfe" * 20), "bad Huffman code"),
        (put(cmyk, segments(cmyk)[-1][2] + 200, b"\xfe" * 100), "premature end of data segment"),
        (left_over(PROGRESSIVE, 100, second), "extraneous bytes before marker"),  # bad codes of the first
        (optimal[:-100] + optimal[-2:], "premature end of data segment"),
    ):
        with pytest.raises(BadImage, match=f"damaged: Corrupt JPEG data: .*{reason}"):
            inspect(damaged, LARGE)


def test_clean_images_are_kept_as_they_are() -> None:
    for data in jpegs()[2:]:
        found = inspect(data, LARGE)
        assert (found.jpeg, found.amended) == (data, None)
        assert not [remark for remark in found.remarks if "warning" in remark]
