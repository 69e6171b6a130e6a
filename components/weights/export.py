"""A checkpoint as one file for other software; the tensors are the same bytes, nothing is folded into them.

.pth: a state_dict with torchvision's names.  .safetensors: the same names.  Both carry our description (network,
pixels, classes, run) in their metadata, so that importing them gives the same network back.  .onnx: uint8 crops to
probabilities and embedding, mean and deviation inside.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from runtime import manifest
from vgg.network.trained import Trained
from vgg.weights.torch_files import EXPORT_SCHEMA, METADATA

IN_TORCHVISION = {"A": "vgg11", "B": "vgg13", "D": "vgg16", "E": "vgg19"}


def write(trained: Trained, path: Path, form: str) -> Iterator[str]:
    """Write the file; yields what to know about it, a line each.  form: "pth", "safetensors" or "onnx".

    Raises StorageFailure when the disk is full, Refused if ONNX Runtime does not answer as the network does.
    """
    if form == "onnx":
        _onnx(trained, path)
        size = trained.manifest["network"]["input_size"]
        yield f"{path}: images, uint8 RGB (n, {size}, {size}, 3), to probabilities and embedding"
        return
    tensors, own = trained.step.weights(), description(trained)
    if form == "safetensors":
        from safetensors.torch import save

        data = save(tensors, {"format": "pt", METADATA: own})
        manifest.write_atomically(path, lambda file: file.write(data))
        yield f"{path}: {len(tensors)} tensors, names of torchvision"
        return

    def fill(file: BinaryIO) -> None:
        state: Any = OrderedDict(tensors)
        state._metadata = OrderedDict({"": {"version": 1, METADATA: own}})  # load_state_dict ignores ours
        torch.save(state, file)

    manifest.write_atomically(path, fill)
    yield from usage(trained, path)


def usage(trained: Trained, path: Path) -> Iterator[str]:
    """How torchvision loads the file and prepares images for it."""
    network, pixels = trained.manifest["network"], trained.manifest["pixels"]
    name = IN_TORCHVISION.get(network["configuration"])
    if name is None or (network["classifier_width"], network["input_size"]) != (4096, 224):
        yield f"{path}: a state_dict with torchvision's names; torchvision itself has no network of these sizes"
    else:
        norm = "_bn" if network["batch_norm"] else ""
        yield (
            f"{path}: torchvision.models.{name}{norm}(num_classes={network['num_classes']})"
            f'.load_state_dict(torch.load("{path.name}", weights_only=True))'
        )
    mean, std = ([round(value / 255, 6) for value in pixels[part]] for part in ("mean", "std"))
    yield f"images in 0-1 are prepared with torchvision.transforms.Normalize({mean}, {std})"


def description(trained: Trained) -> str:
    """Our description of the network, JSON: a vgg.weights.torch_files.Description."""
    told = {name: trained.manifest[name] for name in ("network", "pixels", "classes", "run")}
    return json.dumps({"schema": EXPORT_SCHEMA, **told, "weights_sha256": trained.weights_sha256}, sort_keys=True)


def _onnx(trained: Trained, path: Path) -> None:
    """Raises Refused if the graph differs from the network."""
    import onnx_ir

    from components.register.version.exports import Crops, compare, onnx_program, onnx_session

    size = trained.manifest["network"]["input_size"]
    crops = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    network = Crops(trained.network(), trained.manifest["pixels"]).eval()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with manifest.storage_errors(path), torch.no_grad():
            expected = [output.numpy() for output in network(crops)]
            onnx_ir.save(onnx_program(network, crops).model, temporary)
            compare(path.name, onnx_session(temporary)(crops), expected)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
