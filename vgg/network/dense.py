"""Dense evaluation (§3.2): the network applied to whole images.

fc6 becomes a convolution of the size of its training input, fc7 and fc8 become 1x1 convolutions.  Here fc6 is a matrix
product: of the windows of the last map, gathered from images of any sizes, with one matrix.  That is 9 times as fast as
the convolution on a CPU, whose kernel of 411 MB is laid out anew at every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional

from vgg.network.model import STRIDE, VGG
from vgg.network.stages import stages_of

# Rows of a matrix product: BLOCK, and the last ones filled up to a multiple of SMALLEST_BLOCK.  A row's result must not
# depend on what else is computed, and for few rows libraries sum in another order (measured on a CPU: below 64).
BLOCK, SMALLEST_BLOCK = 512, 64


class DenseVGG(nn.Module):
    """A network in evaluation mode, taken apart: maps of whole images, their windows, and fc6 to fc8 on windows.

    A crop of the training size has one window, so the same three steps make both evaluations.
    ceil_pooling: round the size of pooled maps up, as Caffe did; no difference if sides are multiples of 32.
    dtype: of convolutions, fc6 and fc7; fc8 is computed in float32.
    """

    def __init__(self, model: VGG, ceil_pooling: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.side = model.architecture.input_size // STRIDE
        self.features = stages_of(model.features, ceil_pooling, dtype)
        fc6, fc7, fc8 = (module for module in model.classifier if isinstance(module, nn.Linear))
        # columns in the order of a window in memory: row, column, channel
        planes = fc6.weight.detach().view(fc6.out_features, -1, self.side, self.side)
        kernel = planes.permute(0, 2, 3, 1).reshape(fc6.out_features, -1)
        self.fc6 = _linear(kernel, fc6.bias, dtype)
        self.fc7 = _linear(fc7.weight, fc7.bias, dtype)
        self.fc8 = _linear(fc8.weight, fc8.bias, torch.float32)

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """The last pooled map, dtype (n, channels, h, w).  images: float (n, 3, H, W), H and W >= input_size.

        Unless ceil_pooling is set, h is H // 32.  Raises ValueError if the image is too small.
        """
        maps: torch.Tensor = self.features(images.to(self.dtype, memory_format=torch.channels_last))
        if min(maps.shape[2:]) < self.side:
            raise ValueError(
                f"images: {tuple(images.shape[2:])} pixels, both sides must be {self.side * STRIDE} or more"
            )
        return maps

    def windows(self, maps: torch.Tensor) -> torch.Tensor:
        """All windows of the size of fc6, as rows: (n, positions, side * side * channels)."""
        windows = maps.permute(0, 2, 3, 1).unfold(1, self.side, 1).unfold(2, self.side, 1)
        return windows.permute(0, 1, 2, 4, 5, 3).flatten(1, 2).flatten(2)

    def hidden(self, windows: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """fc7 after its ReLU, dtype (n, positions, classifier_width), for every element of windows()."""
        shapes: list[torch.Size] = []

        def rows() -> Iterator[torch.Tensor]:
            for each in windows:
                shapes.append(each.shape)
                yield each.flatten(0, 1)

        ready: list[torch.Tensor] = []
        for block in _blocks(rows()):
            ready.append(functional.relu(self.fc7(functional.relu(self.fc6(block)))))
            while shapes and sum(map(len, ready)) >= shapes[0][0] * shapes[0][1]:
                shape, found = shapes.pop(0), torch.cat(ready)
                size = shape[0] * shape[1]
                ready = [found[size:]]
                yield found[:size].view(shape[0], shape[1], -1)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Class scores before the softmax, float32 (n, classes), of outputs of fc7, (n, classifier_width)."""
        return torch.cat([self.fc8(block) for block in _blocks([hidden.float()])])[: len(hidden)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores at every position, float32 (n, classes, h, w).  images: see maps().

        Unless ceil_pooling is set, h is H // 32 - input_size // 32 + 1.
        """
        maps = self.maps(images)
        [hidden] = self.hidden([self.windows(maps)])
        scores = self.scores(hidden.flatten(0, 1))
        height, width = (side - self.side + 1 for side in maps.shape[2:])
        return scores.view(len(images), height, width, -1).permute(0, 3, 1, 2)


def _linear(weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear


def _blocks(rows: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The rows in blocks of BLOCK; the last one is filled up with zeros."""
    waiting: list[torch.Tensor] = []
    count = 0
    for each in rows:
        for part in torch.split(each, BLOCK):
            waiting.append(part)
            count += len(part)
            if count >= BLOCK:
                joined = torch.cat(waiting)
                yield joined[:BLOCK]
                waiting, count = [joined[BLOCK:]], count - BLOCK
    if count:
        joined = torch.cat(waiting)
        yield functional.pad(joined, (0, 0, 0, -count % SMALLEST_BLOCK))
