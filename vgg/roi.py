"""Region-of-interest decode: the pixels of a crop window, without decoding what lies below and beside it.

nvImageCodec's CPU backend (libjpeg-turbo) decodes just the window, with the same upsampling as Pillow: its pixels are
those of a full decode.  Where it has no wheel, Pillow decodes the whole image.  The resize is torch's antialiased
bilinear; either way a crop is within two grey levels of Pillow's decode, crop, resize (tests/test_roi.py).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from vgg.images import BadImage, Pixels, Window, decode


@contextmanager
def _silence() -> Iterator[None]:
    """When imported, nvImageCodec complains past Python's stderr of GPU libraries that its CPU backend needs not."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


try:
    with _silence():
        from nvidia import nvimgcodec
except ImportError:
    nvimgcodec = None

CPU = -99999  # NVIMGCODEC_DEVICE_CPU_ONLY
BATCH = 32  # images a decoder call: enough to hide its overhead, few enough to stay small


def decoder_name() -> str:
    """What decodes crops here; pixels may differ by two grey levels between any two of them."""
    return f"nvimgcodec {nvimgcodec.__version__}" if nvimgcodec else "pillow"


def crops(images: Sequence[bytes], windows: Sequence[Window], into: Pixels) -> dict[int, str]:
    """Decode a window of every JPEG and resize it.

    into: (n, size, size, 3) uint8 RGB, written.
    Returns the reasons, by position, of those that could not be decoded or are smaller than their window; their pixels
    are not written.
    """
    bad: dict[int, str] = {}
    for first in range(0, len(images), BATCH):
        part = slice(first, first + BATCH)
        for number, pixels in enumerate(_cut(images[part], windows[part]), first):
            if isinstance(pixels, str):
                bad[number] = pixels
            else:
                _resize(pixels, into[number])
    return bad


def crop(data: bytes, window: Window, into: Pixels) -> None:
    """One crop, into (size, size, 3) uint8.  Raises BadImage."""
    if bad := crops([data], [window], into[None]):
        raise BadImage(bad[0])


def _cut(images: Sequence[bytes], windows: Sequence[Window]) -> Iterator[Pixels | str]:
    """The pixels of every window, (side, side, 3) uint8 RGB, or why there are none."""
    if nvimgcodec is None:
        yield from map(_cut_with_pillow, images, windows)
        return
    decoder, parameters = _decoder(os.getpid())
    streams = [_open(data, window) for data, window in zip(images, windows, strict=True)]
    found = iter(decoder.decode([s for s in streams if not isinstance(s, str)], params=parameters))
    for stream in streams:
        if isinstance(stream, str):
            yield stream
        else:
            pixels = next(found)
            yield "cannot be decoded" if pixels is None else np.asarray(pixels)


def _open(data: bytes, window: Window) -> Any:
    """nvImageCodec's stream of just the window, or why there is none."""
    bottom, right = window.top + window.side, window.left + window.side
    try:
        stream = nvimgcodec.CodeStream(data)
        width, height = stream.width, stream.height
    except RuntimeError:
        return "not an image"
    if bottom > height or right > width:  # the decoder would pad it with black
        return f"has {width} x {height} pixels, its crop reaches to {right} x {bottom}"
    return stream.get_sub_code_stream(region=nvimgcodec.Region(window.top, window.left, bottom, right))


def _cut_with_pillow(data: bytes, window: Window) -> Pixels | str:
    """The same pixels by decoding the whole image."""
    try:
        image = decode(data, max_pixels=UNCHECKED)
    except BadImage as reason:
        return str(reason)
    bottom, right = window.top + window.side, window.left + window.side
    if bottom > image.height or right > image.width:
        return f"has {image.width} x {image.height} pixels, its crop reaches to {right} x {bottom}"
    return np.array(image.crop((window.left, window.top, right, bottom)))  # a copy: torch takes no read-only memory


UNCHECKED = 1 << 62  # pixels: what is in a shard was within its limit when it was packed


def _resize(pixels: Pixels, into: Pixels) -> None:
    """Resize square pixels into a square array, bilinear, antialiased when shrinking."""
    size = into.shape[0]
    source, target = (torch.from_numpy(a).permute(2, 0, 1)[None] for a in (pixels, into))
    # what interpolate() calls, but into the batch itself: its own output and the copy take four times as long
    torch.ops.aten._upsample_bilinear2d_aa.out(source, [size, size], False, out=target)


@functools.cache
def _decoder(_process: int) -> tuple[Any, Any]:
    """A process's decoder and its parameters: one that came with a fork has lost its threads."""
    decoder = nvimgcodec.Decoder(
        device_id=CPU,
        max_num_cpu_threads=1,  # a process per core is what the loader has already
        backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        options=":fancy_upsampling=1",  # Pillow's pixels; the Python default is another's
    )
    # EXIF orientation is on by default: it would turn the image under the window
    return decoder, nvimgcodec.DecodeParams(apply_exif_orientation=False)
