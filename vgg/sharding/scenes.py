"""Scenes of handwritten digits with exact boxes: data for localisation that needs no download.

A scene is a canvas of 64 x 64 pixels with noise, and digits of scikit-learn pasted at random size and place: one (70 %
of the scenes), two of the same class (15 %), or one and a smaller, fainter one of another class (15 %).  The class of
the scene is that of the large digits.  Boxes are the bounds of the pasted pixels.  Boxes come as VOC XML in the layout
of ILSVRC's archives.

A scene is a function of its split and number alone, in arithmetic that is the same on every machine: no sines, no sums
whose order is free.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vgg import draws
from vgg.sharding.sources import Digits, Original, Source

SEED = 1
SIDE = 64  # pixels of the canvas
NUM_SCENES = {"train": 3000, "val": 300}
SIZES = (16, 36)  # fewest and most pixels of a digit alone
PAIR_SIZES = (16, 28)  # of one of two digits: both always fit
CLUTTER_SIZES = (10, 14)
ONE, TWO = 0.70, 0.85  # cumulative shares of scenes with one digit, and with two
INK = (180, 240)  # grey levels of a digit
FAINT_INK = (110, 130)
DARK = 90  # the brightest background
VISIBLE = 64  # of 255: the darkest pixel of a digit that is pasted
TRIES = 50  # of a place that is free


@dataclass(frozen=True)
class Pasted:
    """A digit in a scene.

    label: its class index.  ink: grey level.  strength: of the ink, float64 (SIDE, SIDE) from 0 to 1.
    """

    label: int
    ink: float
    strength: NDArray[np.float64]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """bool (SIDE, SIDE): the pixels that were pasted."""
        return self.strength > 0

    @property
    def box(self) -> tuple[int, int, int, int]:
        """xmin, ymin, xmax, ymax: the first and last column and row with a pasted pixel, from 0."""
        mask = self.mask
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


@dataclass(frozen=True)
class Scene:
    """pixels, background: uint8 (SIDE, SIDE, 3), with and without digits.  pasted: the digits, the main one first."""

    pixels: NDArray[np.uint8]
    background: NDArray[np.uint8]
    pasted: list[Pasted]


class Draws:
    """Random numbers of one scene; every call draws new ones."""

    def __init__(self, split: str, number: int) -> None:
        self._counters, self._purpose, self._calls = (SEED, number), f"scenes/{split}", 0

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """float64 of this shape in [0, 1)."""
        self._calls += 1
        places = np.arange(int(np.prod(shape))).reshape(shape)
        return draws.uniform(self._purpose, *self._counters, self._calls, places)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.uniform())

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return low + int(float(self.uniform()) * (high - low + 1))


class DigitScenes(Source):
    """3,000 training and 300 validation scenes, 64x64 JPEGs; the digits of one split are in no scene of the other."""

    def __init__(self) -> None:
        digits = Digits()
        self.classes = digits.classes
        self._digits = digits.images
        self._pools: dict[str, list[list[int]]] = {}
        for split in self.splits:
            self._pools[split] = [[] for _ in self.classes]
            for original in digits.originals(split):
                self._pools[split][original.label].append(int(original.name))

    def originals(self, split: str) -> list[Original]:
        return [
            Original(split, self._key(split, i), self._label(i), name=f"{split}/{i}", stamp="1", size=SIDE**2 * 3)
            for i in range(NUM_SCENES[split])
        ]

    def read(self, original: Original) -> bytes:
        split, number = original.name.split("/")
        file = io.BytesIO()
        Image.fromarray(self.scene(split, int(number)).pixels).save(file, "JPEG", quality=95)
        return file.getvalue()

    def _label(self, number: int) -> int:
        return number % len(self.classes)

    def _key(self, split: str, number: int) -> str:
        wnid = self.classes[self._label(number)].wnid
        return f"{wnid}_{number}" if split == "train" else f"scenes_val_{number + 1:08d}"

    def scene(self, split: str, number: int) -> Scene:
        random = Draws(split, number)
        pasted = self._pasted(random, split, number)  # first: annotations need nothing else
        background = _background(random)
        canvas = background.astype(np.float64)
        for digit in pasted:
            canvas += digit.strength[..., None] * (digit.ink - canvas)
        return Scene(np.rint(canvas).astype(np.uint8), background, pasted)

    def _pasted(self, random: Draws, split: str, number: int) -> list[Pasted]:
        label, share = self._label(number), float(random.uniform())
        labels, inks = [label], [random.between(*INK)]
        sizes = [random.integer(*(PAIR_SIZES if ONE <= share < TWO else SIZES))]
        if ONE <= share < TWO:
            labels.append(label)
            sizes.append(random.integer(*PAIR_SIZES))
            inks.append(inks[0])
        elif share >= TWO:
            labels.append((label + random.integer(1, len(self.classes) - 1)) % len(self.classes))
            sizes.append(random.integer(*CLUTTER_SIZES))
            inks.append(random.between(*FAINT_INK))
        found = []
        for which, (left, top) in enumerate(_places(random, sizes)):
            strength = np.zeros((SIDE, SIDE))
            window = slice(top, top + sizes[which]), slice(left, left + sizes[which])
            strength[window] = _enlarged(self._digit(split, labels[which], number, which), sizes[which])
            found.append(Pasted(labels[which], inks[which], strength))
        return found

    def _digit(self, split: str, label: int, number: int, which: int) -> NDArray[np.uint8]:
        """An 8x8 digit of the split.  In turn, so that all are used; the two of a scene are half a round apart."""
        pool = self._pools[split][label]
        order = draws.permutation(f"scenes/{split}/order", len(pool), SEED, label)
        turn = number // len(self.classes) + which * (len(pool) // 2)
        digit: NDArray[np.uint8] = self._digits[pool[order[turn % len(pool)]]]
        return digit

    def annotations(self, split: str) -> Iterator[tuple[str, bytes]]:
        """Path and VOC XML for every scene: <wnid>/<key>.xml for training, val/<key>.xml for validation."""
        for number in range(NUM_SCENES[split]):
            key = self._key(split, number)
            folder = self.classes[self._label(number)].wnid if split == "train" else split
            boxes = [(self.classes[p.label].wnid, p.box) for p in self._pasted(Draws(split, number), split, number)]
            yield f"{folder}/{key}.xml", voc_xml(key, SIDE, SIDE, boxes)

    def annotation_archive(self, split: str) -> bytes:
        """annotations() as a tar, not compressed: compressors differ from machine to machine, these bytes do not."""
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, xml in self.annotations(split):
                info = tarfile.TarInfo(name)
                info.size = len(xml)
                tar.addfile(info, io.BytesIO(xml))
        return file.getvalue()


def voc_xml(key: str, width: int, height: int, boxes: list[tuple[str, tuple[int, int, int, int]]]) -> bytes:
    """An annotation with the elements of ILSVRC's.  boxes: WNID and xmin, ymin, xmax, ymax."""
    objects = "".join(
        f"\t<object>\n\t\t<name>{wnid}</name>\n\t\t<pose>Unspecified</pose>\n\t\t<truncated>0</truncated>\n"
        f"\t\t<difficult>0</difficult>\n\t\t<bndbox>\n\t\t\t<xmin>{xmin}</xmin>\n\t\t\t<ymin>{ymin}</ymin>\n"
        f"\t\t\t<xmax>{xmax}</xmax>\n\t\t\t<ymax>{ymax}</ymax>\n\t\t</bndbox>\n\t</object>\n"
        for wnid, (xmin, ymin, xmax, ymax) in boxes
    )
    return (
        f"<annotation>\n\t<folder>{key.split('_')[0]}</folder>\n\t<filename>{key}</filename>\n"
        "\t<source>\n\t\t<database>digit scenes</database>\n\t</source>\n"
        f"\t<size>\n\t\t<width>{width}</width>\n\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>\n"
        f"\t<segmented>0</segmented>\n{objects}</annotation>\n"
    ).encode()


