"""Evaluation (§3.2, §4) of all validation images, each once, in every mode.

Every image is decoded once and resized to all sizes in decoding processes.  Images are taken in the order of their
size, in chunks; the ranks take chunks in turn.  An image's numbers do not depend on its chunk (vgg.evaluation.views):
on a CPU the results are identical, bit for bit, for any number of ranks, any batch_pixels and any number of restarts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.distributed import Group
from runtime.errors import Refused
from runtime.shards.batches import ROW, Crops
from runtime.shards.loader import Loader
from runtime.shards.shardset import ShardSet, Split
from vgg.data.images import image_of
from vgg.evaluation.fusion import Partner
from vgg.evaluation.modes import Base, Mode
from vgg.evaluation.parts import Parts, part_type
from vgg.evaluation.predictions import rows_of, summary
from vgg.evaluation.scaled import Size, pixels_seen, resize, short_side, sizes_of
from vgg.evaluation.views import Picture, Views
from vgg.network.trained import Trained
from vgg.params.evaluate import EvaluateParams

log = logging.getLogger("vgg.evaluate")

SAVE_SECONDS = 20.0  # interval at which what was evaluated is saved
CHUNK_BATCHES = 2  # batches of batch_pixels in a chunk
AGREE_TURNS = 8  # interval, in chunks, at which several ranks agree on that


@dataclass
class Evaluation:
    """The result of an evaluation.

    metrics: of every mode under "modes"; those of the headline mode also at the top level.
    predictions: rows of vgg.evaluation.predictions.row_type, one per image, in the order of the index.
    modes: names of the modes; the last one is the headline.  network_mode: the last one of this network alone.
    posteriors: of all images in the mode with this number: float16 (images, classes).
    """

    metrics: dict[str, Any]
    predictions: NDArray[np.void]
    modes: list[str]
    network_mode: str
    posteriors: Callable[[int], NDArray[np.float16]]


def evaluate(
    params: EvaluateParams,
    trained: Trained,
    shards: ShardSet,
    group: Group,
    report: Callable[[int, int], None],
    parts: Parts | None = None,
    partners: Sequence[Partner] = (),
) -> Evaluation | None:
    """Evaluate every validation image exactly once, in every mode.  Returns None on other ranks than the first.

    report: called with (images done, total images) of all ranks.  parts: of the first rank.
    Raises Refused if the checkpoint was trained on other classes, a test scale is below the network's input size, or a
    score is not finite.
    """
    expect_suitable(params, trained, shards)
    split, parts = shards.split("val"), parts or Parts()
    views = Views(params, trained.network(), trained.manifest["pixels"], group.device)
    dtype = part_type(len(views.modes), trained.manifest["network"]["num_classes"])
    if group.is_first:
        parts.open(dtype)
    left = np.setdiff1d(np.arange(len(split)), group.gather(parts.numbers())[0])
    sizes = np.stack([split.rows["height"], split.rows["width"]], -1).astype(np.int64)
    seen = partial(pixels_seen, views.bases, params.flip, views.side)
    chunks = list(chunks_by_size(sizes, left, params.test_scales, params.batch_pixels, seen))
    own = chunks[group.rank :: group.world_size]
    max_pixels = shards.manifest["parameters"]["max_pixels"]
    batches = pictures_of(split, own, views.bases, params.filter, max_pixels, group)
    done, total, saved = len(split) - len(left), len(split), time.monotonic()
    found: list[NDArray[np.void]] = []
    late: _Late | None = None
    for turn in range(-(-len(chunks) // group.world_size)):
        if turn < len(own):
            pictures = next(batches)
            following = _Late(own[turn], views(pictures).posteriors)
            if late:
                found.append(late.part(split, dtype))
            late = following
            done += len(own[turn]) * group.world_size
            report(min(done, total), total)
        to_agree = group.world_size == 1 or turn % AGREE_TURNS == AGREE_TURNS - 1
        if to_agree and group.any(group.is_first and time.monotonic() - saved > SAVE_SECONDS):
            _gather(found, parts, group, dtype)
            found, saved = [], time.monotonic()
    if late:
        found.append(late.part(split, dtype))
    _gather(found, parts, group, dtype)
    return result(views.modes, parts, split, partners, shards) if group.is_first else None


def expect_suitable(params: EvaluateParams, trained: Trained, shards: ShardSet) -> None:
    """Raises Refused if the network cannot be evaluated on these images at these scales."""
    if trained.manifest["run"]["data"]["classes_sha256"] != shards.classes_sha256:
        raise Refused(
            f"{trained.directory} was trained on other classes than those of {shards.address}. "
            "Train on these shards, or evaluate on the others."
        )
    input_size = trained.manifest["network"]["input_size"]
    if too_small := [q for q in params.test_scales if q < input_size]:
        raise Refused(f"evaluate.test_scales: {too_small} are below the network's input size of {input_size} pixels")
    if not len(shards.split("val")):
        raise Refused(f"{shards.address}: no validation images. Shard data that has some.")


def result(
    modes: Sequence[Mode], parts: Parts, split: Split, partners: Sequence[Partner], shards: ShardSet
) -> Evaluation:
    """The evaluation of all parts, fused with those of other networks."""
    rows = parts.rows()
    if not np.array_equal(rows["number"], np.arange(len(split))):
        raise AssertionError(f"evaluated {len(rows)} images of {len(split)}")
    protocols = {mode.name: mode.protocol() for mode in modes}
    posteriors: Callable[[int], NDArray[np.float16]] = parts.posteriors
    if partners:
        from vgg.evaluation.fusion import fused

        rows, posteriors, fusion = fused(rows, parts, modes, partners)
        protocols[fusion.name] = fusion.protocol()
    names = list(protocols)
    results = summary(rows, names, shards.costs())
    for name in names:
        results[name]["protocol"] = protocols[name]
    headline = {key: value for key, value in results[names[-1]].items() if key != "protocol"}
    return Evaluation({"headline": names[-1], **headline, "modes": results}, rows, names, modes[-1].name, posteriors)


def chunks_by_size(
    sizes: NDArray[np.int64],
    numbers: NDArray[np.int64],
    scales: Sequence[int],
    batch_pixels: int,
    seen: Callable[[int, int], int] = lambda _height, _width: 0,
) -> Iterator[NDArray[np.int64]]:
    """Image numbers in the order of their size at the largest scale, within batch_pixels at that scale.

    sizes: height and width of every image, int64 (n, 2); numbers: of those wanted.  seen: pixels that the network sees
    of an image of this height and width; at most CHUNK_BATCHES * batch_pixels, so that 150 crops an image make short
    chunks: what a kill loses, and what progress counts.
    """
    largest = max(scales)
    scaled = np.array([short_side(height, width, largest) for height, width in sizes[numbers].tolist()], np.int64)
    scaled = scaled.reshape(-1, 2)
    chunk: list[int] = []
    pixels = work = 0
    for position in np.lexsort((numbers, scaled[:, 1], scaled[:, 0])):
        number, own = int(numbers[position]), int(scaled[position].prod())
        cost = seen(*sizes[number].tolist())
        too_wide = max(pixels, own) * (len(chunk) + 1) > batch_pixels
        if chunk and (too_wide or work + cost > CHUNK_BATCHES * batch_pixels):
            yield np.array(chunk)
            chunk, pixels, work = [], 0, 0
        chunk.append(number)
        pixels, work = max(pixels, own), work + cost
    if chunk:
        yield np.array(chunk)


@dataclass(frozen=True)
class Scaled:
    """Decodes images and resizes them to all sizes: a runtime.shards.loader.Make.

    An image is written as one row of bytes: one size after the other.
    """

    split: Split
    bases: Sequence[Base]
    kernel: str
    max_pixels: int

    def __call__(self, numbers: NDArray[np.int64], into: Any) -> NDArray[np.void]:
        for number, row in zip(numbers, into, strict=False):
            image = torch.from_numpy(np.array(image_of(self.split, int(number), self.max_pixels)))[None]
            for (height, width), place in self._places(int(number)):
                row[place] = resize(image, height, width, self.kernel).numpy().reshape(-1)
        rows = np.zeros(len(numbers), ROW)
        rows["number"] = numbers
        return rows

    def num_bytes(self, number: int) -> int:
        """Length of an image's row."""
        return int(self._places(number)[-1][1].stop)

    def _places(self, number: int) -> list[tuple[Size, slice]]:
        """Every size of an image, and where it is in its row."""
        row, first, found = self.split.rows[number], 0, []
        for height, width in sizes_of(self.bases, int(row["height"]), int(row["width"])):
            last = first + height * width * 3
            found.append(((height, width), slice(first, last)))
            first = last
        return found

    def pictures(self, batch: Crops) -> list[Picture]:
        """What __call__ wrote.  batch.images: uint8 (n, bytes)."""
        found = []
        for number, content in zip(batch.numbers.tolist(), batch.images, strict=True):
            row = self.split.rows[number]
            scaled = {size: content[place].view(*size, 3) for size, place in self._places(number)}
            found.append(Picture(int(row["height"]), int(row["width"]), scaled))
        return found


