"""What publishers say of their weights: preparation of pixels, names (torchvision's by the sha256 of the file)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vgg.weights.content import FIRST, Content, Pixels, Tensors, architecture_of, expect_finite, unusable

IMAGENET: Pixels = {  # torchvision, timm: of images in 0-1, mean .485 .456 .406, standard deviation .229 .224 .225
    "mean": [255 * mean for mean in (0.485, 0.456, 0.406)],
    "std": [255 * std for std in (0.229, 0.224, 0.225)],
}
OXFORD: Pixels = {"mean": [123.68, 116.779, 103.939], "std": [1.0, 1.0, 1.0]}  # Caffe and Keras: B, G, R in the file
SCALE = 256  # Q of the publishers' own figures: short side 256, central 224 x 224


@dataclass(frozen=True)
class Published:
    """Weights that torchvision publishes.  classifies: False for those whose classifier is not valid."""

    name: str
    pixels: Pixels
    classifies: bool


def by_sha256(sha256: str) -> Published | None:
    """The weights of torchvision with this checksum; the names of its files contain the first 8 digits."""
    from torchvision.models import vgg

    for enum in (value for name, value in vars(vgg).items() if name.endswith("_Weights")):
        for weights in enum:
            digits = re.search(r"-([0-9a-f]{8,})\.pth$", weights.url)
            if digits and sha256.startswith(digits[1]):
                preset = weights.transforms()
                pixels = {"mean": [255 * mean for mean in preset.mean], "std": [255 * std for std in preset.std]}
                return Published(str(weights), pixels, bool(weights.meta["categories"]))
    return None


def released(path: Path, kind: str, tensors: Tensors, notes: Sequence[str] = (), ceil_pooling: bool = False) -> Content:
    """The content of a file with the Oxford release, which was made for B, G, R.  tensors: of checked()."""
    tensors = {**tensors, FIRST: reversed_channels(path, tensors)}
    expect_finite(path, tensors)
    architecture = architecture_of(path, tensors)
    return Content(kind, tensors, architecture, OXFORD, notes=[*notes], ceil_pooling=ceil_pooling)


def reversed_channels(path: Path, tensors: Tensors) -> torch.Tensor:
    """The first convolution for R, G, B instead of B, G, R."""
    weight = tensors.get(FIRST, torch.zeros(0))
    if weight.dim() != 4 or weight.shape[1] != 3:
        raise unusable(path, f"the first convolution has the shape {tuple(weight.shape)}, not (outputs, 3, 3, 3).")
    return weight.flip(1).contiguous()


def class_names() -> list[str]:
    """Names of the 1000 classes of ILSVRC-2012, in the order of their WNIDs, from torchvision."""
    from torchvision.models.vgg import VGG16_Weights

    return list(VGG16_Weights.IMAGENET1K_V1.meta["categories"])
