"""The convolutions of a network in evaluation mode on images of any size: five stages, each with its pooling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional

# torch convolves a single image of at most so many numbers by another kernel (use_mkldnn in aten's Convolution.cpp),
# and an image's result must not depend on what else is computed
OTHER_KERNEL = 20480
CACHED_BYTES = 8 * 2**20  # of a map: what is larger leaves the caches of a CPU between two layers


class Stage(nn.Module):
    """Convolutions, each with what follows it (ReLU, batch or response normalisation), then 2x2 max-pooling.

    On a CPU large maps are computed in strips of rows that stay in its caches, a third faster at full size, and many
    small ones some at a time.  A strip has so many rows more on both sides as its convolutions reach, so every number
    is the same.
    """

    def __init__(self, layers: Iterable[nn.Module], ceil_pooling: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.ceil_pooling = ceil_pooling
        convolutions = [layer for layer in self.layers if isinstance(layer, nn.Conv2d)]
        self.reach = sum(int(layer.padding[0]) for layer in convolutions)
        self.channels = max(layer.out_channels for layer in convolutions)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """maps: (n, channels, h, w), channels last.  Returns half of h and w, rounded down unless ceil_pooling."""
        row_bytes = self.channels * maps.shape[3] * maps.element_size()
        image_bytes = row_bytes * maps.shape[2]
        if maps.device.type != "cpu" or image_bytes * len(maps) <= CACHED_BYTES:
            return self._pooled(self._convolved(maps))
        if image_bytes <= CACHED_BYTES:  # small images: some at a time
            parts = torch.split(maps, CACHED_BYTES // image_bytes)
            return torch.cat([self._pooled(self._convolved(part)) for part in parts])
        # even, so that poolings do not cross strips
        rows = max(16, CACHED_BYTES // row_bytes // 2 * 2)
        return torch.cat([torch.cat(list(self._strips(image[None], rows)), 2) for image in maps])

    def _strips(self, image: torch.Tensor, rows: int) -> Iterator[torch.Tensor]:
        height = image.shape[2]
        for top in range(0, height if self.ceil_pooling else height // 2 * 2, rows):
            first, last = max(0, top - self.reach), min(height, top + rows + self.reach)
            found = self._convolved(image[:, :, first:last])
            yield self._pooled(found[:, :, top - first : min(height, top + rows) - first])

    def _convolved(self, maps: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if isinstance(layer, nn.LocalResponseNorm):  # sums of squares need the precision of float32
                maps = layer(maps.float()).to(maps.dtype)
            elif len(maps) == 1 and maps.numel() <= OTHER_KERNEL and isinstance(layer, nn.Conv2d):
                maps = layer(torch.cat([maps, maps]))[:1]
            else:
                maps = layer(maps)
        return maps

    def _pooled(self, maps: torch.Tensor) -> torch.Tensor:
        if maps.device.type != "cpu" or self.ceil_pooling:
            return functional.max_pool2d(maps, 2, 2, ceil_mode=self.ceil_pooling)
        # max_pool2d takes up to four times as long for channels-last maps
        even = maps[:, :, : maps.shape[2] // 2 * 2, : maps.shape[3] // 2 * 2]
        rows = torch.maximum(even[:, :, ::2], even[:, :, 1::2])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


def stages_of(features: Iterable[nn.Module], ceil_pooling: bool, dtype: torch.dtype) -> nn.Sequential:
    """The stages of VGG.features, convolutions in dtype.  ceil_pooling: round the size of pooled maps up."""
    stages: list[Stage] = []
    layers: list[nn.Module] = []
    for module in features:
        if isinstance(module, nn.MaxPool2d):
            stages.append(Stage(layers, ceil_pooling))
            layers = []
        else:
            layers.append(_converted(module, dtype) if isinstance(module, nn.Conv2d) else module)
    return nn.Sequential(*stages)


def _converted(layer: nn.Conv2d, dtype: torch.dtype) -> nn.Conv2d:
    """The layer in dtype, with its kernel laid out for channels-last maps once."""
    with torch.device("meta"):
        converted = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)  # type: ignore[arg-type]
    weight = layer.weight.detach().to(dtype, memory_format=torch.channels_last)
    assert layer.bias is not None
    converted.weight = nn.Parameter(weight, requires_grad=False)
    converted.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return converted
