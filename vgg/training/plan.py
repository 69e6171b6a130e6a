"""The plan of a training, from its parameters: steps, drops of the learning rate, disk, memory, FLOPs, hours.

It needs neither data nor a GPU.  All numbers are exact except memory: that is an estimate for eager execution, from the
tensors that every layer saves for the backward pass.  This file does not influence results: the train stage does not
depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.errors import WrongParameters
from runtime.wording import counted
from vgg.network.model import VGG, Architecture, Dropout
from vgg.params import load
from vgg.params.shard import EMBEDDED, ShardParams
from vgg.params.train import Plateau, Steps, TrainParams
from vgg.sharding.editions import EDITIONS
from vgg.sharding.layouts import LAYOUTS
from vgg.training.agenda import num_steps_of
from vgg.training.schedule import Schedule
from vgg.training.task import share_of
from vgg.training.warmup import MAX_IMAGES

INDEX_BYTES = 8  # per output of a pooling: the position of the maximum
FETCHED = 2  # batches of uint8 crops on the device: one in use, one being copied
ROUND_RATES = (1000, 4000, 16_000)  # images/s, to estimate the duration if the throughput is not known


@dataclass(frozen=True)
class Data:
    """Size of a training set.  source: of these numbers, for the plan."""

    num_images: int
    num_classes: int
    source: str


def data(
    params: str, manifest: dict[str, Any] | None, num_images: int | None = None, num_classes: int | None = None
) -> Data:
    """The size of the training set: num_images and num_classes, else from the shards' manifest, else from shard.source.

    params: path of a params.yaml, or the section train as JSON, which has no shard.source.
    Raises WrongParameters if the size is not known.
    """
    images, classes, source = num_images, num_classes, "as given"
    if not (images and classes):
        known, source = (_in_shards(manifest), "its shards") if manifest else _in_source(params)
        images, classes = images or known[0], classes or known[1]
        source += " and as given" if num_images or num_classes else ""
    return Data(images, classes, source)


def _in_shards(manifest: dict[str, Any]) -> tuple[int, int]:
    return int(manifest["splits"]["train"]["num_images"]), len(manifest["classes"])


def _in_source(params: str) -> tuple[tuple[int, int], str]:
    section = params.lstrip().startswith("{")
    source = None if section else load(params, "shard", ShardParams).source
    if source in EDITIONS:
        edition = EDITIONS[source]
        return (edition.train.num_images, edition.num_classes), edition.name
    if source in LAYOUTS:
        layout = LAYOUTS[source]
        return (layout.num_train, layout.num_classes), layout.title
    if source in EMBEDDED:
        from vgg.sharding.open import open_source

        embedded = open_source(source, Path())
        return (len(embedded.originals("train")), len(embedded.classes)), source
    what = "a section 'train' alone does" if section else f"shard.source {source!r} does"
    raise WrongParameters(
        f"{what} not determine the number of images: give --num-images and --num-classes, or --shards of a finished "
        "shard stage"
    )


def lines(params: TrainParams, data: Data, ranks: int = 1, images_per_second: float | None = None) -> list[str]:
    """The plan, line by line.  images_per_second: of all ranks together, if known.

    Raises WrongParameters if a rank would have no image.
    """
    if params.batch_size < ranks:
        raise WrongParameters(f"train.batch_size: {params.batch_size} is below the number of ranks, {ranks}")
    architecture = Architecture(
        params.configuration, params.batch_norm, params.classifier_width, data.num_classes, params.input_size
    )
    with torch.device("meta"):
        network = VGG(architecture, params.dropout)
    steps_per_epoch = data.num_images / params.batch_size
    num_steps = num_steps_of(params, data.num_images)
    rows: list[tuple[str, str]] = [
        ("data", f"{counted(data.num_images, 'image')}, {data.num_classes:,} classes ({data.source})"),
        ("batch", _batch(params, ranks)),
        (
            "steps",
            f"{steps_per_epoch:,.1f} an epoch · {counted(params.epochs, 'epoch')} = {counted(num_steps, 'step')}",
        ),
        *_rates(params, data.num_images, num_steps),
        *_checkpoints(params, network, num_steps),
        ("network", _network(params, network)),
        *_flops(network, num_steps * params.batch_size),
        *_memory(params, network, ranks),
        *_time(num_steps * params.batch_size, images_per_second),
    ]
    return [f"{name:<13}{text}" for name, text in rows]


def micro_batch(params: TrainParams, ranks: int) -> int:
    """Maximum number of images that a rank computes at once; for 'auto', before it is reduced to fit into memory."""
    if params.micro_batch_size == "auto":
        return min(share_of(params, ranks), max(1, MAX_IMAGES * 224**2 // params.input_size**2))
    return min(share_of(params, ranks), params.micro_batch_size)


def _batch(params: TrainParams, ranks: int) -> str:
    each = f"{params.batch_size / ranks:.1f}".removesuffix(".0")
    auto = " (auto: halved until it fits into memory)" if params.micro_batch_size == "auto" else ""
    return f"{params.batch_size:,} images a step = {each} a rank × {ranks}; at once {micro_batch(params, ranks)}{auto}"


def drop_steps(rule: Steps, steps_per_epoch: float) -> list[int]:
    """The first step with each lower rate, consistent with Schedule.rate."""
    found = []
    for end in rule.drop_epochs:
        step = math.floor(end * steps_per_epoch)
        while step / steps_per_epoch < end:
            step += 1
        found.append(step)
    return found


def _rates(params: TrainParams, num_images: int, num_steps: int) -> Iterator[tuple[str, str]]:
    rule, steps_per_epoch = params.schedule, num_images / params.batch_size
    yield "schedule", Schedule(rule, params.learning_rate, steps_per_epoch).describe()
    if rule.warmup_epochs:
        yield "", f"rises over the first {math.ceil(rule.warmup_epochs * steps_per_epoch):,} steps"
    if isinstance(rule, Steps) and rule.drop_epochs:
        drops = [f"{step:,}{' (after the end)' * (step >= num_steps)}" for step in drop_steps(rule, steps_per_epoch)]
        yield "", f"drops at steps {', '.join(drops)}"
    if isinstance(rule, Plateau):
        epochs = 1 + rule.patience * (rule.max_drops + 1)  # the first epoch is always an improvement
        if epochs < params.epochs:
            step = math.ceil(epochs * num_images / params.batch_size)
            yield "", f"drops depend on validation; ends after epoch {epochs} (step {step:,}) at the earliest"
        else:
            yield "", "drops depend on validation; too few epochs for it to end training early"


def checkpoint_bytes(params: TrainParams, network: VGG) -> int:
    """Bytes of weights, batch norm statistics and momentum in a checkpoint; the rest is some kilobytes."""
    tensors: list[torch.Tensor] = list(network.state_dict().values())
    momentum = 4 * _num_parameters(network) if params.momentum else 0
    return momentum + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _checkpoints(params: TrainParams, network: VGG, num_steps: int) -> Iterator[tuple[str, str]]:
    size, newest = checkpoint_bytes(params, network), params.keep_checkpoints
    every, regular = params.checkpoint_steps, num_steps // params.checkpoint_steps
    yield "checkpoints", f"every {every:,} steps ({regular:,} in all), at every new best and at the end"
    yield "", f"{size:,} bytes each, plus some kilobytes"
    # a new one is complete before the oldest is deleted
    most = f"{_si((newest + 2) * size, 'B')} of disk: the {newest} newest, the best and one being written"
    yield "", f"{most}; {_si(2 * size, 'B')} are kept: the last and the best"


def _network(params: TrainParams, network: VGG) -> str:
    batch_norm = ", batch norm" if params.batch_norm else ""
    initial = " from --initial" if params.init in ("shallower", "checkpoint") else ""
    return (
        f"{params.configuration}{batch_norm}, {params.input_size} pixels: {_num_parameters(network):,} parameters; "
        f"first weights: {params.init}{initial}"
    )


def _num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def macs(network: VGG) -> int:
    """Multiply-adds of the forward pass of an image, in convolutions and linear layers."""
    found, side = 0, network.architecture.input_size
    for layer in [*network.features, *network.classifier]:
        if isinstance(layer, nn.Conv2d):
            found += layer.weight.numel() * side**2
        elif isinstance(layer, nn.MaxPool2d):
            side //= 2
        elif isinstance(layer, nn.Linear):
            found += layer.weight.numel()
    return found


def _flops(network: VGG, num_images: int) -> Iterator[tuple[str, str]]:
    forward = 2 * macs(network)
    training = f"{_si(3 * forward, 'FLOP')} in training (3 ×)"
    yield "FLOPs", f"{_si(forward, 'FLOP')} an image forward (2 per multiply-add), {training}"
    yield "", f"{_si(3 * forward * num_images, 'FLOP')} in total, without validation"


def saved_bytes(network: VGG, item: int) -> int:
    """Bytes that the eager forward pass of an image saves for the backward pass.

    item: bytes per number, 2 for bf16 under autocast, 4 for fp32.  Tensors that share memory (in-place layers; the
    output of a layer and the input of the next one) count once.
    """
    side, channels = network.architecture.input_size, 3
    found = item * channels * side**2  # the input of the first convolution
    for layer in network.features:
        if isinstance(layer, nn.Conv2d):
            channels = layer.out_channels  # its output is saved by the next layer
        elif isinstance(layer, nn.BatchNorm2d | nn.ReLU):
            found += item * channels * side**2  # batch norm saves its input, ReLU its output
        elif isinstance(layer, nn.LocalResponseNorm):
            squares = item * (channels + layer.size - 1)  # padded; saved by the mean over the window
            found += (squares + 3 * 4 * channels) * side**2  # base, power and quotient: fp32 under autocast
        elif isinstance(layer, nn.MaxPool2d):
            side //= 2
            found += (item + INDEX_BYTES) * channels * side**2
    for layer in network.classifier:
        if isinstance(layer, nn.ReLU):
            found += item * network.architecture.classifier_width
        elif isinstance(layer, Dropout) and layer.p:
            found += (item + 1) * network.architecture.classifier_width  # its output and its mask, a bool
    return found + 4 * network.architecture.num_classes  # the logarithms of the posteriors


def memory(params: TrainParams, network: VGG, ranks: int) -> dict[str, int]:
    """Peak device memory of a rank, bytes, by use."""
    bf16, fp32 = params.precision != "fp32", 4 * _num_parameters(network)
    crops = share_of(params, ranks) * 3 * params.input_size**2
    compressed = ranks > 1 and params.gradient_compression == "bf16"
    return {
        "weights": fp32 + sum(buffer.numel() * buffer.element_size() for buffer in network.buffers()),
        "momentum": fp32 if params.momentum else 0,
        "gradients": fp32,
        "bf16 copies": fp32 // 2 if bf16 else 0,
        "bf16 gradients to send": fp32 // 2 if compressed else 0,
        "crops": FETCHED * crops,
        "activations": micro_batch(params, ranks) * saved_bytes(network, 2 if bf16 else 4),
    }


def _memory(params: TrainParams, network: VGG, ranks: int) -> Iterator[tuple[str, str]]:
    needed = memory(params, network, ranks)
    each = saved_bytes(network, 4 if params.precision == "fp32" else 2)
    assumed = " (bf16, if the device supports it)" if params.precision == "auto" else ""
    yield "memory", f"about {_si(sum(needed.values()), 'B')} on the device of a rank{assumed}, plus memory of libraries"
    held = [name for name in needed if name not in ("crops", "activations") and needed[name]]
    yield "", " · ".join(f"{name} {_si(needed[name], 'B')}" for name in held)
    activations = f"{micro_batch(params, ranks)} × {_si(each, 'B')} of activations if eager, less if compiled"
    yield "", f"crops {_si(needed['crops'], 'B')} · {activations}"


def _time(num_images: int, images_per_second: float | None) -> Iterator[tuple[str, str]]:
    yield "time", f"{num_images:,} images, without validation:"
    if images_per_second:
        yield "", f"{_duration(num_images / images_per_second)} at {images_per_second:,g} images/s"
    else:
        rates = ", ".join(f"{_duration(num_images / rate)} at {rate:,} images/s" for rate in ROUND_RATES)
        yield "", f"{rates}; 24.0 h at {math.ceil(num_images / 86_400):,} images/s"


def _duration(seconds: float) -> str:
    for name, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.1f} s"


def _si(value: float, unit: str) -> str:
    """A value with a decimal prefix: 30940000000, 'FLOP' is '30.94 GFLOP'."""
    power = 0
    while value >= 1000 and power < 6:
        value, power = value / 1000, power + 1
    return f"{value:.{2 if power else 0}f} {' kMGTPE'[power].strip()}{unit}"
