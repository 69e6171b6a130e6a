"""What one looks at in the page: images with boxes, the overlaps, and the error by the size and shape of the boxes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from components.evaluate.drawings import Bar, bars
from components.evaluate.tiles import SHOWN, Kind, thumbnail
from runtime.shards.shardset import ShardSet
from vgg.evaluation.predictions import wilson
from vgg.localisation.instances import Instances
from vgg.localisation.metric import THRESHOLD
from vgg.localisation.results import Results

TRUE, FOUND = "#2da44e", "#ff4d1c"
BINS = 20  # of the IoU
PARTS = 6  # of the images, by size or shape
LEGEND = (
    f'<p class="quiet"><svg class="key" viewBox="0 0 26 8"><path d="M1 4h24" stroke="{TRUE}" stroke-width="3"/></svg> '
    f'true &ensp; <svg class="key" viewBox="0 0 26 8"><path d="M1 4h24" stroke="{FOUND}" stroke-width="3" '
    'stroke-dasharray="6 3"/></svg> found, for the true class</p>'
)
STYLE = """
.tile svg { width: 160px; max-width: 100%; display: block; margin-bottom: .3rem }
.tile rect { fill: none; stroke-width: 2.5; vector-effect: non-scaling-stroke }
.pairs { grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)) }
svg.key { width: 26px; height: 8px; vertical-align: middle }
"""


def kinds(results: Results) -> list[Kind]:
    """The best, the worst, and random ones of the images that count, by the IoU of the true class's merged box."""
    ious, counted = results.given_ious[-1], np.flatnonzero(results.counted)
    order = counted[np.argsort(-ious[counted], kind="stable")]
    scattered = np.random.default_rng(0).permutation(counted)
    return [
        Kind("Best", "The boxes that overlap most.", order[:SHOWN]),
        Kind("Worst", "The boxes that overlap least.", order[::-1][:SHOWN]),
        Kind("Random", "Drawn from all images; the same ones in every evaluation of these shards.", scattered[:SHOWN]),
    ]


def tiles(shards: ShardSet, true: Instances, results: Results, numbers: Iterable[int]) -> str:
    """The images with their true boxes and the merged one of their class, as HTML."""
    split, rows = shards.split("val"), shards.split("val").rows
    found = []
    for number in map(int, numbers):
        width, height = int(rows["width"][number]), int(rows["height"][number])
        label, guess = int(results.labels[number]), int(results.guesses[number, 0])
        boxes = "".join(_outline(box, TRUE, "") for box in true.of(number))
        boxes += _outline(results.given[-1, number], FOUND, ' stroke-dasharray="7 4"')
        key, iou = split.key(number), f"IoU {results.given_ious[-1, number]:.2f}"
        name = escape(shards.class_names[label])
        caption = f"<b>{name}</b> {iou}"
        if guess != label:
            caption += f"<br>taken for: {escape(shards.class_names[guess])}"
        found.append(
            f'<figure class="tile"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}, {iou}">'
            f'<image width="{width}" height="{height}" href="{thumbnail(split.read(number))}"/>{boxes}</svg>'
            f"<figcaption>{caption}<br><code>{escape(key)}</code></figcaption></figure>"
        )
    return f'<div class="tiles">{"".join(found)}</div>'


def _outline(box: NDArray[np.float64], colour: str, more: str) -> str:
    x1, y1, x2, y2 = box.tolist()
    return f'<rect x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}" stroke="{colour}"{more}/>'


def overlaps(results: Results) -> str:
    """Histogram of the IoU of the true class's box: merged, and of the central crop."""
    edges = np.linspace(0, 1, BINS + 1)
    of = {"merged": results.given_ious[-1], "central crop": results.given_ious[0]}
    groups = {}
    for name, ious in of.items():
        counts, _ = np.histogram(ious[results.counted], edges)
        groups[name] = [
            Bar(float(count), math.nan, math.nan, f"{name}: {count:,} images, IoU {low:.2f} to {high:.2f}")
            for count, (low, high) in zip(counts.tolist(), pairwise(edges.tolist()), strict=True)
        ]
    labels = [f"{edge:.1f}" if place % 2 == 0 else "" for place, edge in enumerate(edges[:-1].tolist())]
    return bars(groups, labels, "IoU with the class given, from", "images")


def errors_by(results: Results, values: NDArray[np.float64], name: str) -> str:
    """The error of about equally many images each, by a value of every image, float64 (n,)."""
    ious, values = results.given_ious[-1][results.counted], values[results.counted]
    edges = np.unique(np.quantile(values, np.linspace(0, 1, PARTS + 1)))
    part = np.searchsorted(edges[1:-1], values, side="left")  # a value at an edge is in the lower part
    labels, row = [], []
    for number in np.unique(part).tolist():
        chosen = part == number
        wrong, total = int((ious[chosen] < THRESHOLD).sum()), int(chosen.sum())
        low, high = (100 * bound for bound in wilson(wrong, total))
        between = f"{values[chosen].min():.2f} to {values[chosen].max():.2f}"
        labels.append(f"≤ {values[chosen].max():.2f}")
        row.append(Bar(100 * wrong / total, low, high, f"{between}: {wrong:,} of {total:,} images wrong"))
    return bars({"error of the merged box, with its 95 % interval": row}, labels, name, "error, %", 100.0)


def shares_and_aspects(shards: ShardSet, true: Instances) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of the largest true box of every validation image: share of the image's area, and width / height."""
    rows, largest = shards.split("val").rows, true.largest().boxes
    width, height = largest[:, 2] - largest[:, 0], largest[:, 3] - largest[:, 1]
    return width * height / (rows["width"].astype(np.float64) * rows["height"]), width / height
