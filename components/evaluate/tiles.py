"""Images of the report: which ones, and how they are shown."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.shards.shardset import ShardSet

SHOWN = 12  # of every kind
SIDE = 160  # longest side of a thumbnail, pixels


@dataclass(frozen=True)
class Kind:
    """Some of the images.  numbers: rows of the predictions."""

    title: str
    text: str
    numbers: NDArray[np.int64]


def kinds(rows: NDArray[np.void]) -> list[Kind]:
    """The most confident errors, the least expected truths, and images that are right.

    rows: vgg.evaluation.predictions.row_type; of their last mode.
    """
    mode = rows["modes"][:, -1]
    wrong, right = np.flatnonzero(mode["rank"] > 0), np.flatnonzero(mode["rank"] == 0)
    confident = wrong[np.argsort(-mode["probabilities"][wrong, 0], kind="stable")]
    surprising = np.setdiff1d(wrong, confident[:SHOWN])
    surprising = surprising[np.argsort(-mode["loss"][surprising], kind="stable")]
    spread = np.linspace(0, len(right) - 1, min(SHOWN, len(right))).astype(int)
    found = [
        Kind("Most confident errors", "The network is sure, and wrong.", confident[:SHOWN]),
        Kind("Most surprising", "Of the other errors, those whose true class seemed least likely.", surprising[:SHOWN]),
        Kind("Right", "Spread over all that are right.", right[spread]),
    ]
    return [kind for kind in found if len(kind.numbers)]


def tiles(shards: ShardSet, rows: NDArray[np.void], numbers: Iterable[int]) -> str:
    """The images with what was predicted, as HTML."""
    split, mode = shards.split("val"), rows["modes"][:, -1]
    found = []
    for number in map(int, numbers):
        guess, truth = int(mode["classes"][number, 0]), int(rows["label"][number])
        probability = 100 * float(mode["probabilities"][number, 0])
        key = split.key(int(rows["number"][number]))
        caption = f"<b>{escape(shards.class_names[guess])}</b> {probability:.0f}&nbsp;%"
        if guess != truth:
            caption += f"<br>true: {escape(shards.class_names[truth])}"
        found.append(
            f'<figure class="tile"><img alt="{escape(key)}" src="{thumbnail(split.read(int(rows["number"][number])))}">'
            f"<figcaption>{caption}<br><code>{escape(key)}</code></figcaption></figure>"
        )
    return f'<div class="tiles">{"".join(found)}</div>'


def thumbnail(jpeg: bytes) -> str:
    """A picture as data: address.  Small images are enlarged by whole factors, so that one sees their pixels."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    longest = max(image.size)
    if longest < SIDE // 2:
        factor = SIDE // longest
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
