"""How a training scales with GPUs, as arithmetic: the model behind benchmarks.scale.

A step is the passes over the images, what is done with the weights whatever the batch, and what of the exchange of
gradients is not hidden by the backward pass (benchmarks.gradients).  Decoding, reading and the host run beside it.
Times are in seconds, sizes in bytes, rates per second.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from benchmarks.gradients import BF16, FP32, Layer, Pass, exposed, grouped, num_parameters, ring_seconds

MAX_WORKERS = 14  # of a rank: runtime.shards.loader.num_workers
# bytes of memory traffic a step for every parameter, whatever the batch
FORWARD_TRAFFIC = FP32 + 2 * BF16  # autocast reads the weight, writes a copy; the layer reads it
BACKWARD_TRAFFIC = 3 * BF16 + FP32  # reads the copy; writes the gradient, reads it, writes it as float32
EXCHANGE_TRAFFIC = 2 * FP32  # into the bucket: gradients are set to None every step
UPDATE_TRAFFIC = FP32 + 5 * FP32  # total norm; SGD reads weight, gradient, momentum and writes two


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is known of the machines.  ORIGIN of benchmarks.scale says where every default comes from."""

    gpus_per_node: int
    conv_flops: float  # FLOP/s that convolutions reach
    memory_bandwidth: float  # bytes/s that a GPU's memory reaches
    other_share: float  # of a step's time that is neither products nor memory passes
    image_seconds: float | None  # of a training step for every image, measured; None: from the four above
    step_seconds: float | None  # of a training step for any number of images, measured; None: from traffic
    forward_rate: float  # images/s of validation on a GPU
    nvlink: float  # bytes/s, bus bandwidth of an all-reduce inside a node
    network: float  # bytes/s out of a node, all its cards together
    hop: float  # seconds that a message takes from rank to rank in a ring, added to its transfer
    host_seconds: float  # of the host a step: starting kernels
    agreement_hop: float  # seconds for every rank when all agree on a flag (gloo between hosts, every step)
    cores_per_node: int
    decode_rate: float  # images/s that a core decodes
    loader_share: float  # of that which arrives through the worker processes
    device_decode_rate: float | None  # images/s of a GPU's decoder; None: not measured
    image_bytes: float
    read_rate: float  # bytes/s that a node reads of its local shards
    store_rate: float  # bytes/s of the store, all nodes together
    copy_rate: float  # bytes/s, tensors of a GPU to the host
    write_rate: float  # bytes/s, checkpoint to disk: safetensors, sha256, fsync
    upload_rate: float  # bytes/s, checkpoint to the store; 0: no store
    train_images: int
    val_images: int
    checkpoint_steps: int


