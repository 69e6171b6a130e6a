"""Dense evaluation (§3.2): the network applied to whole images.

fc6 becomes a convolution of the size of its training input, fc7 and fc8 become 1x1 convolutions, and the class scores
are averaged over all positions.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vgg.network.model import STRIDE, VGG


class DenseVGG(nn.Module):
    """The fully convolutional form of a network, with shared weights.

    ceil_pooling: round the size of pooled maps up, as Caffe did; no difference if sides are multiples of 32.
    per_position: softmax at every position, then average.
    """

    def __init__(self, model: VGG, ceil_pooling: bool = False, per_position: bool = False) -> None:
        super().__init__()
        self.per_position = per_position
        self.side = model.architecture.input_size // STRIDE
        self.features = nn.Sequential(
            *(nn.MaxPool2d(2, 2, ceil_mode=ceil_pooling) if isinstance(m, nn.MaxPool2d) else m for m in model.features)
        )
        self.fully_connected = [m for m in model.classifier if isinstance(m, nn.Linear)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class probabilities of whole images, float32 (n, classes).  images: see score_map.

        The paper averages the score map over positions before the softmax (§3.2); per_position: after it.
        """
        return self.with_embedding(images)[0]

    def with_embedding(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class probabilities as of forward(), and the embedding, float32 (n, classifier_width).

        The embedding is fc7 after its ReLU, averaged over positions.
        """
        scores, activations = self.score_map(images)
        maps = scores.float()
        posteriors = maps.softmax(1).mean((2, 3)) if self.per_position else maps.mean((2, 3)).softmax(1)
        return posteriors, activations.float().mean((2, 3))

    def score_map(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class scores (n, classes, h, w), and fc7 after its ReLU (n, classifier_width, h, w), at every position.

        images: float (n, 3, H, W), H and W >= input_size.

        Unless ceil_pooling is set, h is H // 32 - input_size // 32 + 1.  Raises ValueError if the image is too small.
        """
        maps: torch.Tensor = self.features(images)
        if min(maps.shape[2:]) < self.side:
            raise ValueError(
                f"images: {tuple(images.shape[2:])} pixels, both sides must be {self.side * STRIDE} or more"
            )
        for number, layer in enumerate(self.fully_connected):
            side = self.side if number == 0 else 1
            kernel = layer.weight.view(layer.out_features, -1, side, side)
            inputs = functional.relu(maps) if number else maps
            maps = functional.conv2d(inputs, kernel, layer.bias)
        return maps, inputs
