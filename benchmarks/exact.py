"""The same training step by torchvision's vgg16 in float64: what benchmarks.correct compares ours with."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torchvision.models import vgg16

from runtime.shards.batches import Crops
from runtime.shards.shardset import ShardSet
from vgg.data.augment import EIGENVALUES, EIGENVECTORS
from vgg.network.model import Dropout
from vgg.params.train import TrainParams

Tensors = dict[str, torch.Tensor]


def prepared(crops: Crops, shards: ShardSet, params: TrainParams) -> torch.Tensor:
    """The network's input in float64: an independent implementation of vgg.data.augment.Prepare."""
    device = crops.images.device
    mean, std, values = (
        torch.tensor(v, dtype=torch.float64, device=device) for v in (shards.mean, shards.std, EIGENVALUES)
    )
    vectors = torch.tensor(EIGENVECTORS, dtype=torch.float64, device=device)
    inputs = []
    for image, flip, colour in zip(crops.images, crops.flip, crops.colour, strict=True):
        pixels = image.double().flip(1) if flip else image.double()
        shift = vectors @ (params.colour_shift * colour.double() * values)
        inputs.append(((pixels + shift - mean) / std).permute(2, 0, 1))
    return torch.stack(inputs)


class KeyedDropout(nn.Module):
    """Our dropout with the keys of a batch, called as torchvision's classifier calls it."""

    def __init__(self, p: float, layer: int, keys: torch.Tensor) -> None:
        super().__init__()
        self.dropout, self.keys = Dropout(p, layer), keys

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        dropped: torch.Tensor = self.dropout(outputs, self.keys)
        return dropped


def loss_and_gradients(
    weights: Tensors, pixels: torch.Tensor, crops: Crops, num_classes: int, precision: torch.dtype
) -> tuple[float, Tensors]:
    """Mean loss and gradients of torchvision's vgg16, eager: in float64, or in float32 under autocast.

    It drops the same outputs as ours.
    """
    size, labels = pixels.shape[-1], crops.labels
    model: Any = vgg16(num_classes=num_classes)
    model.avgpool = nn.Identity()  # at 224 pixels it does nothing
    for position, layer in ((2, 6), (5, 7)):
        model.classifier[position] = KeyedDropout(model.classifier[position].p, layer, crops.dropout)
    model.classifier[0] = nn.Linear(512 * (size // 32) ** 2, weights["classifier.0.weight"].shape[0])
    model.classifier[3] = nn.Linear(model.classifier[0].out_features, model.classifier[0].out_features)
    model.classifier[6] = nn.Linear(model.classifier[0].out_features, num_classes)
    model.load_state_dict(weights)
    dtype = torch.float64 if precision == torch.float64 else torch.float32
    model, device = model.to(pixels.device, dtype).train(), pixels.device.type
    with torch.autocast(device, precision) if precision == torch.bfloat16 else nullcontext():
        scores = model(pixels.to(dtype))
    loss = functional.cross_entropy(scores if dtype == torch.float64 else scores.float(), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def distance(tensors: Tensors, exact: Tensors) -> float:
    """The relative distance of all tensors together."""
    squares = sum(float((tensors[name] - exact[name]).square().sum()) for name in exact)
    return math.sqrt(squares / sum(float(tensor.square().sum()) for tensor in exact.values()))


def worst(tensors: Tensors, exact: Tensors) -> float:
    """The largest relative distance of one tensor."""
    return max(distance({name: tensors[name]}, {name: exact[name]}) for name in exact)
