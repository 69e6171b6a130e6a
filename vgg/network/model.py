"""The networks of Table 1 (arXiv 1409.1556), with state_dicts compatible with torchvision's VGG."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from vgg import draws

# Five stages, each followed by 2x2 max-pooling.  A number: outputs of a 3x3 convolution; (n, 1): of a 1x1 convolution.
Convolution = int | tuple[int, int]
CONFIGURATIONS: dict[str, tuple[tuple[Convolution, ...], ...]] = {
    "A": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "A-LRN": ((64,), (128,), (256, 256), (512, 512), (512, 512)),  # local response normalisation after the first
    "B": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    "C": ((64, 64), (128, 128), (256, 256, (256, 1)), (512, 512, (512, 1)), (512, 512, (512, 1))),
    "D": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    "E": ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512, 512, 512, 512)),
}
STRIDE = 32  # input pixels per position of the last map, after five poolings


@dataclass(frozen=True)
class Architecture:
    """Determines the shapes of a network.  input_size: pixels, a multiple of 32; classifier_width: of fc6 and fc7."""

    configuration: str
    batch_norm: bool
    classifier_width: int
    num_classes: int
    input_size: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Dropout(nn.Module):
    """In training, zero each output of a layer with probability p and scale the others by 1 / (1 - p).

    The dropped outputs of an image depend only on its key and the layer, not on the state of a generator or on the
    other images of the batch: they are the same for every world size, micro-batch and restart.
    """

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        self.p, self.layer = p, layer

    def forward(self, outputs: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """outputs: float (n, width).  keys: int64 (n,), required in training.  Raises ValueError without keys."""
        if not self.training or not self.p:
            return outputs
        if keys is None:
            raise ValueError("dropout: keys of the batch (Crops.dropout) are required in training")
        columns = torch.arange(1, outputs.shape[1] + 1, device=outputs.device)
        bits = draws.counter_bits(keys[:, None], self.layer, columns)
        keep = (bits >> 40) & (2**24 - 1) >= round(self.p * 2**24)
        return torch.where(keep, outputs * (1 / (1 - self.p)), 0)


class Features(nn.Sequential):
    """The convolutions.  forward is defined here because torch 2.11 does not compile that of torch.nn.Sequential."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for module in self:
            images = module(images)
        return images


class Classifier(nn.Sequential):
    """fc6, fc7, fc8; passes the keys of a batch to the dropout layers."""

    def forward(self, outputs: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        for module in self:
            outputs = module(outputs, keys) if isinstance(module, Dropout) else module(outputs)
        return outputs


class VGG(nn.Module):
    """float (n, 3, input_size, input_size), mean subtracted, to class scores (n, num_classes), before the softmax.

    dropout: its probability.  In training it requires the keys of the images, int64 (n,).

    torchvision pools the last map to 7x7 for any input size.  Here other input sizes raise ValueError, because the
    paper does not average before fc6; for larger images see vgg.network.dense.
    """

    def __init__(self, architecture: Architecture, dropout: float = 0.5) -> None:
        super().__init__()
        self.architecture = architecture
        width, side = architecture.classifier_width, architecture.input_size // STRIDE
        channels = CONFIGURATIONS[architecture.configuration][-1][0]
        assert isinstance(channels, int)
        self.features = _features(architecture)
        self.classifier = Classifier(
            nn.Linear(channels * side * side, width),  # fc6
            nn.ReLU(inplace=True),
            Dropout(dropout, 6),
            nn.Linear(width, width),  # fc7
            nn.ReLU(inplace=True),
            Dropout(dropout, 7),
            nn.Linear(width, architecture.num_classes),  # fc8
        )

    def forward(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        size = self.architecture.input_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images: expected (n, 3, {size}, {size}), got {tuple(images.shape)}")
        scores: torch.Tensor = self.classifier(torch.flatten(self.features(images), 1), keys)
        return scores


def _features(architecture: Architecture) -> Features:
    layers: list[nn.Module] = []
    channels = 3
    for stage in CONFIGURATIONS[architecture.configuration]:
        for convolution in stage:
            outputs, kernel = (convolution, 3) if isinstance(convolution, int) else convolution
            layers.append(nn.Conv2d(channels, outputs, kernel, padding=kernel // 2))
            if architecture.batch_norm:
                layers.append(nn.BatchNorm2d(outputs))
            layers.append(nn.ReLU(inplace=True))
            if architecture.configuration == "A-LRN" and channels == 3:
                # constants of Krizhevsky 2012; torch, like Caffe, divides alpha by the window size
                layers.append(nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0))
            channels = outputs
        layers.append(nn.MaxPool2d(2, 2))
    return Features(*layers)


def blank(architecture: Architecture, dropout: float = 0.5) -> VGG:
    """A network with uninitialised values, for initialise or load_state_dict; torch's random init takes seconds."""
    with torch.device("meta"):
        model = VGG(architecture, dropout)
    # like to_empty(), which imports sympy and takes a second for it
    filled: VGG = model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))  # type: ignore[no-untyped-call]
    return filled
