"""Before the first step: everything compiled, and a micro-batch that fits into the device's memory."""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.nn import functional

from runtime.errors import Interrupted, WrongParameters
from runtime.stopping import Stop
from vgg.training.run import Run

log = logging.getLogger("vgg.train")

MOST_IMAGES = 512  # at 224 pixels; above 668 a map of conv1 has more than 2^31 elements, and kernels get slower


def warm_up(run: Run, stop: Stop) -> None:
    """Compile the network, forward and backward, and find the micro-batch size if parameters leave it open.

    Changes nothing else: no weight, no statistic.  A stop asked for meanwhile ends it at once.
    Raises WrongParameters if not even one image fits.
    """
    group, params = run.group, run.params
    if params.micro_batch_size == "auto":
        most = MOST_IMAGES * 224**2 // params.input_size**2
        run.micro_batch_size = min(run.micro_batch_size, max(1, most))
    wanted = run.micro_batch_size
    try:
        with stop.interrupts():
            fit(run)
    except Interrupted:
        pass
    except Exception:
        if not stop():  # a compiler that was interrupted may dress it up
            raise
    run.micro_batch_size = min(group.gather(run.micro_batch_size))
    if run.micro_batch_size < wanted:  # from now on it is a part of the run: other parts, other rounding
        run.state.micro_batch_size = run.micro_batch_size


def fit(run: Run) -> None:
    """Try a forward and backward pass; halve the micro-batch for as long as memory runs out."""
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
                        "not fit into the device's memory. Lower it or write 'auto'; or end what else runs there."
                    ) from None
                log.info("a micro-batch of %d images does not fit; trying half", run.micro_batch_size)
                run.micro_batch_size = -(-run.micro_batch_size // 2)
            finally:
                run.optimiser.zero_grad(set_to_none=True)
            if run.group.device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        for name, buffer in run.model.named_buffers():
            buffer.copy_(buffers[name])


def regroup(run: Run) -> None:
    """Have DDP group the gradients for good.

    It does so after its first two backward passes, by the order in which gradients come.  With three ranks or more the
    groups decide in which order a sum is added up: a run that starts again would add its first two steps otherwise.
    """
    if run.group.world_size == 1:
        return
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    for _ in range(2):
        attempt(run, run.replica)
    run.optimiser.zero_grad(set_to_none=True)
    for name, buffer in run.model.named_buffers():
        buffer.copy_(buffers[name])


def attempt(run: Run, network: nn.Module) -> None:
    """One micro-batch of grey images, forward and backward, beside the momentum that the first step will make."""
    device, size, n = run.group.device, run.params.input_size, run.micro_batch_size
    momentum = [torch.empty_like(p) for p in run.model.parameters() if not run.optimiser.state.get(p)]
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
