"""Other libraries that load the same crops; None if one is not installed (the 'bench' extra)."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from torchvision.datasets import ImageFolder

from runtime.shards.shardset import ShardSet
from vgg.data.windows import Window

SIZE = 224
Work = Callable[[], int]


def _crop(image: Image.Image, window: Window) -> np.ndarray:
    return np.asarray(image.crop(window.box).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def torchvision_folder(root: Path, windows: list[Window]) -> Work:
    """ImageFolder with Pillow, cutting the same windows, as RandomResizedCrop cuts and resizes."""
    dataset = ImageFolder(str(root))

    def work() -> int:
        for number, window in enumerate(windows):
            image, _ = dataset[number]
            _crop(image, window)
        return len(windows)

    return work


def webdataset_pillow(shards: ShardSet, windows: list[Window]) -> Work:
    """Our shards through webdataset's reader, in its order; windows of the same sizes, at the centre."""
    urls = [str(shards.directory / entry["path"]) for entry in shards.split("train").shards]

    def work() -> int:
        count = 0
        for number, sample in enumerate(webdataset.WebDataset(urls, shardshuffle=False)):
            image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
            side = min(windows[number].width, *image.size)
            _crop(image, Window((image.width - side) // 2, (image.height - side) // 2, side, side))
            count += 1
        return count

    return work


def streaming(data: list[bytes], windows: list[Window], folder: Path) -> Work | None:
    """MosaicML streaming: MDS shards, decoded with Pillow."""
    try:
        from streaming import MDSWriter, StreamingDataset
    except ImportError:
        return None
    with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
        for jpeg in data:
            writer.write({"image": jpeg, "label": 0})
    dataset = StreamingDataset(local=str(folder), shuffle=False, batch_size=1)

    def work() -> int:
        for number, window in enumerate(windows):
            _crop(Image.open(io.BytesIO(dataset[number]["image"])).convert("RGB"), window)
        return len(windows)

    return work


def dali(data: list[bytes], windows: list[Window]) -> Work | None:
    """DALI's CPU operators: decode a slice, then resize it."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError:
        return None
    batch = 50
    starts = [np.array([w.left, w.top], np.int32) for w in windows]
    shapes = [np.array([w.width, w.height], np.int32) for w in windows]
    raw = [np.frombuffer(jpeg, np.uint8) for jpeg in data]
    last = len(data) // batch

    def batches(values: list[np.ndarray]) -> Callable[[int], list[np.ndarray]]:
        return lambda i: values[(i % last) * batch : (i % last + 1) * batch]

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None)  # type: ignore[misc]
    def graph() -> object:
        jpegs, start, shape = (fn.external_source(source=batches(v), batch=True) for v in (raw, starts, shapes))
        cut = fn.decoders.image_slice(jpegs, start=start, shape=shape, device="cpu", output_type=types.RGB)
        return fn.resize(cut, size=(SIZE, SIZE), interp_type=types.INTERP_LINEAR, antialias=True)

    pipe = graph(prefetch_queue_depth=1)
    pipe.build()

    def work() -> int:
        for _ in range(last):
            pipe.run()
        return last * batch

    return work
