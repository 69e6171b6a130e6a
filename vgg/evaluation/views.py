"""The network on images of any sizes: posteriors of every mode, and embeddings.

An image's numbers do not depend on the images that are computed with it.  Convolutions run on images of one size,
because padding would change scores; fc6 to fc8 on the windows of all of them together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vgg.data.augment import Prepare
from vgg.evaluation.modes import Base, Mode, bases_of, mirrored, modes_of
from vgg.evaluation.scaled import Size, crops_of, resize, size_at, sizes_of
from vgg.network.dense import DenseVGG
from vgg.network.model import VGG
from vgg.network.precision import precision_on
from vgg.params.evaluate import EvaluateParams


@dataclass(frozen=True)
class Picture:
    """An image at every size that the bases need.  height, width: of the source.  scaled: uint8 (h, w, 3) by size."""

    height: int
    width: int
    scaled: dict[Size, torch.Tensor]

    @classmethod
    def of(cls, image: torch.Tensor, bases: Sequence[Base], kernel: str) -> Picture:
        """image: uint8 (h, w, 3).  kernel: as of resize()."""
        height, width = image.shape[:2]
        sizes = sizes_of(bases, height, width)
        return cls(height, width, {size: resize(image[None], *size, kernel)[0] for size in sizes})


@dataclass(frozen=True)
class Outputs:
    """posteriors: float32 (images, modes, classes).  embeddings: float32 (images, classifier_width), if wanted."""

    posteriors: torch.Tensor
    embeddings: torch.Tensor | None


class Views:
    """A network and its modes; the last one is the headline.

    pixels: "mean" and "std" of R, G, B, 0-255, that were used in training.  only_headline: no other mode.
    """

    def __init__(
        self,
        params: EvaluateParams,
        model: VGG,
        pixels: dict[str, list[float]],
        device: torch.device,
        only_headline: bool = False,
    ) -> None:
        self.params, self.device = params, device
        self.modes: list[Mode] = modes_of(params)[-1:] if only_headline else modes_of(params)
        self.bases = list(self.modes[0].bases) if only_headline else bases_of(params)
        self.precision = precision_on(params.precision, device)
        self.net = DenseVGG(model, params.ceil_pooling, self.precision).eval().to(device)
        self.prepare = Prepare(pixels["mean"], pixels["std"]).to(device)
        self.side = model.architecture.input_size

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Picture], embed: bool = False) -> Outputs:
        """embed: also embeddings, of the headline mode: fc7 after its ReLU, averaged over positions and views."""
        maps, places = [], []
        for place, images in self._batches(pictures):
            maps.append(self.net.maps(images))
            places.append(place)
        found: dict[Base, list[list[torch.Tensor]]] = {base: [[] for _ in pictures] for base in self.bases}
        hidden: dict[Base, list[list[torch.Tensor]]] = {base: [[] for _ in pictures] for base in self.bases if embed}
        windows = (self.net.windows(each) for each in maps)
        for place, activations in zip(places, self.net.hidden(windows), strict=True):
            means = activations.float().mean(1)
            for (base, number), result, mean in zip(place, self._results(activations, means), means, strict=True):
                found[base][number].append(result)
                if embed:
                    hidden[base][number].append(mean)
        averaged = {base: _averaged(results) for base, results in found.items()}
        posteriors = torch.stack([self._mode(mode, averaged) for mode in self.modes], 1)
        embeddings = _mean([_averaged(hidden[base]) for base in self.modes[-1].bases]) if embed else None
        return Outputs(posteriors, embeddings)

    def _results(self, activations: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """Posteriors of views, or their scores if those are averaged: float32 (n, classes).

        activations: fc7, (n, positions, classifier_width); means: over positions, float32.  fc8 is linear, so it gives
        the mean of the scores over positions when applied to the mean of its inputs.
        """
        if self.params.softmax == "per_position":
            scores = self.net.scores(activations.flatten(0, 1)).softmax(1)
            return scores.view(*activations.shape[:2], -1).mean(1)
        scores = self.net.scores(means)
        return scores if self.params.average == "scores" else scores.softmax(1)

    def _mode(self, mode: Mode, averaged: dict[Base, torch.Tensor]) -> torch.Tensor:
        """Posteriors of a mode.  Methods count equally, as do the scales of each."""
        found = _mean([averaged[base] for base in mode.bases])
        return found.softmax(1) if self.params.average == "scores" else found

    def _batches(self, pictures: Sequence[Picture]) -> Iterator[tuple[list[tuple[Base, int]], torch.Tensor]]:
        """Inputs of the network, of one size within batch_pixels, and the base and picture of each."""
        pieces: dict[Size, list[tuple[Base, int, torch.Tensor]]] = defaultdict(list)
        for number, picture in enumerate(pictures):
            for base in self.bases:
                image = picture.scaled[size_at(base, picture.height, picture.width)]
                for crop in crops_of(base, image[None], self.side):
                    pieces[(crop.shape[0], crop.shape[1])].append((base, number, crop))
        for (height, width), found in pieces.items():
            views = 2 if self.params.flip else 1
            batch = max(1, self.params.batch_pixels // (views * height * width))
            for first in range(0, len(found), batch):
                part = found[first : first + batch]
                images = self.prepare(self._to_device(torch.stack([crop for _, _, crop in part])))
                place = [(base, number) for base, number, _ in part]
                again = [i for i, (base, _) in enumerate(place) if mirrored(base.method, self.params.flip)]
                if again:
                    images = torch.cat([images, images[again].flip(-1)])
                    place += [place[i] for i in again]
                yield place, images

    def _to_device(self, images: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda" and images.device.type == "cpu":
            return images.pin_memory().to(self.device, non_blocking=True)
        return images.to(self.device)


def _mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(values)).mean(0)


def _averaged(results: list[list[torch.Tensor]]) -> torch.Tensor:
    """Mean of every picture's results: (pictures, …).  All have equally many."""
    return torch.stack([torch.stack(each) for each in results]).mean(1)
