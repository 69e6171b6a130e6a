"""Joins annotations with the images of a split, by name, and cleans their boxes up.  Whatever is odd is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from runtime.shards.shardset import Split
from vgg.localisation.annotations import shown
from vgg.localisation.voc import Annotation

LISTED = 100  # names of each kind that a manifest holds
OnMismatch = Literal["fail", "scale", "drop"]
Row = tuple[int, int, int, int, int, int]  # number of the image, label, xmin, ymin, xmax, ymax

KINDS = {  # of anomalies
    "rounded": "annotations with coordinates that are no whole numbers, rounded",
    "swapped": "boxes with first and last column or row swapped, put right",
    "other_size": "annotations of an image of another size than the packed one",
    "outside": "boxes that reach out of the image, cut",
    "empty": "boxes with nothing in the image, left out",
    "other_class": "boxes of another class than the image's, kept but not used",
    "without_image": "annotations without an image, ignored",
    "without_annotation": "images without an annotation",
    "without_box": "images whose annotation has no box of their class",
}


class Anomalies:
    """Counts what is odd, by kind (KINDS), and keeps the first names of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def note(self, kind: str, name: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= LISTED:
            self._names.setdefault(kind, []).append(shown(name))

    def described(self) -> dict[str, dict[str, Any]]:
        """count and the first names, sorted, of every kind that occurs."""
        return {kind: {"count": self.counts[kind], "first": sorted(names)} for kind, names in self._names.items()}


class Join:
    """The boxes of a split's annotations.

    pixel_origin: of the files, 0 or 1.  After add() of all annotations and finish():
    rows: of all boxes, in the order of the images.  anomalies: what was odd.
    num_own_boxes: boxes of their image's class.  without_box: images without one.
    Faults, a line each: mismatched (annotations of another size), several (annotations of one image), ambiguous
    (annotations that could be of several images).
    """

    def __init__(
        self, split: Split, wnids: list[str], renamed: Mapping[str, str], pixel_origin: int, on_mismatch: OnMismatch
    ) -> None:
        """renamed: path in the source of those images whose key does not show it."""
        self._split, self._origin, self._on_mismatch = split, pixel_origin, on_mismatch
        self._labels = {wnid: label for label, wnid in enumerate(wnids)}
        self._image_labels = split.rows["label"].astype(np.int64)
        self._sizes = np.stack([split.rows["width"], split.rows["height"]], axis=1).astype(np.int64)
        self._names = Names(split, wnids, self._labels, renamed)
        self._rows: dict[int, list[Row]] = {}
        self.anomalies = Anomalies()
        self.mismatched: list[str] = []
        self.several: list[str] = []
        self.ambiguous: list[str] = []
        self.rows: list[Row] = []
        self.num_own_boxes, self.without_box = 0, list[int]()

    @property
    def num_joined(self) -> int:
        """Images with an annotation so far."""
        return len(self._rows)

    def add(self, annotation: Annotation) -> None:
        numbers = self._names.find(annotation.path)
        if len(numbers) > 1:
            keys = " and ".join(self._split.key(number) for number in numbers[:2])
            self.ambiguous.append(f"{shown(annotation.path)}: of {keys}?")
        elif not numbers:
            self.anomalies.note("without_image", annotation.path)
        elif numbers[0] in self._rows:
            self.several.append(f"{shown(annotation.path)}: {self._split.key(numbers[0])} has another annotation")
        else:
            self._rows[numbers[0]] = list(self._cleaned(numbers[0], annotation))

    def _cleaned(self, number: int, annotation: Annotation) -> Iterator[Row]:
        """The order is that of the reference: swap, bring to the image's size, cut, leave out what is empty."""
        key, (width, height) = self._split.key(number), self._sizes[number].tolist()
        if annotation.is_rounded:
            self.anomalies.note("rounded", key)
        scale = (1.0, 1.0)
        if annotation.size and annotation.size != (width, height):
            told = f"{annotation.size[0]} x {annotation.size[1]}"
            self.anomalies.note("other_size", key)
            self.mismatched.append(f"{key}: its annotation says {told}, the image is {width} x {height}")
            if self._on_mismatch == "drop":
                return
            scale = (width / annotation.size[0], height / annotation.size[1])
        for box in annotation.boxes:
            name = f"{key}: {shown(box.wnid)} {box.xmin} {box.ymin} {box.xmax} {box.ymax}"
            if box.xmin > box.xmax or box.ymin > box.ymax:
                self.anomalies.note("swapped", name)
            left, right = self._side(box.xmin, box.xmax, scale[0])
            top, bottom = self._side(box.ymin, box.ymax, scale[1])
            if min(left, top) < 0 or right > width or bottom > height:
                self.anomalies.note("outside", name)
                left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
            if left >= right or top >= bottom:
                self.anomalies.note("empty", name)
                continue
            label = self._labels.get(box.wnid, -1)
            if label != self._image_labels[number]:
                self.anomalies.note("other_class", name)
            o = self._origin
            yield number, label, left + o, top + o, right + o - 1, bottom + o - 1

    def _side(self, first: int, last: int, scale: float) -> tuple[int, int]:
        """Half-open pixels of the image, from 0, from the first and last pixel in the file; at least one pixel."""
        first, last = min(first, last) - self._origin, max(first, last) - self._origin + 1
        if scale == 1:
            return first, last
        start = int(np.rint(first * scale))
        return start, max(start + 1, int(np.rint(last * scale)))

    def finish(self) -> None:
        self.rows = [row for number in sorted(self._rows) for row in self._rows[number]]
        has_box = np.zeros(len(self._split), bool)
        for number, label, *_ in self.rows:
            if label == self._image_labels[number]:
                has_box[number] = True
                self.num_own_boxes += 1
        self.without_box = np.flatnonzero(~has_box).tolist()
        for number in self.without_box:
            kind = "without_box" if number in self._rows else "without_annotation"
            self.anomalies.note(kind, self._split.key(number))

    def missing(self) -> list[str]:
        """A line for every image without a box of its class.  After finish()."""
        return [f"{self._split.key(number)}: {self._why(number)}" for number in self.without_box]

    def _why(self, number: int) -> str:
        if number not in self._rows:
            return "no annotation"
        return "only boxes of other classes" if self._rows[number] else "its annotation has no box that can be used"


class Names:
    """Finds the image of an annotation by its path."""

    def __init__(self, split: Split, wnids: list[str], labels: Mapping[str, int], renamed: Mapping[str, str]) -> None:
        """renamed: path in the source, <split>/<class>/…, by key."""
        self._split, self._wnids, self._labels, self._renamed = split, wnids, labels, renamed
        self._by_key = {bytes(key): number for number, key in enumerate(split.rows["key"])}
        self._by_path: dict[str, list[int]] = {}
        for key, name in renamed.items():
            if (number := self._by_key.get(key.encode())) is not None:  # None: it was unusable and left out
                self._by_path.setdefault(_without_ending(name.partition("/")[2]), []).append(number)

    def find(self, path: str) -> list[int]:
        """The image; none, or several if the path does not tell which.

        path: <folder>/<name>, as in <wnid>/<wnid>_<number>; folders before are ignored, the last one may be missing.
        """
        folder, _, name = path.rpartition("/")
        folder = folder.rpartition("/")[2]
        for key in (f"{folder}_{name}", name):  # keys begin with the class
            number = self._by_key.get(key.encode("utf-8", "surrogateescape"))
            # an image of a class is not the one that another class's folder means
            if number is not None and self._labels.get(folder, self._label(number)) == self._label(number):
                return [number]
        parts = path.split("/")
        for start in range(len(parts)) if self._by_path else ():
            if found := self._by_path.get("/".join(parts[start:])):
                return found
        return [] if folder in self._labels else self._by_name.get(name, [])

    def _label(self, number: int) -> int:
        return int(self._split.rows["label"][number])

    @cached_property
    def _by_name(self) -> dict[str, list[int]]:
        """By the name of the file alone, for annotations that are in no class folder."""
        found: dict[str, list[int]] = {}
        for key, number in self._by_key.items():
            in_text = key.decode()
            name = self._renamed.get(in_text)
            wnid = self._wnids[self._label(number)]
            own = in_text.removeprefix(f"{wnid}_") if name is None else _without_ending(name.rpartition("/")[2])
            found.setdefault(own, []).append(number)
        return found


def _without_ending(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
