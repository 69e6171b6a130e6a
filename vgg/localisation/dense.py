"""Boxes at every position of whole images (appendix A): classes by one network, boxes by others, merged.

A position of the last map sees the window of the network's input size with its corner at (32 column, 32 row) of the
rescaled image; the box that the localiser gives there is relative to that window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from vgg.data.augment import Prepare
from vgg.data.windows import Window
from vgg.evaluation.modes import Base
from vgg.evaluation.scaled import centre_crop, size_at
from vgg.evaluation.views import Picture
from vgg.localisation import boxes as geometry
from vgg.localisation.merge import merge
from vgg.localisation.objective import CENTRE, SIDES
from vgg.network.dense import DenseVGG
from vgg.network.model import STRIDE, VGG

MODES = ("best_window", "mean", "merged")  # the last one is the paper's
TOP = 5  # classes of an image
MIN_SIDE = 1.0  # pixels of the rescaled image: a box of a network may have negative sides
Seen = tuple[torch.Tensor, list[torch.Tensor]]  # of a scale: see Dense._seen


@dataclass(frozen=True)
class Net:
    """A network in its dense form, and the preparation of its input."""

    dense: DenseVGG
    prepare: Prepare
    single: bool = False  # of a localiser: one box for all classes

    @classmethod
    def of(
        cls,
        model: VGG,
        pixels: dict[str, list[float]],
        precision: torch.dtype,
        device: torch.device,
        single: bool = False,
    ) -> Net:
        """pixels: "mean" and "std" of R, G, B, 0-255, that were used in training."""
        return cls(
            DenseVGG(model, dtype=precision).eval().to(device),
            Prepare(pixels["mean"], pixels["std"]).to(device),
            single,
        )

    def hidden(self, images: torch.Tensor) -> torch.Tensor:
        """Outputs of fc7 at all positions, (positions, width), of an image, uint8 (h, w, 3), on the device."""
        windows = self.dense.windows(self.dense.maps(self.prepare(images[None])))
        [found] = self.dense.hidden([windows])
        return found[0]


class Found(NamedTuple):
    """The boxes of one image, float64, pixels of the source; they may leave it.

    classes: int64 (k,), the most probable ones.  boxes: (modes, k, 4), theirs in MODES.  given: (1 + modes, 4), of the
    class that is given: of the central crop (Table 8), then in MODES.
    """

    classes: NDArray[np.int64]
    boxes: NDArray[np.float64]
    given: NDArray[np.float64]


class Dense:
    """One classifier and some localisers on whole images.  All have one input size; the first localiser is the own one.

    crop_scale: S, of the central crop.  scales: Q.
    """

    def __init__(
        self, classifier: Net, localisers: Sequence[Net], crop_scale: int, scales: Sequence[int], match: str,
        threshold: float,
    ) -> None:  # fmt: skip
        self.classifier, self.localisers = classifier, localisers
        self.side = classifier.dense.side * STRIDE
        self.crop = Base("centre_crop", crop_scale)
        self.bases = [Base("dense", scale) for scale in sorted(scales)]
        self.match, self.threshold = match, threshold

    @torch.inference_mode()
    def __call__(self, picture: Picture, given: int, posteriors: NDArray[np.float32] | None = None) -> Found:
        """given: a class.  posteriors: of better classifiers, to choose the classes by; else those of this one."""
        seen = [self._seen(picture, base) for base in self.bases]
        own = torch.stack([scores.mean(0).softmax(0) for scores, _ in seen]).mean(0).cpu().numpy()
        top = np.argsort(-(own if posteriors is None else posteriors), kind="stable")[:TOP]
        found = self._boxes(picture, seen, np.append(top, given))
        central = self._central(picture, given)
        return Found(top, found[:, :-1], np.concatenate([central[None], found[:, -1]]))

    @torch.inference_mode()
    def boxes(self, picture: Picture, classes: NDArray[np.int64]) -> NDArray[np.float64]:
        """The boxes of these classes, (modes, k, 4), as __call__ finds them.  The picture needs only self.bases."""
        return self._boxes(picture, [self._seen(picture, base) for base in self.bases], classes)

    def _seen(self, picture: Picture, base: Base) -> Seen:
        """Class scores at all positions of a scale, and the outputs of fc7 of every localiser."""
        image = self._image(picture, base)
        scores = self.classifier.dense.scores(self.classifier.hidden(image))
        return scores, [net.hidden(image) for net in self.localisers]

    def _boxes(self, picture: Picture, seen: Sequence[Seen], classes: NDArray[np.int64]) -> NDArray[np.float64]:
        boxes, weights = [], []
        for base, (at_scale, of_nets) in zip(self.bases, seen, strict=True):
            size = size_at(base, picture.height, picture.width)
            score = at_scale.softmax(1)[:, torch.from_numpy(classes).to(at_scale.device)].T.double().cpu().numpy()
            for net, each in zip(self.localisers, of_nets, strict=True):
                boxes.append(self._in_source(_boxes_of(net, each, classes), _corners(size, self.side), picture, size))
                weights.append(score)
        together, score = np.concatenate(boxes, 1), np.concatenate(weights, 1)
        return np.stack([self._modes(*of_class) for of_class in zip(together, score, strict=True)], 1)

    def _image(self, picture: Picture, base: Base) -> torch.Tensor:
        image = picture.scaled[size_at(base, picture.height, picture.width)]
        return image.to(self.classifier.prepare.mean.device)

    def _central(self, picture: Picture, given: int) -> NDArray[np.float64]:
        """The box of a class in the central crop, (4,), by the own localiser."""
        size, own = size_at(self.crop, picture.height, picture.width), self.localisers[0]
        image = self._image(picture, self.crop)[None]
        corner = np.array([[round((size[1] - self.side) / 2), round((size[0] - self.side) / 2)]], np.float64)
        hidden = own.hidden(centre_crop(image, self.side)[0])
        box: NDArray[np.float64] = self._in_source(_boxes_of(own, hidden, np.array([given])), corner, picture, size)[
            0, 0
        ]
        return box

    def _in_source(
        self, units: torch.Tensor, corners: NDArray[np.float64], picture: Picture, size: tuple[int, int]
    ) -> NDArray[np.float64]:
        """Boxes of the source, (classes, positions, 4), of a network's.  corners: (left, top) of every window."""
        inside = geometry.cornered((units.double().cpu().numpy() + CENTRE) * self.side, MIN_SIDE)
        height, width = size
        whole = Window(0, 0, picture.width, picture.height)
        return geometry.from_crop(inside + np.tile(corners, 2), whole, (width, height))

    def _modes(self, boxes: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """The box of one class in every mode, (modes, 4), of its boxes at all positions, scales and nets."""
        merged = merge(boxes, scores, self.threshold, self.match)
        return np.stack([boxes[scores.argmax()], boxes.mean(0), merged.boxes[merged.scores.argmax()]])


def _corners(size: tuple[int, int], side: int) -> NDArray[np.float64]:
    """(left, top) of the window of every position, float64 (positions, 2), row by row."""
    rows, columns = ((length // STRIDE) - side // STRIDE + 1 for length in size)
    top, left = np.divmod(np.arange(rows * columns), columns)
    return np.stack([left, top], -1) * float(STRIDE)


def _boxes_of(net: Net, hidden: torch.Tensor, classes: NDArray[np.int64]) -> torch.Tensor:
    """Boxes of these classes at all positions, float32 (classes, positions, 4): only their rows of fc8 are used."""
    fc8 = net.dense.fc8
    if net.single:
        return functional.linear(hidden.float(), fc8.weight, fc8.bias)[None].expand(len(classes), -1, -1)
    rows = torch.from_numpy((classes[:, None] * SIDES + np.arange(SIDES)).reshape(-1)).to(hidden.device)
    outputs = functional.linear(hidden.float(), fc8.weight[rows], fc8.bias[rows])
    return outputs.view(len(hidden), len(classes), SIDES).transpose(0, 1)
