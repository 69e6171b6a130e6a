"""What a file of weights holds, in the names and layout of vgg.network, and which of the paper's networks it is."""

from __future__ import annotations

import errno
import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from runtime.errors import BadData
from vgg.network.model import CONFIGURATIONS, STRIDE, VGG, Architecture

MAX_BYTES = 2 << 30  # of a file and of its tensors; the largest published VGG has 575 MB
FIRST = "features.0.weight"  # kernel of conv1_1
LAYERS = ("classifier.0", "classifier.3", "classifier.6")  # fc6, fc7, fc8
CONVOLUTION = re.compile(r"features\.[0-9]{1,4}\.weight")
RELEASED = {"input_size": 224, "classifier_width": 4096}  # of a network without its classifier
Tensors = dict[str, torch.Tensor]
Pixels = dict[str, list[float]]


def unusable(path: Path, reason: str) -> BadData:
    """The error for a file of weights that cannot be used."""
    return BadData(f"{path}: {reason}")


def mapped(path: Path) -> memoryview:
    """The bytes of a file, mapped into memory as long as something refers to them."""
    with open(path, "rb") as file:
        try:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            if error.errno != errno.ENODEV:  # FUSE with direct_io cannot map files
                raise
            return memoryview(file.read())


@dataclass(frozen=True)
class Content:
    """The content of a file.

    kind: the layout, in a word.  tensors: float32, by the names of vgg.network; without those of the classifier if
    the file has none that is valid.  architecture: num_classes is 0 without a classifier.  pixels: mean and std of R,
    G, B, 0-255, that the network expects.  name: of the weights in their library, if known.  classes: if the file says
    which.  notes: what to know when it is used, a sentence each.  ceil_pooling: its own evaluation rounds up.
    origin: the run record of one of our own networks.
    """

    kind: str
    tensors: Tensors
    architecture: Architecture
    pixels: Pixels
    name: str = ""
    classes: list[dict[str, Any]] | None = None
    notes: list[str] = field(default_factory=list)
    ceil_pooling: bool = False
    origin: dict[str, Any] | None = None

    @property
    def has_classifier(self) -> bool:
        return self.architecture.num_classes > 0