def pictures_of(
    split: Split,
    chunks: Sequence[NDArray[np.int64]],
    bases: Sequence[Base],
    kernel: str,
    max_pixels: int,
    group: Group,
) -> Iterator[list[Picture]]:
    """The pictures of every chunk, made in decoding processes.  kernel: as of resize()."""
    make = Scaled(split, bases, kernel, max_pixels)
    num_bytes = max((make.num_bytes(int(number)) for chunk in chunks for number in chunk), default=0)
    loader = Loader.of(group, None)
    batches = loader.load(make, lambda done: iter(chunks[done:]), max(map(len, chunks), default=0), (num_bytes,))
    return (make.pictures(batch) for batch in batches)


class _Late:
    """Posteriors that are copied from the device while the next chunk is computed.  numbers: of the images."""

    def __init__(self, numbers: NDArray[np.int64], posteriors: torch.Tensor) -> None:
        self._numbers, self._posteriors = numbers, posteriors
        self._copied: torch.cuda.Event | None = None
        if posteriors.device.type == "cuda":
            self._posteriors = torch.empty(posteriors.shape, pin_memory=True)
            self._posteriors.copy_(posteriors, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def part(self, split: Split, dtype: np.dtype[Any]) -> NDArray[np.void]:
        """Raises Refused if a score is not finite."""
        if self._copied:
            self._copied.synchronize()
        if not torch.isfinite(self._posteriors).all():
            raise Refused(
                f"{split.where(int(self._numbers[0]))} or its batch: a score is not finite. The weights cannot be used."
            )
        part = np.zeros(len(self._numbers), dtype)
        part["row"] = rows_of(self._numbers, split.rows["label"][self._numbers].astype(np.int64), self._posteriors)
        part["posteriors"] = self._posteriors.numpy()
        return part


def _gather(found: list[NDArray[np.void]], parts: Parts, group: Group, dtype: np.dtype[Any]) -> None:
    """Add to the parts of the first rank what all ranks have found."""
    gathered = group.gather(np.concatenate([np.zeros(0, dtype), *found]))
    if group.is_first:
        parts.add(np.concatenate(gathered))
