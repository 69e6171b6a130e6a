"""Files of ILSVRC's devkit for localisation: predictions, and the blacklist of images.

A line of predictions is about one image: "label xmin ymin xmax ymax" of up to five guesses, best first.  The devkit
knows no names: line i belongs to image i in the order of their names.  Labels are the devkit's ids, which start at 1;
absent guesses are zeros, and label 0 is never right.  Both corners of a box belong to it.

Only boxes of whole pixels are written, as boxes.whole_pixels() rounds them.  So the numbers in the file are those that
were scored, and the devkit finds the same error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BadData
from runtime.manifest import write_atomically
from runtime.wording import some
from vgg.evaluation.predictions import TOP
from vgg.localisation.boxes import half_open, inclusive

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def write_predictions(
    path: Path,
    keys: Sequence[str],
    guesses: NDArray[np.integer],
    boxes: NDArray[np.float64],
    ids: Sequence[int],
    origin: int = 0,
) -> None:
    """Write predictions, one line per image, sorted by key.

    keys: of n images, in any order.  guesses: (n, k), k <= TOP, class indices; -1: no guess.  boxes: (n, k, 4),
    half-open, whole pixels.  ids: the devkit's id of every class index.  origin: of the first pixel in the annotations.
    Raises ValueError for other shapes, a key that occurs twice, or boxes that are not whole.
    """
    n, k = guesses.shape
    if len(keys) != n or len(set(keys)) != n or boxes.shape != (n, k, 4) or k > TOP:
        raise ValueError(
            f"n different keys, guesses (n, k), k <= {TOP}, and boxes (n, k, 4) expected, "
            f"got {len(set(keys))} of {len(keys)}, {guesses.shape} and {boxes.shape}"
        )
    made = guesses >= 0
    written = np.zeros((n, k, 5), np.int64)
    written[made, 0] = np.asarray(ids)[guesses[made]]
    written[made, 1:] = corners = inclusive(boxes[made], origin)
    if not np.array_equal(written[made, 1:], corners):
        raise ValueError("boxes: not whole pixels; round them with whole_pixels(), and score the rounded ones")
    rows = written.reshape(n, -1).tolist()
    text = "".join(" ".join(map(str, rows[place])) + "\n" for place in _by_name(keys))
    write_atomically(path, lambda file: file.write(text.encode()))


def read_predictions(
    path: Path, keys: Sequence[str], ids: Sequence[int], origin: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Guesses (n, TOP), class indices or -1, and their boxes (n, TOP, 4), half-open; in the order of `keys`.

    Numbers may have fractions, lines may be short, and guesses after the fifth are ignored, as by the devkit.
    Raises BadData, naming the line, for anything else.
    """
    lines = _text(path.read_bytes(), str(path)).splitlines()
    if len(lines) != len(keys):
        raise BadData(
            f"{path}: {len(lines):,} lines for {len(keys):,} images; expected one line per image of this split, sorted "
            "by name, of zeros where nothing was predicted."
        )
    class_of = {number: label for label, number in enumerate(ids)} | {0: -1}
    values = np.zeros((len(keys), TOP, 5))
    values[..., 0] = -1
    for number, (place, line) in enumerate(zip(_by_name(keys), lines, strict=True), 1):
        words = line.split()
        where = f"{path}: line {number}"
        if not words or len(words) % 5:
            raise BadData(f"{where}: {len(words)} numbers; expected five per guess: label xmin ymin xmax ymax.")
        for at, word in enumerate(words[: 5 * TOP]):
            value = float(word) if NUMBER.fullmatch(word) else np.nan
            if not np.isfinite(value):
                raise BadData(f"{where}: {word!r} is not a number.")
            if at % 5 == 0 and value not in class_of:
                raise BadData(f"{where}: {word!r} is not a label; expected an id of the devkit, or 0 for no guess.")
            values[place, at // 5, at % 5] = value if at % 5 else class_of[int(value)]
    guesses = values[..., 0].astype(np.int64)
    return guesses, np.where(guesses[..., None] < 0, 0.0, half_open(values[..., 1:], origin))


def read_blacklist(data: bytes, name: str, keys: Sequence[str]) -> NDArray[np.bool_]:
    """Which of the images are blacklisted, bool (n,): the file lists numbers of images, from 1, in the order of names.

    data: content of the file.  name: of the file, for messages.
    Raises BadData for anything but different numbers of these images, and for all of them.
    """
    words = _text(data, name).split()
    wrong = [word for word in words if not re.fullmatch(r"\d{1,9}", word, re.ASCII) or not 1 <= int(word) <= len(keys)]
    if wrong or len({int(word) for word in words}) != len(words):
        what = f"{some([repr(word) for word in wrong])} is no image" if wrong else "it names an image twice"
        raise BadData(f"{name}: {what}; expected different numbers from 1 to {len(keys)}.", wrong)
    if len(words) == len(keys):
        raise BadData(f"{name}: names all {len(keys)} images; none would be left to count.")
    blacklisted = np.zeros(len(keys), bool)
    blacklisted[np.array(_by_name(keys), int)[np.array([int(word) - 1 for word in words], int)]] = True
    return blacklisted


def _by_name(keys: Sequence[str]) -> list[int]:
    """The places of the keys in their sorted order, which is that of the devkit's files."""
    return sorted(range(len(keys)), key=keys.__getitem__)


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise BadData(f"{name}: not a text file of numbers.") from None
