"""The boxes of a localisation as files: an array, the devkit's text, and pictures."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from components.evaluate.report import save_figure
from runtime import manifest
from runtime.shards.shardset import ShardSet
from vgg.data.images import image_of
from vgg.localisation import devkit
from vgg.localisation.instances import Instances
from vgg.localisation.results import Results

SCHEMA = "vgg.localisations/1"
DEVKIT = "val.pred.det.txt"
PICTURES = ("boxes.png", "overlaps.png")
KINDS = ("best", "worst", "random")
EACH = 6  # images of a kind


def write(
    directory: Path,
    shards: ShardSet,
    true: Instances,
    results: Results,
    metrics: dict[str, Any],
    params: dict[str, Any],
    inputs: dict[str, str],
) -> str:
    """Write everything, the manifest last; returns the directory's digest.

    guesses.npy: int64 (n, 5).  boxes.npy: (modes, n, 5, 4), given.npy: (1 + modes, n, 4), half-open pixels.  All in the
    order of the index.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a dollar
    directory.mkdir(parents=True, exist_ok=True)
    (directory / manifest.NAME).unlink(missing_ok=True)
    split = shards.split("val")
    arrays = {"guesses.npy": results.guesses, "boxes.npy": results.boxes, "given.npy": results.given}
    for name, array in arrays.items():
        manifest.write_atomically(directory / name, partial(_save, array))
    keys = [split.key(number) for number in range(len(split))]
    devkit.write_predictions(directory / DEVKIT, keys, results.guesses, results.boxes[-1], ids(shards))
    _draw_boxes(directory / PICTURES[0], shards, true, results)
    _draw_overlaps(directory / PICTURES[1], shards, true, results)
    entries = [manifest.file_entry(directory, name) for name in (*arrays, DEVKIT, *PICTURES)]
    body = {"localise": params, "metrics": metrics, "inputs": inputs, "classes_sha256": shards.classes_sha256}
    return manifest.directory_digest(directory, manifest.write(directory, SCHEMA, body, entries))


def ids(shards: ShardSet) -> list[int]:
    """ILSVRC2012_ID of every class: of the edition's table, else its number from 1."""
    path = shards.directory / "synsets.json"
    if not path.exists():
        return list(range(1, len(shards.wnids) + 1))
    import json

    by_wnid = {synset["wnid"]: synset["id"] for synset in json.loads(path.read_text(encoding="utf-8"))}
    return [int(by_wnid[wnid]) for wnid in shards.wnids]


def _save(array: NDArray[Any], file: BinaryIO) -> None:
    np.save(file, array, allow_pickle=False)


def _draw_boxes(path: Path, shards: ShardSet, true: Instances, results: Results) -> None:
    """Images with their true boxes (green) and the merged one of the true class (red): best, worst and random ones."""
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    ious, split = results.given_ious[-1], shards.split("val")
    order = np.argsort(ious, kind="stable")
    scattered = np.random.default_rng(0).permutation(len(ious))
    figure, axes = pyplot.subplots(len(KINDS), EACH, figsize=(2.2 * EACH, 2.6 * len(KINDS)), layout="constrained")
    for kind, numbers, row in zip(KINDS, (order[::-1], order, scattered), axes, strict=True):
        for place, cell in enumerate(row):
            cell.axis("off")
            if place >= len(numbers):
                continue
            number = int(numbers[place])
            cell.imshow(image_of(split, number, shards.manifest["parameters"]["max_pixels"]))
            boxes = [(box, "lime") for box in true.of(number)] + [(results.given[-1, number], "red")]
            for (x1, y1, x2, y2), colour in boxes:
                cell.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=2))
            name = shards.class_names[int(results.labels[number])]
            cell.set_title(f"{kind}: {name[:18]}\nIoU {ious[number]:.2f}", fontsize=9)
    save_figure(figure, path)


def _draw_overlaps(path: Path, shards: ShardSet, true: Instances, results: Results) -> None:
    """Histogram of IoU, and the error by the size and the shape of the largest true box."""
    from matplotlib import pyplot

    index, ious = shards.split("val").rows, results.given_ious[-1]
    sides = np.stack([np.abs(true.of(number)[:, 2:] - true.of(number)[:, :2]).max(0) for number in range(len(ious))])
    share = sides.prod(1) / (index["width"].astype(np.float64) * index["height"])
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    axes[0].hist([ious, results.given_ious[0]], bins=np.linspace(0, 1, 21), label=["merged", "central crop"])
    axes[0].axvline(0.5, color="black", linewidth=1)
    axes[0].set(xlabel="IoU, class given", ylabel="images")
    axes[0].legend()
    by = ((axes[1], share, "box / image area"), (axes[2], sides[:, 0] / sides[:, 1], "width / height"))
    for cell, values, name in by:
        edges = np.unique(np.quantile(values, np.linspace(0, 1, 7)))
        parts = [values <= edges[1:2].max(initial=edges[0])] + [
            (values > low) & (values <= high) for low, high in pairwise(edges[1:])
        ]
        labels = [f"to {values[part].max():.2f}" for part in parts]
        cell.bar(labels, [100 * float((ious[part] < 0.5).mean()) for part in parts])
        cell.set(xlabel=name, ylabel="error %")
    save_figure(figure, path)
