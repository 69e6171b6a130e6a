"""Sharding of mutated images: no crash, no hang, no wrong pixels.

VGG_HOSTILE_CASES mutations (300) of VGG_HOSTILE_SEED (1).
"""

from __future__ import annotations

import io
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hostile import CASES, CHILD_TIMEOUT, GIB, MAX_PIXELS, REPLAY, SEED, in_child, show
from mutations import CLEAN, CLEAN_EVERY, KINDS
from PIL import Image
from samples import encoded, jpegs, photographs, pictures, put, segments

from vgg.data.images import BadImage
from vgg.sharding.inspect import inspect

child_timeout = pytest.mark.timeout(2 * CHILD_TIMEOUT + 60)


@child_timeout
def test_every_mutated_image_is_refused_with_a_reason_or_decodes_the_same_everywhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    start = time.monotonic()
    found = in_child("sharding", tmp_path)
    counts = {(kind, verdict): count for kind, verdict, count in found["counts"]}
    decoded = in_child("decoding", tmp_path)
    verdicts = ("kept", "re-coded", "refused")
    total = {verdict: sum(n for (_, v), n in counts.items() if v == verdict) for verdict in verdicts}
    table = [f"  {kind:26}" + "".join(f"{counts.get((kind, v), 0):6}" for v in verdicts) for kind in [*KINDS, CLEAN]]
    show(
        capsys,
        f"{REPLAY}: {total}; sharding {found['peak'] >> 20} MiB, slowest {found['slowest']:.2f} s; decoding "
        f"{decoded['peak'] >> 20} MiB, differs by {decoded['largest']} at most; {time.monotonic() - start:.0f} s\n"
        f"  {'':26}{'kept':>6}{'re-c.':>6}{'ref.':>6}\n" + "\n".join(table),
    )
    faults = found["faults"] + decoded["faults"]
    assert not faults, f"{REPLAY}: {len(faults)} faults:\n" + "\n".join(faults[:60])
    assert sum(total.values()) == CASES
    assert decoded["decoded"] == total["kept"] + total["re-coded"]
    assert counts[CLEAN, "kept"] == CASES // CLEAN_EVERY
    assert found["peak"] < GIB
    assert decoded["peak"] < GIB  # torch included


@child_timeout
def test_packing_mutated_images_lists_those_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = in_child("packing", tmp_path)
    show(capsys, f"{REPLAY}: packed {found['totals']}, {found['peak'] >> 20} MiB")
    assert not found["faults"], f"{REPLAY}:\n" + "\n".join(found["faults"][:40])
    assert sum(found["totals"].values()) == 64 * max(1, CASES // 300)
    assert found["peak"] < GIB


def test_images_with_false_sizes_are_refused_before_decoding(tmp_path: Path) -> None:
    """A decoded 12000 x 12000 image would take 432 MB."""
    result = in_child("false_sizes", tmp_path)
    for name, (reason, size, seconds) in result["found"].items():
        assert "pixels" in reason, (name, reason)
        assert seconds < 1, name
        assert size < (20_000 if name == "PNG" else 2_000), name
    assert result["found"]["12000 x 12000 JPEG"][0] == "12000 x 12000 is more than 50,000,000 pixels"
    assert result["grown"] < 50 * 10**6, result


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999])
def test_a_truncated_jpeg_is_refused(fraction: float) -> None:
    for data in jpegs():
        with pytest.raises(BadImage) as caught:
            inspect(data[: int(len(data) * fraction)], MAX_PIXELS)
        assert str(caught.value)
        assert fraction < 0.5 or "remature end" in str(caught.value), caught.value


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_missing_last_bytes_are_detected(missing: int) -> None:
    for data in jpegs():
        with pytest.raises(BadImage, match="damaged"):
            inspect(data[:-missing], MAX_PIXELS)


def test_cmyk_becomes_rgb_and_a_truncated_one_is_refused() -> None:
    data = encoded(pictures()[2].convert("CMYK"))
    found = inspect(data, MAX_PIXELS)
    assert found.amended == "CMYK JPEG re-coded as RGB"
    assert Image.open(io.BytesIO(found.jpeg)).mode == "RGB"
    with pytest.raises(BadImage):
        inspect(data[:-200], MAX_PIXELS)


def test_a_flipped_scan_byte_is_refused_or_kept_unchanged() -> None:
    """Some flips give another valid JPEG, which cannot be told apart from an original: it is kept unchanged."""
    data, verdicts = photographs()[0], Counter[str]()
    start = segments(data)[-1][2]
    for at in np.random.default_rng(SEED).integers(start, len(data) - 2, 40):
        damaged = put(data, int(at), bytes([data[at] ^ 0x55]))
        try:
            found = inspect(damaged, MAX_PIXELS)
        except BadImage as reason:
            verdicts["refused"] += 1
            assert str(reason).startswith("damaged: "), reason
        else:
            verdicts["kept"] += 1
            assert found.jpeg == damaged
    assert verdicts["refused"] > 0, verdicts
