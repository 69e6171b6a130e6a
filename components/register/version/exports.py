"""The network as graphs that run without this project: model.pt2 for torch, model.onnx for ONNX Runtime and others.

Both take crops: "images", uint8 (n, S, S, 3), RGB as decoded, S = input_size, any n; mean and deviation are inside.
Both give "probabilities", float32 (n, classes), and "embedding", float32 (n, classifier_width), fc7 after its ReLU: the
network for one crop.  (The served model averages over positions, scales and mirror images.)

Neither holds weights: VGG-16 would take 553 MB three times.  model.onnx points into weights.safetensors, which must lie
beside it; model.pt2 takes the tensors of that file as its first argument:

    torch.export.load("model.pt2").module()(safetensors.torch.load_file("weights.safetensors"), images)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from runtime.errors import Refused
from vgg.data.augment import Prepare
from vgg.data.images import decode
from vgg.evaluation.modes import Base
from vgg.evaluation.scaled import centre_crop, resize, size_at
from vgg.network.model import VGG
from vgg.network.trained import Trained

WEIGHTS = "weights.safetensors"
OUTPUTS = ("probabilities", "embedding")
MAX_PROBABILITY_DIFFERENCE = 1e-4  # of a graph from the network: other kernels sum in another order
MAX_EMBEDDING_DIFFERENCE = 1e-3  # as a fraction of the largest activation
MAX_INSIDE_BYTES = 100_000  # of tensors in model.onnx: mean and deviation, no weights
OPSET = 20
Tensors = dict[str, torch.Tensor]


def export(
    trained: Trained, directory: Path, forms: Iterable[str], jpegs: list[bytes], scale: int, max_pixels: int
) -> dict[str, str]:
    """Write the graphs beside the weights in `directory`; returns their paths by name.

    forms: "pt2", "onnx".  jpegs: images that both must answer as the network does, cut to central crops at `scale`.
    Raises Refused if they do not.
    """
    writers: dict[str, Callable[[Crops, torch.Tensor, Path], Callable[[torch.Tensor], list[np.ndarray]]]]
    writers = {"pt2": _write_pt2, "onnx": _write_onnx}
    network = Crops(trained.network(), trained.manifest["pixels"]).eval()
    size = trained.manifest["network"]["input_size"]
    decoded = (torch.from_numpy(np.array(decode(jpeg, max_pixels)))[None] for jpeg in jpegs)
    base = Base("centre_crop", scale)
    resized = (resize(image, *size_at(base, *image.shape[1:3])) for image in decoded)
    crops = torch.cat([centre_crop(image, size) for image in resized]).contiguous()
    pair = torch.cat([crops, crops])[:2]  # torch.export takes a batch of one for a constant
    with torch.no_grad():
        expected = [output.numpy() for output in network(crops)]
        written = {}
        for form in forms:
            path = directory / f"model.{form}"
            run = writers[form](network, pair, path)
            for count in {len(crops), 1}:
                compare(path.name, run(crops[:count]), [output[:count] for output in expected])
            written[form] = str(path)
    return written


def compare(name: str, found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Raises Refused if a graph's probabilities or embeddings are not those of the network."""
    limits = MAX_PROBABILITY_DIFFERENCE, MAX_EMBEDDING_DIFFERENCE * max(1e-6, float(np.abs(expected[1]).max()))
    for output, ours, theirs, limit in zip(OUTPUTS, expected, found, limits, strict=True):
        difference = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
        if not difference <= limit:  # also NaN
            raise Refused(
                f"{name} differs from the network on validation images: {output} by {difference:.2g}, at most "
                f"{limit:.2g} is allowed; no version registered. Leave it out of register.exports to register without."
            )


class Crops(nn.Module):
    """The network for crops as they are decoded."""

    def __init__(self, network: VGG, pixels: dict[str, list[float]]) -> None:
        super().__init__()
        self.prepare = Prepare(pixels["mean"], pixels["std"])
        self.network = network

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (n, S, S, 3) to probabilities (n, classes) and embedding (n, classifier_width), float32."""
        outputs = torch.flatten(self.network.features(self.prepare(images)), 1)
        *layers, fc8 = self.network.classifier
        for layer in layers:
            outputs = layer(outputs, None) if hasattr(layer, "layer") else layer(outputs)
        return fc8(outputs).softmax(1), outputs


class _Stateless(nn.Module):
    """Crops with the weights as an argument."""

    def __init__(self, crops: Crops) -> None:
        super().__init__()
        self._crops = [crops]  # in a list, so that its weights are not part of this module

    def forward(self, weights: Tensors, images: torch.Tensor) -> Any:
        named = {f"network.{name}": tensor for name, tensor in weights.items()}
        return torch.func.functional_call(self._crops[0], named, (images,))


def _write_pt2(network: Crops, crops: torch.Tensor, path: Path) -> Callable[[torch.Tensor], list[np.ndarray]]:
    from safetensors.torch import load_file

    weights = load_file(path.with_name(WEIGHTS))
    dynamic: Any = {"weights": dict.fromkeys(weights), "images": {0: torch.export.Dim("n")}}
    program = torch.export.export(_Stateless(network), (weights, crops), dynamic_shapes=dynamic)
    program.example_inputs = None  # or the file would hold the weights after all
    torch.export.save(program, path)
    loaded: Any = torch.export.load(path).module()
    return lambda images: [output.numpy() for output in loaded(weights, images)]


def onnx_program(network: Crops, crops: torch.Tensor) -> Any:
    """The network as a torch.onnx.ONNXProgram, for any number of crops; crops: two, as an example."""
    logging.getLogger("onnxscript").setLevel(logging.WARNING)
    program = torch.onnx.export(
        network, (crops,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("n")},), opset_version=OPSET,
        input_names=["images"], output_names=list(OUTPUTS), verbose=False,
        optimize=False,  # it would fold batch norm into the weights; runtimes do that when they load the graph
    )  # fmt: skip
    assert program
    return program


def onnx_session(path: Path) -> Callable[[torch.Tensor], list[np.ndarray]]:
    """What ONNX Runtime answers for crops."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: list(session.run(list(OUTPUTS), {"images": images.numpy()}))


def _write_onnx(network: Crops, crops: torch.Tensor, path: Path) -> Callable[[torch.Tensor], list[np.ndarray]]:
    import onnx_ir

    program = onnx_program(network, crops)
    layout, inside = _layout(path.with_name(WEIGHTS)), 0
    for name, value in program.model.graph.initializers.items():
        tensor = value.const_value
        assert tensor
        if place := layout.get(name.removeprefix("network.")):
            value.const_value = onnx_ir.ExternalTensor(
                WEIGHTS, *place, tensor.dtype, shape=tensor.shape, name=name, base_dir=path.parent
            )
        else:
            inside += tensor.nbytes
    if inside > MAX_INSIDE_BYTES:
        raise AssertionError(f"{path.name} would hold {inside:,} bytes of weights: an optimisation has changed some")
    onnx_ir.save(program.model, path)
    return onnx_session(path)


def _layout(path: Path) -> dict[str, tuple[int, int]]:
    """(offset, length) in bytes of every tensor in a safetensors file: the header's size in 8 bytes, JSON, the data."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(header))
    entries.pop("__metadata__", None)
    return {
        name: (8 + header + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in entries.items()
    }
