"""Files of weights as other software writes them, and what that software would answer, both written independently.

A network is random numbers in the order of its layers: convolutions as (weight OIHW, bias), three matrices as
(weight, bias).  Every layout is made of these numbers by the rules of its software, and its answers are computed in
numpy, float64, from the arrays as they are in the file.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

Array = np.ndarray
MEAN_BGR = np.array([103.939, 116.779, 123.68])
IMAGENET = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Net:
    """stages: outputs of the convolutions.  side: of the last map.  norms: (weight, bias, mean, variance) each."""

    stages: tuple[tuple[int, ...], ...]
    side: int
    convolutions: list[tuple[Array, Array]]
    norms: list[tuple[Array, Array, Array, Array]]
    dense: list[tuple[Array, Array]]

    def places(self) -> list[tuple[int, int]]:
        """(stage, number) of every convolution, from 1."""
        return [(s + 1, n + 1) for s, stage in enumerate(self.stages) for n in range(len(stage))]


def net(stages: Iterable[Iterable[int]], side: int = 2, width: int = 12, classes: int = 3, norm: bool = False) -> Net:
    random = np.random.default_rng(5)
    stages, inputs = tuple(map(tuple, stages)), 3
    convolutions, norms = [], []
    for outputs in (outputs for stage in stages for outputs in stage):
        weight = random.normal(0, (2 / (9 * inputs)) ** 0.5, (outputs, inputs, 3, 3))
        convolutions.append((weight.astype(np.float32), random.normal(0, 0.1, outputs).astype(np.float32)))
        if norm:
            four = [
                random.normal(1, 0.2, outputs),
                *random.normal(0, 0.2, (2, outputs)),
                random.uniform(0.5, 2, outputs),
            ]
            norms.append(tuple(part.astype(np.float32) for part in four))
        inputs = outputs
    sizes = [inputs * side * side, width, width, classes]
    dense = [
        (
            random.normal(0, (2 / fan) ** 0.5, (outputs, fan)).astype(np.float32),
            random.normal(0, 0.1, outputs).astype(np.float32),
        )
        for fan, outputs in pairwise(sizes)
    ]
    return Net(stages, side, convolutions, norms, dense)


def images(net: Net) -> Array:
    """uint8 RGB (2, h, w, 3)."""
    size = 32 * net.side
    return np.random.default_rng(6).integers(0, 256, (2, size, size, 3), dtype=np.uint8)


def pool_chw(maps: Array) -> Array:
    n, c, h, w = maps.shape
    return maps.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))


def features_chw(net: Net, maps: Array, weights: list[tuple[Array, Array]]) -> Array:
    """The convolutions of torch and Caffe: channels first, OIHW."""
    number = 0
    for stage in net.stages:
        for _ in stage:
            weight, bias = weights[number]
            windows = sliding_window_view(np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
            maps = np.einsum("nchwij,ocij->nohw", windows, weight.astype(np.float64)) + bias[:, None, None]
            if net.norms:
                gamma, beta, mean, variance = (part.astype(np.float64)[:, None, None] for part in net.norms[number])
                maps = (maps - mean) / np.sqrt(variance + 1e-5) * gamma + beta
            maps, number = np.maximum(maps, 0), number + 1
        maps = pool_chw(maps)
    return maps


def classified(inputs: Array, matrices: Iterable[tuple[Array, Array]]) -> Array:
    """matrices: (outputs, inputs)."""
    *hidden, last = matrices
    for weight, bias in hidden:
        inputs = np.maximum(inputs @ weight.astype(np.float64).T + bias, 0)
    return inputs @ last[0].astype(np.float64).T + last[1]


# torchvision and timm


def torch_state(net: Net) -> OrderedDict[str, torch.Tensor]:
    """torchvision's state_dict; without num_batches_tracked, as in its files of 2017."""
    state, index, number = OrderedDict(), 0, 0
    for stage in net.stages:
        for _ in stage:
            for part, values in zip(("weight", "bias"), net.convolutions[number], strict=True):
                state[f"features.{index}.{part}"] = torch.from_numpy(values)
            if net.norms:
                index += 1
                names = ("weight", "bias", "running_mean", "running_var")
                for part, values in zip(names, net.norms[number], strict=True):
                    state[f"features.{index}.{part}"] = torch.from_numpy(values)
            index, number = index + 2, number + 1  # ReLU
        index += 1  # pooling
    for layer, (weight, bias) in zip((0, 3, 6), net.dense, strict=True):
        state[f"classifier.{layer}.weight"], state[f"classifier.{layer}.bias"] = map(torch.from_numpy, (weight, bias))
    return state


def torch_answers(net: Net, pixels: Array) -> Array:
    mean, std = IMAGENET
    maps = features_chw(net, ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2), net.convolutions)
    return classified(maps.reshape(len(maps), -1), net.dense)