def _background(random: Draws) -> NDArray[np.uint8]:
    """A slope, blotches and noise, dark and tinted."""
    across = np.arange(SIDE) / (SIDE - 1) - 0.5
    level = random.between(30, 70) + random.between(-40, 40) * across + random.between(-40, 40) * across[:, None]
    small = Image.fromarray((random.uniform(5, 5) * 256).astype(np.uint8))
    blotches = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255 - 0.5
    level = level + random.between(0, 50) * blotches
    tint = 0.8 + 0.2 * random.uniform(3)
    noise = random.between(5, 30) * (random.uniform(SIDE, SIDE, 3) - 0.5)
    return np.clip(np.rint(level[..., None] * tint + noise), 0, DARK).astype(np.uint8)


def _enlarged(digit: NDArray[np.uint8], size: int) -> NDArray[np.float64]:
    """The strength of a digit's ink, float64 (size, size) from 0 to 1; what is hardly visible is 0."""
    large = np.asarray(Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC))
    return np.where(large > VISIBLE, large / 255, 0.0)


def _places(random: Draws, sizes: list[int]) -> list[tuple[int, int]]:
    """Left and top of one or two squares on the canvas that do not overlap."""
    places = [(0, 0), (SIDE - sizes[-1], SIDE - sizes[-1])]  # of two, should no try succeed
    for _ in range(TRIES):
        found = [(random.integer(0, SIDE - size), random.integer(0, SIDE - size)) for size in sizes]
        if len(found) == 1 or not _overlap(found, sizes):
            return found
    return places


def _overlap(places: list[tuple[int, int]], sizes: list[int]) -> bool:
    (left, top), (other_left, other_top) = places
    size, other = sizes
    return -other < other_left - left < size and -other < other_top - top < size
