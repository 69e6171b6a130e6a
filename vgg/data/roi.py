"""Region-of-interest decoding: decodes only the crop window of a JPEG.

nvImageCodec's CPU backend (libjpeg-turbo) decodes the window with the same upsampling as Pillow, so the pixels equal
those of a full decode.  Where nvImageCodec has no wheel, Pillow decodes the whole image.  Crops are resized with
torch's antialiased bilinear interpolation; in both cases they are within two grey levels of Pillow's decode, crop,
resize (tests/vgg/test_roi.py).  DeviceDecoder does the same with the decoders of a GPU (train.decoder: device).
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
    """Suppress file descriptor 2: on import nvImageCodec prints warnings about GPU libraries, also for CPU use."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


try:
    with _silence():
        from nvidia import nvimgcodec
except ImportError:
    nvimgcodec = None

CPU = -99999  # NVIMGCODEC_DEVICE_CPU_ONLY
FANCY = ":fancy_upsampling=1"  # as Pillow does; not the default of the Python API
BATCH = 32  # images per decoder call: hides the overhead, and limits memory


def decoder_name(device: torch.device | None = None) -> str:
    """Name and version of the decoder of crops, on this host or on a device.

    Pixels of two decoders may differ by two grey levels.
    """
    where = f" on {device.type}" if device else ""
    return f"nvimgcodec {nvimgcodec.__version__}{where}" if nvimgcodec else "pillow"


def crops(images: Sequence[bytes], windows: Sequence[Window], into: Pixels) -> dict[int, str]:
    """Decode a window of every JPEG and resize it.

    into: output, uint8 RGB (n, size, size, 3).
    Returns the reason, by position, for every image that cannot be decoded or is smaller than its window; its pixels
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
    """The decoded image of every stream, or the reason why it failed."""
    images = iter(decoded)
    for stream in streams:
        yield stream if isinstance(stream, str) else next(images) or "cannot be decoded"


def _open(data: bytes, window: Window) -> Any:
    """nvImageCodec's stream of the window, or the reason why it failed."""
    try:
        stream = nvimgcodec.CodeStream(data)
        width, height = stream.width, stream.height
    except RuntimeError:
        return "not an image"
    if window.bottom > height or window.right > width:  # the decoder would pad it with black
        return f"has {width} x {height} pixels, but its crop ends at {window.right} x {window.bottom}"
    region = nvimgcodec.Region(window.top, window.left, window.bottom, window.right)
    return stream.get_sub_code_stream(region=region)


def _cut_with_pillow(data: bytes, window: Window) -> Pixels | str:
    """The same pixels by decoding the whole image."""
    try:
        image = decode(data, max_pixels=UNCHECKED)
    except BadImage as reason:
        return str(reason)
    if window.bottom > image.height or window.right > image.width:
        return f"has {image.width} x {image.height} pixels, but its crop ends at {window.right} x {window.bottom}"
    return np.array(image.crop(window.box))  # a copy, because torch requires writable memory


UNCHECKED = 1 << 62  # pixels; the size was checked when the shard was packed


def _resize(pixels: Pixels, into: Pixels) -> None:
    """Resize pixels into a square array: bilinear, antialiased along sides that shrink."""
    size = into.shape[0]
    source, target = (torch.from_numpy(a).permute(2, 0, 1)[None] for a in (pixels, into))
    # interpolate() calls this, too; with out= it is four times as fast, because no copy is made
    torch.ops.aten._upsample_bilinear2d_aa.out(source, [size, size], False, out=target)


@functools.cache
def _decoder(_process: int) -> Any:
    """The decoder of a process; after a fork a new one is needed, because threads are not inherited."""
    return nvimgcodec.Decoder(
        device_id=CPU,
        max_num_cpu_threads=1,  # the loader already has one process per core
        backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        options=FANCY,
    )


def _parameters() -> Any:
    # applied by default; it would rotate the image under the window
    return nvimgcodec.DecodeParams(apply_exif_orientation=False)


class DeviceDecoder:
    """Decodes crops on the device of the network.

    On a GPU, nvImageCodec uses the JPEG engines or kernels; on a CPU, for tests, the decoder of crops().
    """

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
        """As crops() above.  into: uint8 RGB (n, size, size, 3) on the device, written in its current stream."""
        bad: dict[int, str] = {}
        on_gpu = self.device.type == "cuda"
        options = {"cuda_stream": torch.cuda.current_stream(self.device).cuda_stream} if on_gpu else {}
        streams = [_open(data, window) for data, window in zip(images, windows, strict=True)]
        decoded = self._decoder.decode(_readable(streams), params=_parameters(), **options)
        for number, found in enumerate(_in_order(streams, decoded)):
            if isinstance(found, str):
                bad[number] = found
                continue
            if on_gpu:  # cuda(): images that the GPU's decoders do not support are decoded on the CPU
                pixels = from_dlpack(found.cuda(synchronize=False, device_id=self._index, **options))
            else:
                pixels = torch.from_numpy(np.asarray(found))
            planes = pixels.permute(2, 0, 1)[None].float()
            # first horizontally, then vertically, with rounding in between, as Pillow does
            for size in ((planes.shape[2], into.shape[2]), into.shape[1:3]):
                planes = functional.interpolate(planes, size, mode="bilinear", antialias=True).round_()
            into[number] = planes[0].permute(1, 2, 0)
        return bad