def timm_state(net: Net) -> dict[str, torch.Tensor]:
    """fc6 and fc7 as convolutions."""
    state = {name: tensor for name, tensor in torch_state(net).items() if name.startswith("features.")}
    (fc6, b6), (fc7, b7), (fc8, b8) = net.dense
    channels = net.stages[-1][-1]
    arrays = {
        "pre_logits.fc1.weight": fc6.reshape(len(fc6), channels, net.side, net.side), "pre_logits.fc1.bias": b6,
        "pre_logits.fc2.weight": fc7[:, :, None, None], "pre_logits.fc2.bias": b7,
        "head.fc.weight": fc8, "head.fc.bias": b8,
    }  # fmt: skip
    return {**state, **{name: torch.from_numpy(values) for name, values in arrays.items()}}


def timm_answers(net: Net, state: dict[str, torch.Tensor], pixels: Array) -> Array:
    """As timm computes: a convolution over the whole map, then 1 x 1."""
    arrays = {name: tensor.numpy().astype(np.float64) for name, tensor in state.items()}
    mean, std = IMAGENET
    maps = features_chw(net, ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2), net.convolutions)
    fc6 = np.maximum(
        np.einsum("nchw,ochw->no", maps, arrays["pre_logits.fc1.weight"]) + arrays["pre_logits.fc1.bias"], 0
    )
    fc7 = np.einsum("ni,oiab->no", fc6, arrays["pre_logits.fc2.weight"]) + arrays["pre_logits.fc2.bias"]
    return np.maximum(fc7, 0) @ arrays["head.fc.weight"].T + arrays["head.fc.bias"]


# Caffe


