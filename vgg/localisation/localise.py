"""Localisation of all validation images, each once: boxes of the five most probable classes, and of the true one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.distributed import Group
from runtime.errors import Refused
from runtime.shards.shardset import ShardSet
from vgg.evaluation.evaluate import chunks_by_size, pictures_of
from vgg.evaluation.scaled import pixels_seen
from vgg.localisation.dense import MODES, TOP, Dense, Net
from vgg.localisation.objective import SIDES
from vgg.network.precision import Precision, precision_on
from vgg.network.trained import Trained
from vgg.params.localise import LocaliseParams

NONE = -1  # class of a guess that is not made: there are fewer classes
PIXELS = 1_000_000  # of the images that are decoded at a time


def row_type() -> np.dtype[Any]:
    """An image: classes, the most probable first, and their boxes; boxes of the true class.  See dense.Found."""
    return np.dtype(
        [
            ("number", "<u4"), ("label", "<i4"), ("classes", "<i4", (TOP,)),
            ("boxes", "<f8", (len(MODES), TOP, SIDES)), ("given", "<f8", (1 + len(MODES), SIDES)),
        ]
    )  # fmt: skip


def localise(
    params: LocaliseParams,
    classifier: Trained,
    localisers: Sequence[Trained],
    shards: ShardSet,
    group: Group,
    report: Callable[[int, int], None],
    posteriors: NDArray[np.float16] | None = None,
    precision: Precision = "auto",
) -> NDArray[np.void] | None:
    """Rows of row_type of all validation images, in the order of the index, on the first rank; None on others.

    localisers: the own one first.  report: called with (images done, total images) of all ranks.  posteriors: float16
    (images, classes), of better classifiers.
    Raises Refused if networks do not fit together or a box is not finite.
    """
    split = shards.split("val")
    device, dtype = group.device, precision_on(precision, group.device)
    nets = [
        Net.of(each.network(), each.manifest["pixels"], dtype, device, _is_single(each, shards)) for each in localisers
    ]
    classes = Net.of(classifier.network(), classifier.manifest["pixels"], dtype, device)
    dense = Dense(classes, nets, params.train_scale, params.test_scales, params.match, params.merge_threshold)
    bases = [dense.crop, *dense.bases]
    numbers = np.arange(len(split))
    sizes = np.stack([split.rows["height"], split.rows["width"]], -1).astype(np.int64)
    seen = partial(pixels_seen, bases, False, dense.side)
    scales = [params.train_scale, *params.test_scales]
    chunks = list(chunks_by_size(sizes, numbers, scales, PIXELS, seen))
    own, done = chunks[group.rank :: group.world_size], 0
    found = np.zeros(sum(map(len, own)), row_type())
    found["classes"] = NONE
    max_pixels = shards.manifest["parameters"]["max_pixels"]
    for chunk, pictures in zip(own, pictures_of(split, own, bases, "bilinear", max_pixels, group), strict=True):
        for number, picture in zip(chunk.tolist(), pictures, strict=True):
            label = int(split.rows[number]["label"])
            better = posteriors[number].astype(np.float32) if posteriors is not None else None
            classes_of, boxes, given = dense(picture, label, better)
            if not (np.isfinite(boxes).all() and np.isfinite(given).all()):
                raise Refused(f"{split.where(number)}: a box is not finite. The weights cannot be used.")
            row, count = found[done : done + 1], len(classes_of)
            row["number"], row["label"], row["classes"][0, :count] = number, label, classes_of
            row["boxes"][0, :, :count], row["given"][0] = boxes, given
            done += 1
        report(min(done * group.world_size, len(split)), len(split))
    gathered = np.concatenate(group.gather(found))
    return gathered[np.argsort(gathered["number"])] if group.is_first else None


def _is_single(localiser: Trained, shards: ShardSet) -> bool:
    """Raises Refused if this is no localiser of these classes."""
    regression = localiser.manifest["run"].get("localise", {}).get("regression")
    outputs = localiser.manifest["network"]["num_classes"]
    if regression is None or outputs != SIDES * (1 if regression == "single" else len(shards.wnids)):
        raise Refused(f"{localiser.directory}: no localiser of the classes of {shards.address}. Train one on them.")
    return bool(regression == "single")


def expect_suitable(
    params: LocaliseParams, classifier: Trained, localisers: Sequence[Trained], shards: ShardSet
) -> None:
    """Raises Refused if the networks do not belong to these images, or a test scale is below their input size."""
    input_size = classifier.manifest["network"]["input_size"]
    for trained in (classifier, *localisers):
        if trained.manifest["run"]["data"]["classes_sha256"] != shards.classes_sha256:
            raise Refused(f"{trained.directory}: is of other classes than {shards.address}. Train on these shards.")
        if trained.manifest["network"]["input_size"] != input_size:
            raise Refused(
                f"{trained.directory}: has another input size than {classifier.directory}, {input_size} pixels"
            )
    if too_small := [q for q in params.test_scales if q < input_size]:
        raise Refused(f"localise.test_scales: {too_small} are below the network's input size of {input_size} pixels")