def checked(path: Path, tensors: Tensors) -> Tensors:
    """Dense float32 tensors, and counters of batch norm.  Raises BadData for other types, or more than MAX_BYTES."""
    if sum(tensor.numel() * 4 for tensor in tensors.values()) > MAX_BYTES:  # before a view of stride 0 is copied
        raise unusable(path, f"its tensors have more than {MAX_BYTES:,} bytes. This is no VGG.")
    found = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise unusable(path, f"{name} is sparse or quantised. Save it as float32.")
        if name.endswith(".num_batches_tracked"):
            found[name] = tensor.to(torch.int64)
        elif tensor.is_floating_point():
            found[name] = tensor.to(torch.float32).contiguous()
        else:
            raise unusable(path, f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not floating point.")
    return found


def without_invalid_classifier(tensors: Tensors) -> Tensors:
    """Without the classifier, if that alone is not finite: torchvision's files of features have such ones."""
    invalid = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if invalid and all(name.startswith("classifier.") for name in invalid):
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
    return tensors


def expect_finite(path: Path, tensors: Tensors) -> None:
    """Raises BadData, naming the first tensor that is not finite, or a variance below 0."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise unusable(path, f"{name} is not finite (NaN or infinite values). These weights cannot be used.")
        if name.endswith(".running_var") and (tensor < 0).any():
            raise unusable(path, f"{name}: a variance is below 0. These weights cannot be used.")


def architecture_of(path: Path, tensors: Tensors, configuration: str = "") -> Architecture:
    """The network that these tensors belong to; num_classes is 0 without a classifier.

    configuration: if it is known; A and A-LRN have the same tensors, and without it A is taken.
    Raises BadData, with the first difference from the most similar network, if it is none of Table 1.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    classifier = _classifier(path, shapes)
    batch_norm = any(name.endswith(".running_mean") for name in shapes)
    names = [configuration] if configuration else [name for name in CONFIGURATIONS if name != "A-LRN"]
    closest: list[str] = []
    for name in names:
        architecture = Architecture(name, batch_norm, **classifier)
        wrong = list(_differences(shapes, expected_shapes(architecture)))
        if not wrong:
            return architecture
        if not closest or len(wrong) < len(closest):
            closest = [f"configuration {name}{' with batch norm' if batch_norm else ''}", *wrong]
    raise unusable(
        path, f"not a VGG of the paper: compared with {closest[0]}, {closest[1]}. Other networks are not supported."
    )


def _classifier(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """The fields of an Architecture that the classifier determines."""
    if not any(name.startswith("classifier.") for name in shapes):
        return {**RELEASED, "num_classes": 0}
    found = [shapes.get(f"{layer}.weight", ()) for layer in LAYERS]
    names = [name for name, shape in shapes.items() if CONVOLUTION.fullmatch(name) and len(shape) == 4]
    if any(len(shape) != 2 for shape in found) or not names:
        raise unusable(
            path,
            "not a VGG of the paper: it needs convolutions (features.N) and three fully connected layers "
            f"({', '.join(LAYERS)}); these have the shapes {', '.join(map(str, found))}.",
        )
    last = max(names, key=lambda name: int(name.split(".")[1]))  # files have them in any order
    side = math.isqrt(found[0][1] // max(1, shapes[last][0]))
    sizes = {"input_size": max(1, side) * STRIDE, "classifier_width": found[0][0], "num_classes": found[2][0]}
    if min(sizes.values()) < 1:
        raise unusable(path, f"a layer of the classifier is empty: {found}.")
    return sizes


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a network by name; without the classifier's if num_classes is 0."""
    with torch.device("meta"):
        state = VGG(replace(architecture, num_classes=max(1, architecture.num_classes))).state_dict()
    kept = state if architecture.num_classes else {n: t for n, t in state.items() if n.startswith("features.")}
    return {name: tuple(tensor.shape) for name, tensor in kept.items()}


def _differences(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> Iterator[str]:
    for name in sorted(found.keys() | expected.keys()):
        here, there = found.get(name), expected.get(name)
        if here != there:
            what = f"is {here} instead of {there}" if there is not None else "is no part of it"
            yield f"{name} {what if here is not None else 'is missing'}"


def complete(tensors: Tensors) -> Tensors:
    """With the counters of batch norm, which files from before torch 0.4.1 (torchvision's) do not have."""
    ending = ".running_var"
    counters = [name.removesuffix(ending) + ".num_batches_tracked" for name in tensors if name.endswith(ending)]
    return {**{name: torch.zeros((), dtype=torch.int64) for name in counters}, **tensors}


def named(path: Path, convolutions: dict[tuple[int, int], Tensors], dense: dict[str, Tensors]) -> Tensors:
    """Tensors by the names of vgg.network.

    convolutions: "weight" and "bias" by (stage, number), from 1, as in conv3_2.  dense: by the names in LAYERS.
    Raises BadData if no configuration has these convolutions.
    """
    counts = tuple(sum(1 for stage, _ in convolutions if stage == wanted) for wanted in range(1, 6))
    fitting = [name for name, stages in CONFIGURATIONS.items() if tuple(map(len, stages)) == counts]
    places = [(stage + 1, number + 1) for stage, count in enumerate(counts) for number in range(count)]
    if not fitting or sorted(convolutions) != places:
        raise unusable(path, f"not a VGG of the paper: it has {counts} convolutions in five stages.")
    state = expected_shapes(Architecture(fitting[0], False, 1, 0, STRIDE))
    names = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    layers = {**dict(zip(names, (convolutions[place] for place in places), strict=True)), **dense}
    return {f"{name}.{part}": tensor for name, tensors in layers.items() for part, tensor in tensors.items()}