def field(number: int, content: bytes | int) -> bytes:
    """A field of a protobuf message: a number, or bytes with their length."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def caffe_blob(values: Array, dimensions: Iterable[int], new: bool) -> bytes:
    data = field(5, values.astype("<f4").tobytes())
    if new:
        return field(7, field(1, b"".join(map(varint, dimensions)))) + data
    return b"".join(field(number + 1, size) for number, size in enumerate(dimensions)) + data


def caffemodel(net: Net, new: bool = False) -> bytes:
    """The release: layers (V1LayerParameter) with blobs of four dimensions; new: as upgraded, layer with shapes."""
    layers: list[tuple[str, list[bytes]]] = [("data", [])]
    for (stage, number), (weight, bias) in zip(net.places(), net.convolutions, strict=True):
        weight = weight[:, ::-1] if (stage, number) == (1, 1) else weight  # B, G, R
        ones = (1, 1, 1, len(bias)) if not new else (len(bias),)
        layers.append((f"conv{stage}_{number}", [caffe_blob(weight, weight.shape, new), caffe_blob(bias, ones, new)]))
        layers.append((f"relu{stage}_{number}", []))
    for name, (weight, bias) in zip(("fc6", "fc7", "fc8"), net.dense, strict=True):
        shape = weight.shape if new else (1, 1, *weight.shape)
        ones = (len(bias),) if new else (1, 1, 1, len(bias))
        layers.append((name, [caffe_blob(weight, shape, new), caffe_blob(bias, ones, new)]))
    name_field, blobs_field, layer_field, type_field = (1, 7, 100, b"") if new else (4, 6, 2, field(5, 4))
    parts = [field(1, b"VGG_ILSVRC_tiny_layers")]
    for name, blobs in layers:
        text = b"".join(field(blobs_field, blob) for blob in blobs)
        parts.append(field(layer_field, field(name_field, name.encode()) + type_field + text))
    return b"".join(parts)


def caffe_answers(net: Net, pixels: Array) -> Array:
    """With the arrays of the file: B, G, R, 0-255, minus the mean."""
    first, *others = net.convolutions
    bgr = pixels[..., ::-1] - MEAN_BGR
    maps = features_chw(net, bgr.transpose(0, 3, 1, 2), [(first[0][:, ::-1], first[1]), *others])
    return classified(maps.reshape(len(maps), -1), net.dense)


# Keras


def keras_arrays(net: Net) -> dict[str, Array]:
    """By path in the file: kernels HWIO for B, G, R; matrices (inputs, outputs), those of fc1 in order H, W, C."""
    found: dict[str, Array] = {}
    for (stage, number), (weight, bias) in zip(net.places(), net.convolutions, strict=True):
        weight = weight[:, ::-1] if (stage, number) == (1, 1) else weight
        layer = f"block{stage}_conv{number}"
        found[f"{layer}/{layer}_W_1:0"], found[f"{layer}/{layer}_b_1:0"] = weight.transpose(2, 3, 1, 0), bias
    (fc1, b1), *others = net.dense
    by_position = fc1.reshape(len(fc1), -1, net.side, net.side).transpose(2, 3, 1, 0).reshape(-1, len(fc1))
    for layer, (weight, bias) in zip(("fc1", "fc2", "predictions"), [(by_position.T, b1), *others], strict=True):
        found[f"{layer}/{layer}_W_1:0"], found[f"{layer}/{layer}_b_1:0"] = weight.T, bias
    return {name: np.ascontiguousarray(values) for name, values in found.items()}


def keras_answers(net: Net, arrays: dict[str, Array], pixels: Array) -> Array:
    """With the arrays of the file: channels last."""
    maps = pixels[..., ::-1] - MEAN_BGR
    for stage in range(1, len(net.stages) + 1):
        for number in range(1, len(net.stages[stage - 1]) + 1):
            layer = f"block{stage}_conv{number}"
            windows = sliding_window_view(np.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2))
            kernel = arrays[f"{layer}/{layer}_W_1:0"].astype(np.float64)
            maps = np.maximum(np.einsum("nhwcij,ijco->nhwo", windows, kernel) + arrays[f"{layer}/{layer}_b_1:0"], 0)
        n, h, w, c = maps.shape
        maps = maps.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
    layers = ("fc1", "fc2", "predictions")
    matrices = [(arrays[f"{name}/{name}_W_1:0"].T, arrays[f"{name}/{name}_b_1:0"]) for name in layers]
    return classified(maps.reshape(len(maps), -1), matrices)


UNDEFINED = b"\xff" * 8


class Hdf5:
    """Writes HDF5 as libhdf5 does by default: superblock 0, symbol tables, contiguous data.  Read by h5py 3.16."""

    def __init__(self, arrays: dict[str, Array]) -> None:
        self.data = bytearray(96)
        tree: dict[str, dict[str, Array]] = {}
        for path, values in arrays.items():
            group, _, name = path.partition("/")
            tree.setdefault(group, {})[name] = values
        groups = {
            group: self._group({name: self._dataset(values) for name, values in members.items()})
            for group, members in tree.items()
        }
        root = self._group(groups)
        self.data[:96] = (
            b"\x89HDF\r\n\x1a\n" + bytes([0, 0, 0, 0, 0, 8, 8, 0]) + struct.pack("<HHI", 4, 16, 0)
            + struct.pack("<Q", 0) + UNDEFINED + struct.pack("<Q", len(self.data)) + UNDEFINED
            + struct.pack("<QQII16x", 0, root, 0, 0)
        )  # fmt: skip

    def _add(self, content: bytes) -> int:
        """Address of the content."""
        self.data += b"\0" * (-len(self.data) % 8)
        self.data += content
        return len(self.data) - len(content)

    def _header(self, messages: list[tuple[int, bytes]]) -> int:
        padded = [(kind, content + b"\0" * (-len(content) % 8)) for kind, content in messages]
        text = b"".join(struct.pack("<HHB3x", kind, len(content), 0) + content for kind, content in padded)
        return self._add(struct.pack("<BxHII4x", 1, len(messages), 1, len(text)) + text)

    def _dataset(self, values: Array) -> int:
        data = values.astype("<f4").tobytes()
        shape = struct.pack(f"<BBB5x{values.ndim}Q", 1, values.ndim, 0, *values.shape)
        float32 = bytes([0x11, 0x20, 31, 0]) + struct.pack("<IHHBBBBI", 4, 0, 32, 23, 8, 0, 23, 127)
        layout = struct.pack("<BBQQ", 3, 1, self._add(data), len(data))
        return self._header([(1, shape), (3, float32), (5, bytes([2, 2, 2, 0])), (8, layout)])

    def _group(self, members: dict[str, int]) -> int:
        names = sorted(members)
        heap, offsets = bytearray(8), {"": 0}
        for name in names:
            offsets[name] = len(heap)
            heap += name.encode() + b"\0" * (8 - len(name) % 8)
        heap += struct.pack("<QQ", 1, 16)  # free: the rest
        data = self._add(bytes(heap))
        nodes = []
        for first in range(0, len(names), 8):
            chunk = names[first : first + 8]
            entries = b"".join(struct.pack("<QQII16x", offsets[name], members[name], 0, 0) for name in chunk)
            address = self._add(struct.pack("<4sBxH", b"SNOD", 1, len(chunk)) + entries.ljust(8 * 40, b"\0"))
            nodes.append((address, offsets[chunk[-1]]))
        keys = b"".join(struct.pack("<QQ", address, last) for address, last in nodes)
        tree = struct.pack("<4sBBH", b"TREE", 0, 0, len(nodes)) + UNDEFINED * 2 + struct.pack("<Q", 0) + keys
        free = len(heap) - 16
        local = self._add(struct.pack("<4s4xQQQ", b"HEAP", len(heap), free, data))
        return self._header([(17, struct.pack("<QQ", self._add(tree.ljust(24 + 8 * 65, b"\0")), local))])


def write(path: Path, kind: str, net: Net) -> tuple[Array, Array]:
    """Write a file; returns images and the answers of its software, before the softmax."""
    pixels = images(net)
    if kind == "torchvision":
        torch.save(torch_state(net), path, _use_new_zipfile_serialization=False)  # its files are from 2017
        return pixels, torch_answers(net, pixels)
    if kind == "torch":
        torch.save(torch_state(net), path)
        return pixels, torch_answers(net, pixels)
    if kind == "timm":
        from safetensors.torch import save_file

        state = timm_state(net)
        save_file(state, path)
        return pixels, timm_answers(net, state, pixels)
    if kind == "keras":
        arrays = keras_arrays(net)
        path.write_bytes(bytes(Hdf5(arrays).data))
        return pixels, keras_answers(net, arrays, pixels)
    path.write_bytes(caffemodel(net, new=kind == "caffe-upgraded"))
    return pixels, caffe_answers(net, pixels)
