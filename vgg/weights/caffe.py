"""The Oxford release: .caffemodel, a message of protocol buffers, read field by field without Caffe's definitions.

Only what a network needs is read: layers with a name and blobs, blobs with a shape and float32 data.  Both forms are
known: NetParameter.layers (V1LayerParameter, the release) and NetParameter.layer (LayerParameter, after Caffe's
upgrade tool).  The number of fields is limited, no length is believed before it is compared with what is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from vgg.weights import published
from vgg.weights.content import (
    LAYERS,
    Content,
    checked,
    mapped,
    named,
    unusable,
)

# numbers of the fields in caffe.proto
LAYERS_FIELD, LAYER_FIELD = 2, 100  # of NetParameter
NAME_AND_BLOBS = {LAYERS_FIELD: (4, 6), LAYER_FIELD: (1, 7)}  # of a layer in either form
NUM, WIDTH, DATA, SHAPE = 1, 4, 5, 7  # of BlobProto; num, channels, height, width are 1 to 4
DIMENSIONS = 1  # of BlobShape
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
MAX_FIELDS = 100_000  # in a file; the release has a few hundred
DENSE = dict(zip(("fc6", "fc7", "fc8"), LAYERS, strict=True))
CEIL = "Caffe rounds the size of pooled maps up: for the publishers' dense figures set evaluate.ceil_pooling: true."


class Malformed(ValueError):
    """Not a message of protocol buffers, or one that ends early."""


@dataclass
class Message:
    """Bytes that are a message.  left: how many more fields may be read, shared by all messages of a file."""

    data: memoryview
    left: list[int]

    def fields(self) -> Iterator[tuple[int, int | Message]]:
        """(number, value): an integer, or a message or text, whatever it is.  Raises Malformed."""
        position, end = 0, len(self.data)
        while position < end:
            self.left[0] -= 1
            if self.left[0] < 0:
                raise Malformed(f"more than {MAX_FIELDS:,} fields")
            key, position = self._varint(position)
            number, wire = key >> 3, key & 7
            value: int | Message
            if wire == VARINT:
                value, position = self._varint(position)
            elif wire in (BYTES, FIXED32, FIXED64):
                size, position = self._varint(position) if wire == BYTES else ({5: 4, 1: 8}[wire], position)
                if size > end - position:
                    raise Malformed(f"ends early: {size:,} bytes announced, {end - position:,} left")
                value, position = Message(self.data[position : position + size], self.left), position + size
            else:
                raise Malformed(f"wire type {wire}")
            if number == 0:
                raise Malformed("field 0")
            yield number, value

    def _varint(self, position: int) -> tuple[int, int]:
        value = 0
        for number, byte in enumerate(self.data[position : position + 10]):
            value |= (byte & 127) << 7 * number
            if byte < 128:
                return value, position + number + 1
        raise Malformed("ends early, or a number is too long")

    def messages(self, wanted: int) -> Iterator[Message]:
        """The values of a field that are messages or texts."""
        for number, value in self.fields():
            if number == wanted and isinstance(value, Message):
                yield value

    def text(self, wanted: int) -> str:
        return next((bytes(value.data[:100]).decode("utf-8", "replace") for value in self.messages(wanted)), "")


def is_network(start: bytes) -> bool:
    """Whether a file may be a .caffemodel, from its first bytes: the name of the net (field 1) or a layer (2)."""
    return start[:1] in (b"\x0a", b"\x12")


def read(path: Path) -> Content:
    """Raises BadData."""
    try:
        layers = _layers(Message(mapped(path), [MAX_FIELDS]))
    except Malformed as error:
        raise unusable(path, f"damaged, or not a .caffemodel ({error}). Download it again.") from None
    convolutions, dense = {}, {}
    for name, blobs in layers.items():
        if len(blobs) != 2:
            raise unusable(path, f"{name} has {len(blobs)} blobs instead of weights and biases.")
        weight, bias = blobs
        if place := re.fullmatch(r"conv([1-9])_([1-9])", name):
            convolutions[int(place[1]), int(place[2])] = {"weight": weight, "bias": bias.flatten()}
        elif name in DENSE:
            inputs = weight.shape[-1] if weight.dim() else 0
            dense[DENSE[name]] = {"weight": weight.reshape(-1, max(1, inputs)), "bias": bias.flatten()}
        else:
            raise unusable(
                path, f"{name} is no layer of the release (conv1_1 …, fc6, fc7, fc8). Not a VGG of the paper."
            )
    tensors = checked(path, named(path, convolutions, dense))
    return published.released(path, "caffe", tensors, notes=[CEIL], ceil_pooling=True)


def _layers(network: Message) -> dict[str, list[torch.Tensor]]:
    """The blobs of every layer that has some, by name."""
    found: dict[str, list[torch.Tensor]] = {}
    for number, layer in network.fields():
        if number in NAME_AND_BLOBS and isinstance(layer, Message):
            name, blobs = NAME_AND_BLOBS[number]
            tensors = [_blob(blob) for blob in layer.messages(blobs)]
            if tensors and found.setdefault(layer.text(name), tensors) is not tensors:
                raise Malformed(f"two layers are called {layer.text(name)!r}")
    return found


def _blob(blob: Message) -> torch.Tensor:
    old, shape, data = {}, [], []
    for number, value in blob.fields():
        if number == DATA and isinstance(value, Message):
            data.append(value.data)
        elif number == SHAPE and isinstance(value, Message):
            for packed in value.messages(DIMENSIONS):
                shape += list(_numbers(packed))
        elif NUM <= number <= WIDTH and isinstance(value, int):
            old[number] = value
    shape = shape or [old.get(number, 1) for number in range(NUM, WIDTH + 1)]
    size = sum(map(len, data))
    if len(shape) > 8 or size != 4 * prod(shape):
        raise Malformed(f"a blob of shape {shape[:8]} has {size:,} bytes")
    values = np.concatenate([np.frombuffer(part, "<f4") for part in data]) if data else np.zeros(0, np.float32)
    return torch.from_numpy(values).reshape(shape)


def _numbers(packed: Message) -> Iterator[int]:
    position = 0
    while position < len(packed.data):
        value, position = packed._varint(position)
        yield value
