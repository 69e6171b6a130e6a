"""Before the first step: compile the network, and find a micro-batch size that fits into device memory."""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.nn import functional

from runtime.errors import Interrupted, WrongParameters
from runtime.stopping import Stop
from vgg.training.run import Run

log = logging.getLogger("vgg.train")

MAX_IMAGES = 512  # at 224 pixels; above 668 a map of conv1 has more than 2^31 elements, and kernels are slower


def warm_up(run: Run, stop: Stop) -> None:
    """Compile the forward and backward pass and, for micro_batch_size 'auto', find the micro-batch size.

    Weights and statistics do not change.  A stop request ends it at once.
    Raises WrongParameters if the given micro-batch, or a single image, does not fit into memory.
    """
    group, params = run.group, run.params
    if params.micro_batch_size == "auto":
        largest = MAX_IMAGES * 224**2 // params.input_size**2
        run.micro_batch_size = min(run.micro_batch_size, max(1, largest))
    wanted = run.micro_batch_size
    try:
        with stop.interrupts():
            fit(run)
    except Interrupted:
        pass
    except Exception:
        if not stop():  # an interrupted compiler may raise its own exception
            raise
    run.micro_batch_size = min(group.gather(run.micro_batch_size))
    if run.micro_batch_size < wanted:  # saved, because other micro-batches round differently
        run.state.micro_batch_size = run.micro_batch_size


def fit(run: Run) -> None:
    """Try a forward and backward pass; halve the micro-batch until it fits into memory."""
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    try:
        while True:
            try:
                attempt(run, run.model)
                return
            except torch.OutOfMemoryError:
                if run.micro_batch_size == 1 or run.params.micro_batch_size != "auto":
                    raise WrongParameters(
                        f"train.micro_batch_size: {run.micro_batch_size} images of {run.params.input_size} pixels do "
                        "not fit into device memory. Lower it, set it to 'auto', or end other programs on the device."
                    ) from None
                log.info("a micro-batch of %d images does not fit; trying half", run.micro_batch_size)
                run.micro_batch_size = -(-run.micro_batch_size // 2)
            finally:
                run.optimiser.forget_gradients()
            if run.group.device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        for name, buffer in run.model.named_buffers():
            buffer.copy_(buffers[name])


def regroup(run: Run) -> None:
    """Have DDP finish its grouping of gradients before the first step.

    DDP groups them after its first two backward passes, by the order in which gradients are computed.  With three ranks
    or more the groups determine the order of summation, so the first two steps after a restart would round differently.
    """
    if run.group.world_size == 1:
        return
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    for _ in range(2):
        attempt(run, run.replica)
    run.optimiser.forget_gradients()
    for name, buffer in run.model.named_buffers():
        buffer.copy_(buffers[name])


def attempt(run: Run, network: nn.Module) -> None:
    """One forward and backward pass of grey images, with memory allocated for the momentum."""
    device, size, n = run.group.device, run.params.input_size, run.micro_batch_size
    momentum = [torch.empty_like(p) for p in run.model.parameters() if p not in run.optimiser.momentum]
    images = torch.full((n, size, size, 3), 127, dtype=torch.uint8, device=device)
    flip = torch.zeros(n, dtype=torch.bool, device=device)
    colour, keys = torch.zeros(n, 3, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    inputs = run.prepare(images, flip, colour)
    with torch.autocast(device.type, run.precision, enabled=run.precision != torch.float32):
        scores = network(inputs, keys)
    functional.cross_entropy(scores.float(), torch.zeros_like(keys)).backward()  # type: ignore[no-untyped-call]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    del momentum
