"""The gradients of a VGG network: sizes, when they are there, DDP's groups, what of their exchange is not hidden.

On a GPU the classifier and the convolutions are two compiled regions (vgg.training.run.start): the gradients of each
are there when its whole backward pass is, fc6 to fc8 first.  DDP sends them in buckets, one after the other.
Times are in seconds, sizes in bytes, rates per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vgg.network.model import VGG, Architecture

BF16, FP32 = 2, 4
MIB = 2**20
LIMITS = (MIB, 25 * MIB)  # of DDP's first bucket and of the others; connect() leaves them at their defaults


@dataclass(frozen=True)
class Layer:
    """A convolution with its ReLU and pooling, or a linear layer.  flops, traffic: of one image, forward."""

    name: str
    parameters: tuple[int, ...]  # of its weight and its bias, in the order in which their gradients are sent
    flops: int
    traffic: int
    linear: bool


def layers(architecture: Architecture) -> list[Layer]:
    """The layers of the real network, in forward order."""
    with torch.device("meta"):
        network = VGG(architecture)
    found: list[Layer] = []
    side = architecture.input_size
    for module in [*network.features, *network.classifier]:
        if isinstance(module, nn.Conv2d):
            traffic = BF16 * side**2 * (module.in_channels + module.out_channels)
            found.append(_layer(f"conv{len(found) + 1}", module, 2 * module.weight.numel() * side**2, traffic, False))
        elif isinstance(module, nn.MaxPool2d):
            last = found.pop()
            pooled = BF16 * (side**2 + (side // 2) ** 2) * last.parameters[0]  # the bias: a number for every channel
            found.append(Layer(last.name, last.parameters, last.flops, last.traffic + pooled, False))
            side //= 2
        elif isinstance(module, nn.Linear):
            name = f"fc{6 + sum(layer.linear for layer in found)}"
            found.append(_layer(name, module, 2 * module.weight.numel(), 0, True))  # weights: FORWARD_TRAFFIC
    return found


def _layer(name: str, module: nn.Conv2d | nn.Linear, flops: int, traffic: int, linear: bool) -> Layer:
    assert module.bias is not None
    return Layer(name, (module.bias.numel(), module.weight.numel()), flops, traffic, linear)


def num_parameters(network: Sequence[Layer]) -> int:
    return sum(sum(layer.parameters) for layer in network)


def buckets(sizes: Sequence[int], limits: Sequence[int] = LIMITS) -> list[list[int]]:
    """DDP's groups of tensors of these sizes, in the order of their gradients: indices.  Full at its limit or above."""
    found: list[list[int]] = [[]]
    for index in range(len(sizes)):
        limit = limits[min(len(found), len(limits)) - 1]
        if sum(sizes[i] for i in found[-1]) >= limit:
            found.append([])
        found[-1].append(index)
    return found


def exposed(transfers: Sequence[tuple[float, float]], computed: float) -> float:
    """Seconds from the end of the backward pass, `computed`, to that of the last transfer, one after the other.

    transfers: (seconds at which it can start, seconds that it takes), in order.
    """
    end = 0.0
    for ready, taken in transfers:
        end = max(end, ready) + taken
    return max(0.0, end - computed)


@dataclass(frozen=True)
class Pass:
    """The times of one step's passes on one GPU: forward; the backward pass of every layer, from the last layer on."""

    forward: float
    backward: tuple[tuple[Layer, float], ...]

    @property
    def computed(self) -> float:
        return self.forward + sum(seconds for _, seconds in self.backward)

    def ready(self, regions: bool) -> list[tuple[int, float]]:
        """(bytes of a gradient in float32, when it is there), in that order.

        regions: all gradients of the classifier, and all of the convolutions, at once, as compiled.  autograd hands out
        those of the classifier as fc6's weight, fc8, fc6's bias, fc7.
        """
        now, at = self.forward, []
        for _, seconds in self.backward:
            now += seconds
            at.append(now)
        if not regions:
            return [
                (FP32 * size, end)
                for (layer, _), end in zip(self.backward, at, strict=True)
                for size in layer.parameters
            ]
        fc8, fc7, fc6 = (layer for layer, _ in self.backward if layer.linear)
        ordered = (fc6.parameters[1], *fc8.parameters, fc6.parameters[0], *fc7.parameters[::-1])
        convolutions = [size for layer, _ in self.backward if not layer.linear for size in layer.parameters]
        return [(FP32 * size, at[2]) for size in ordered] + [(FP32 * size, now) for size in convolutions]


def grouped(
    gradients: Sequence[tuple[int, float]], compressed: bool = False, limits: Sequence[int] = LIMITS
) -> list[tuple[float, float]]:
    """(ready, bytes sent) of every bucket, from (bytes in float32, ready) of every gradient."""
    found = []
    for members in buckets([size for size, _ in gradients], limits):
        size = sum(gradients[i][0] for i in members)
        found.append((max(gradients[i][1] for i in members), size / (2 if compressed else 1)))
    return found


def ring_seconds(num_bytes: float, ranks: int, bandwidth: float, hop: float = 0.0) -> float:
    """An all-reduce in a ring: every rank sends and receives 2 (n - 1) / n of the bytes, in 2 (n - 1) messages."""
    return 2 * (ranks - 1) * (num_bytes / ranks / bandwidth + hop)
