"""Region-of-interest decode: the pixels of a crop window, without decoding what lies below and beside it.

nvImageCodec's CPU backend (libjpeg-turbo) decodes just the window, with the same upsampling as Pillow: its pixels are
those of a full decode.  Where it has no wheel, Pillow decodes the whole image.  The resize is torch's antialiased
bilinear; either way a crop is within two grey levels of Pillow's decode, crop, resize (tests/vgg/test_roi.py).
DeviceDecoder does the same with the decoders of a GPU (train.decoder: device).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.dlpack import from_dlpack

from runtime.errors import WrongParameters
from vgg.data.images import BadImage, Pixels, decode
from vgg.data.windows import Window


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
FANCY = ":fancy_upsampling=1"  # Pillow's pixels; the Python default is another's
BATCH = 32  # images a decoder call: enough to hide its overhead, few enough to stay small


def decoder_name(device: torch.device | None = None) -> str:
    """What decodes crops here, or on a device; pixels may differ by two grey levels between any two of them."""
    where = f" on {device.type}" if device else ""
    return f"nvimgcodec {nvimgcodec.__version__}{where}" if nvimgcodec else "pillow"


def crops(images: Sequence[bytes], windows: Sequence[Window], into: Pixels) -> dict[int, str]:
    """Decode a window of every JPEG and resize it.

    into: (n, size, size, 3) uint8 RGB, written.
    Returns the reasons, by position, of those that could not be decoded or are smaller than their window; their pixels
    are not written.
    """
    bad: dict[int, str] = {}
    for first in range(0, len(images), BATCH):
        part = slice(first, first + BATCH)
        found: Iterable[Any]
        if nvimgcodec:
            streams = [_open(data, window) for data, window in zip(images[part], windows[part], strict=True)]
            decoded = _decoder(os.getpid()).decode(_readable(streams), params=_parameters())
            found = _in_order(streams, decoded)
        else:
            found = map(_cut_with_pillow, images[part], windows[part])
        for number, pixels in enumerate(found, first):
            if isinstance(pixels, str):
                bad[number] = pixels
            else:
                _resize(np.asarray(pixels), into[number])
    return bad


def _readable(streams: list[Any]) -> list[Any]:
    return [stream for stream in streams if not isinstance(stream, str)]


def _in_order(streams: list[Any], decoded: Iterable[Any]) -> Iterator[Any]:
    """nvImageCodec's image of every stream, or the reason why it has none."""
    images = iter(decoded)
    for stream in streams:
        yield stream if isinstance(stream, str) else next(images) or "cannot be decoded"


def _open(data: bytes, window: Window) -> Any:
    """nvImageCodec's stream of just the window, or the reason why there is none."""
    try:
        stream = nvimgcodec.CodeStream(data)
        width, height = stream.width, stream.height
    except RuntimeError:
        return "not an image"
    if window.bottom > height or window.right > width:  # the decoder would pad it with black
        return f"has {width} x {height} pixels, its crop reaches to {window.right} x {window.bottom}"
    region = nvimgcodec.Region(window.top, window.left, window.bottom, window.right)
    return stream.get_sub_code_stream(region=region)


def _cut_with_pillow(data: bytes, window: Window) -> Pixels | str:
    """The same pixels by decoding the whole image."""
    try:
        image = decode(data, max_pixels=UNCHECKED)
    except BadImage as reason:
        return str(reason)
    if window.bottom > image.height or window.right > image.width:
        return f"has {image.width} x {image.height} pixels, its crop reaches to {window.right} x {window.bottom}"
    return np.array(image.crop(window.box))  # a copy: torch takes no read-only memory


UNCHECKED = 1 << 62  # pixels: what is in a shard was within its limit when it was packed


def _resize(pixels: Pixels, into: Pixels) -> None:
    """Resize pixels into a square array, bilinear, antialiased along a side that shrinks."""
    size = into.shape[0]
    source, target = (torch.from_numpy(a).permute(2, 0, 1)[None] for a in (pixels, into))
    # what interpolate() calls, but into the batch itself: its own output and the copy take four times as long
    torch.ops.aten._upsample_bilinear2d_aa.out(source, [size, size], False, out=target)


@functools.cache
def _decoder(_process: int) -> Any:
    """A process's decoder: one that came with a fork has lost its threads."""
    return nvimgcodec.Decoder(
        device_id=CPU,
        max_num_cpu_threads=1,  # a process per core is what the loader has already
        backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        options=FANCY,
    )


def _parameters() -> Any:
    # EXIF orientation is on by default: it would turn the image under the window
    return nvimgcodec.DecodeParams(apply_exif_orientation=False)


class DeviceDecoder:
    """Crops decoded where the network is: on a GPU by its JPEG engines or kernels, whichever nvImageCodec has for an
    image (on a CPU by the decoder of crops(), for tests)."""

    def __init__(self, device: torch.device) -> None:
        """Raises WrongParameters if nvImageCodec is not installed."""
        if nvimgcodec is None:
            raise WrongParameters("train.decoder: 'device' needs nvidia-nvimgcodec, which has no wheel here; use 'cpu'")
        self.device = device
        if device.type == "cuda":
            self._index = torch.cuda.current_device() if device.index is None else device.index
            self._decoder = nvimgcodec.Decoder(device_id=self._index, options=FANCY)
        else:
            self._decoder = _decoder(os.getpid())

    def crops(self, images: Sequence[bytes], windows: Sequence[Window], into: torch.Tensor) -> dict[int, str]:
        """As the function crops(); into: (n, size, size, 3) uint8 RGB on the device, written in its current stream."""
        bad: dict[int, str] = {}
        on_gpu = self.device.type == "cuda"
        options = {"cuda_stream": torch.cuda.current_stream(self.device).cuda_stream} if on_gpu else {}
        streams = [_open(data, window) for data, window in zip(images, windows, strict=True)]
        decoded = self._decoder.decode(_readable(streams), params=_parameters(), **options)
        for number, found in enumerate(_in_order(streams, decoded)):
            if isinstance(found, str):
                bad[number] = found
                continue
            if on_gpu:  # cuda(): an image that none of the GPU's decoders takes was decoded on the CPU
                pixels = from_dlpack(found.cuda(synchronize=False, device_id=self._index, **options))
            else:
                pixels = torch.from_numpy(np.asarray(found))
            planes = pixels.permute(2, 0, 1)[None].float()
            # rows first, then columns, whole grey levels in between: as Pillow does
            for size in ((planes.shape[2], into.shape[2]), into.shape[1:3]):
                planes = functional.interpolate(planes, size, mode="bilinear", antialias=True).round_()
            into[number] = planes[0].permute(1, 2, 0)
        return bad