def from_json(defaults: Inputs, changes: dict[str, Any]) -> Inputs:
    """Raises ValueError for names that are no inputs."""
    known = {field.name for field in fields(Inputs)}
    if unknown := sorted(changes.keys() - known):
        raise ValueError(f"no inputs: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return Inputs(**{**vars(defaults), **changes})


def image_seconds(layer: Layer, given: Inputs) -> float:
    """A layer's forward pass over one image, before any measurement; the backward pass takes twice as long."""
    floor = layer.flops / given.conv_flops + layer.traffic / given.memory_bandwidth
    return floor / (1 - given.other_share)


def weight_seconds(network: Sequence[Layer], given: Inputs, traffic: int) -> float:
    """What a step spends on the weights of these layers whatever the batch.  traffic: bytes for every parameter."""
    modelled = traffic * num_parameters(network) / given.memory_bandwidth
    if given.step_seconds is None:
        return modelled
    return modelled * given.step_seconds / traffic_seconds(network, given)


def traffic_seconds(network: Sequence[Layer], given: Inputs) -> float:
    """What a step of one GPU spends on weights, from their traffic."""
    traffic = FORWARD_TRAFFIC + BACKWARD_TRAFFIC + UPDATE_TRAFFIC
    return traffic * num_parameters(network) / given.memory_bandwidth


def fitted(rates: dict[int, float], weights: float) -> dict[str, float]:
    """image_seconds and step_seconds of one GPU from measured images/s by batch.

    weights: seconds of a step for any batch, for the case of one measured batch.  Of more, the line of least squares.
    Raises ValueError if a batch takes no longer than a smaller one.
    """
    seconds = {batch: batch / rate for batch, rate in rates.items()}
    if len(seconds) == 1:
        ((batch, taken),) = seconds.items()
        slope, once = (taken - weights) / batch, weights
    else:
        slope, once = statistics.linear_regression(list(seconds), list(seconds.values()))
    if slope <= 0:
        raise ValueError(f"rates of {rates} by batch: a larger batch takes no longer")
    return {"image_seconds": slope, "step_seconds": max(0.0, once)}


def passes(network: Sequence[Layer], given: Inputs, images: float, exchanged: bool) -> Pass:
    """The passes over a rank's share of a batch; exchanged: gradients are copied into buckets."""
    modelled = 3 * sum(image_seconds(layer, given) for layer in network)
    images *= (given.image_seconds or modelled) / modelled
    total = num_parameters(network)

    def seconds(layer: Layer, factor: int, traffic: int) -> float:
        share = sum(layer.parameters) / total
        return factor * images * image_seconds(layer, given) + share * weight_seconds(network, given, traffic)

    back = BACKWARD_TRAFFIC + (EXCHANGE_TRAFFIC if exchanged else 0)
    forward = sum(seconds(layer, 1, FORWARD_TRAFFIC) for layer in network)
    return Pass(forward, tuple((layer, seconds(layer, 2, back)) for layer in reversed(network)))


def decoding_rate(given: Inputs, ranks: int, device: bool) -> float:
    """Images/s that a rank can decode: its workers, or its GPU."""
    if device:
        if given.device_decode_rate is None:
            raise ValueError("device_decode_rate is not known: measure it with benchmarks.loader on a GPU")
        return given.device_decode_rate
    return workers(given, ranks) * given.decode_rate * given.loader_share


def workers(given: Inputs, ranks: int) -> int:
    """Decoding processes of a rank, as runtime.shards.loader.num_workers."""
    return max(1, min(MAX_WORKERS, given.cores_per_node // min(ranks, given.gpus_per_node) - 1))


def largest_load(images: int, batch: int, processes: int) -> int:
    """Images of the busiest process when they are dealt to processes in batches, in turn (Loader.load)."""
    sizes = [batch] * (images // batch) + [images % batch]
    return max(sum(sizes[first::processes]) for first in range(processes))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """ranks: GPUs.  batch: images a step over all ranks.  regions: compiled as on a GPU, not layer by layer."""

    ranks: int
    batch: int
    compressed: bool = False
    device_decoder: bool = False
    regions: bool = True


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of a step.  images, weights, exchange: of the GPU, in sequence; the others run beside it."""

    images: float
    weights: float
    exchange: float
    decoding: float
    reading: float
    host: float

    @property
    def device(self) -> float:
        return self.images + self.weights + self.exchange

    @property
    def seconds(self) -> float:
        return max(self.device, self.decoding, self.reading, self.host)

    @property
    def limit(self) -> str:
        """What takes the time: of what runs at once the longest; on the GPU the images, unless 10 % is lost."""
        beside = {"decoding": self.decoding, "reading": self.reading, "host": self.host}
        if (longest := max(beside, key=lambda name: beside[name])) and beside[longest] > self.device:
            return longest
        if self.images >= 0.9 * self.device:
            return "compute"
        return "exchange" if self.exchange > self.weights else "weights"


def step(network: Sequence[Layer], given: Inputs, plan: Plan) -> Step:
    """One training step; the slowest rank has the largest share of the batch."""
    ranks, share = plan.ranks, -(-plan.batch // plan.ranks)
    nodes = -(-ranks // given.gpus_per_node)
    done = passes(network, given, share, ranks > 1)
    update = weight_seconds(network, given, UPDATE_TRAFFIC)
    waited = 0.0
    if ranks > 1:
        bandwidth = given.nvlink if nodes == 1 else min(given.nvlink, given.network)
        sent = grouped(done.ready(plan.regions), plan.compressed)
        waited = exposed([(at, ring_seconds(size, ranks, bandwidth, given.hop)) for at, size in sent], done.computed)
    images = share * (given.image_seconds or 3 * sum(image_seconds(layer, given) for layer in network))
    return Step(
        images=images, weights=done.computed + update - images, exchange=waited,
        decoding=share / decoding_rate(given, ranks, plan.device_decoder),
        reading=share * min(ranks, given.gpus_per_node) * given.image_bytes / given.read_rate,
        host=given.host_seconds + (ranks - 1) * given.agreement_hop,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Seconds of an epoch, and steps.  stalled: training waits for checkpoints, if every epoch is a new best."""

    steps: float
    training: float
    validation: float
    stalled: float

    @property
    def seconds(self) -> float:
        return self.training + self.validation + self.stalled


def epoch(network: Sequence[Layer], given: Inputs, plan: Plan) -> Epoch:
    steps = given.train_images / plan.batch
    training = steps * step(network, given, plan).seconds
    share = -(-given.val_images // plan.ranks)
    rate = decoding_rate(given, plan.ranks, plan.device_decoder)
    processes = workers(given, plan.ranks)
    busiest = share if plan.device_decoder else processes * largest_load(share, plan.batch, processes)
    validation = max(share / given.forward_rate, busiest / rate)
    saves = 1 + steps / given.checkpoint_steps
    size = 2 * FP32 * num_parameters(network)
    written = size / given.write_rate + (size / given.upload_rate if given.upload_rate else 0)
    stalled = saves * size / given.copy_rate + max(0.0, saves * written - training - validation)
    return Epoch(steps=steps, training=training, validation=validation, stalled=stalled)
