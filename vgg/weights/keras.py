"""Keras' .h5: the weights of keras.applications, or those of a model of the same layers.

A path in the file names the layer (block1_conv1 … block5_conv4, fc1, fc2, predictions); the parts have had several
names (block1_conv1_W_1:0, kernel:0), so they are told apart by their number of dimensions.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from vgg.weights import hdf5, published
from vgg.weights.content import (
    LAYERS,
    MAX_BYTES,
    Content,
    Tensors,
    checked,
    mapped,
    named,
    unusable,
)

LAYER = re.compile(r"(?:^|/)(?:block(?P<stage>[1-9])_conv(?P<number>[1-9])|(?P<dense>fc1|fc2|predictions))(?=/)")
DENSE = dict(zip(("fc1", "fc2", "predictions"), LAYERS, strict=True))


def read(path: Path) -> Content:
    """Raises BadData."""
    try:
        datasets = _of_layers(hdf5.File(mapped(path)))
    except hdf5.Malformed as error:
        raise unusable(path, f"damaged, or not a file of Keras' weights: {error}. Download it again.") from None
    convolutions: dict[tuple[int, int], Tensors] = {}
    dense: dict[str, Tensors] = {}
    for name, tensor in datasets.items():
        found = LAYER.search(name)
        assert found
        if found["dense"]:
            layer, rank = dense.setdefault(DENSE[found["dense"]], {}), 2
        else:
            layer, rank = convolutions.setdefault((int(found["stage"]), int(found["number"])), {}), 4
        part = {rank: "weight", 1: "bias"}.get(tensor.dim())
        if part is None or part in layer:
            raise unusable(path, f"{name} has the shape {tuple(tensor.shape)}, or is there twice. Not Keras' VGG.")
        layer[part] = tensor
    tensors = named(path, convolutions, dense)
    for name, tensor in tensors.items():
        if tensor.dim() == 4:
            tensors[name] = tensor.permute(3, 2, 0, 1)  # height, width, inputs, outputs
        elif tensor.dim() == 2:
            tensors[name] = _fc6(path, tensor, tensors) if name.startswith(LAYERS[0]) else tensor.T
    return published.released(path, "keras", checked(path, tensors))


def _of_layers(file: hdf5.File) -> Tensors:
    """The datasets of VGG's layers, float32.  Raises Malformed."""
    found, size = {}, 0
    for name, values in file.datasets():
        if LAYER.search(name) and not name.startswith("/optimizer_weights/"):  # of a whole model that was trained
            size += 4 * values.size  # a damaged file can name the same data many times
            if size > MAX_BYTES:
                raise hdf5.Malformed(f"its datasets have more than {MAX_BYTES:,} bytes")
            found[name] = torch.from_numpy(values.astype(np.float32))
    return found


def _fc6(path: Path, matrix: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """(inputs, outputs) to (outputs, inputs).  Keras flattens height, width, channels, torch channels first."""
    last = [tensor for name, tensor in tensors.items() if name.startswith("features.") and tensor.dim() == 1][-1]
    channels = len(last)
    side = round((len(matrix) / channels) ** 0.5) if channels else 0
    if side < 1 or side * side * channels != len(matrix):
        raise unusable(path, f"fc1 has {len(matrix):,} inputs, not a square of {channels} channels. Not Keras' VGG.")
    return matrix.view(side, side, channels, -1).permute(3, 2, 0, 1).flatten(1)
