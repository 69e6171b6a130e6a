"""One training run: how it starts, continues with weights and momentum restored, and is saved."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from runtime import checkpoint
from runtime.distributed import Group
from runtime.errors import Preempted, Problem
from runtime.saver import Saver
from runtime.shards.batches import Crops
from vgg import draws
from vgg.data.augment import Prepare
from vgg.evaluation.metrics import Counts
from vgg.network.model import VGG, Architecture, blank
from vgg.network.precision import precision_on
from vgg.params.train import TrainParams
from vgg.training.objective import Objective
from vgg.training.schedule import Schedule
from vgg.training.sgd import SGD
from vgg.training.task import State, Task, share_of

log = logging.getLogger("vgg.train")

# the option has another name since torch 2.15
_DDP = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP else "broadcast_buffers"

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt


@dataclass(kw_only=True)
class Run:
    """One training run in memory."""

    params: TrainParams
    objective: Objective
    group: Group
    model: VGG
    replica: nn.Module  # the model, or the model inside DistributedDataParallel
    optimiser: SGD
    prepare: Prepare
    schedule: Schedule
    precision: torch.dtype
    state: State
    window: Counts
    epoch: Counts
    trouble: torch.Tensor  # float32 (): 1 after the first non-finite loss or gradient; then updates do nothing
    trouble_step: torch.Tensor  # float64 (): the step where that happened, or -1
    micro_batch_size: int  # maximum number of images that this rank computes at once
    samples: int = 0  # this rank's part of State.samples, modulo 2^64

    def momentum(self) -> dict[str, torch.Tensor]:
        """The buffers of SGD by the name of the parameter; without those that were not updated yet."""
        buffers = self.optimiser.momentum
        return {name: buffers[p] for name, p in self.model.named_parameters() if p in buffers}

    def parts(self, crops: Crops) -> list[Crops]:
        """Split this rank's share of a batch into micro-batches and copy them to the device."""
        size, device = self.micro_batch_size, self.group.device
        columns = [tensor.to(device, non_blocking=True).split(size) for tensor in crops]  # type: ignore[no-untyped-call]
        return [Crops(*part) for part in zip(*columns, strict=True)]


def start(task: Task, metadata: dict[str, Any], group: Group) -> Run:
    """A run at step 0 on this rank; connect() joins the ranks.  metadata: from describe()."""
    params = task.params
    if group.device.type == "cuda" and params.deterministic:  # on a CPU all operations used here are
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    precision = precision_on(params.precision, group.device)
    model = blank(Architecture(**metadata["network"]), params.dropout)
    task.objective.begin(model, params, task.shards, task.initial, metadata["pixels"])
    task.objective.set_training(model)
    model = model.to(group.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels = metadata["pixels"]
    prepare = Prepare(pixels["mean"], pixels["std"], params.colour_shift, precision).to(group.device)
    if group.device.type == "cuda":
        torch.backends.cudnn.benchmark = not params.deterministic
        # two regions: the classifier's gradients (89 % of the bytes) are exchanged while the convolutions compute
        model.features.compile(dynamic=False)
        model.classifier.compile(dynamic=False)
        prepare.compile(dynamic=False)
    else:
        keep_freed_memory()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trouble = torch.zeros((), device=group.device)
    steps_per_epoch = len(task.split("train")) / params.batch_size
    share = share_of(params, group.world_size)
    return Run(
        params=params,
        objective=task.objective,
        group=group,
        model=model,
        replica=model,
        optimiser=SGD(trainable, params.momentum, params.weight_decay, skip=trouble),
        prepare=prepare,
        schedule=Schedule(params.schedule, params.learning_rate, steps_per_epoch),
        precision=precision,
        state=State(),
        window=Counts.zeros(group.device),
        epoch=Counts.zeros(group.device),
        trouble=trouble,
        trouble_step=torch.full((), -1.0, dtype=torch.float64, device=group.device),
        micro_batch_size=share if params.micro_batch_size == "auto" else min(share, params.micro_batch_size),
    )


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks; otherwise the kernel has to clear new pages at every step."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def connect(run: Run) -> None:
    """Wrap the model in DistributedDataParallel, so that the ranks average gradients."""
    group, params = run.group, run.params
    if group.world_size == 1:
        return
    in_parts = any(group.gather(run.micro_batch_size < share_of(params, group.world_size)))
    options: dict[str, Any] = {
        "device_ids": [group.device] if group.device.type == "cuda" else None,
        "gradient_as_bucket_view": True,
        _SYNC_BUFFERS: False,  # validate() does it, once an epoch
        "static_graph": not in_parts,  # it does not support backward passes without an exchange
    }
    replica = nn.parallel.DistributedDataParallel(run.model, **options)
    if params.gradient_compression == "bf16":
        replica.register_comm_hook(None, bf16_compress_hook)
    run.replica = replica


def restore(run: Run, earlier: checkpoint.Step) -> None:
    """Set weights, momentum, counters and schedule to those of a checkpoint."""
    run.state = State(**earlier.state)
    run.schedule.restore(run.state.schedule)
    run.model.load_state_dict(earlier.weights())
    momentum = earlier.momentum()
    for name, parameter in run.model.named_parameters():
        if name in momentum:
            buffer = torch.empty_like(parameter)  # keeps channels_last
            run.optimiser.momentum[parameter] = buffer.copy_(momentum[name])
    run.micro_batch_size = min(run.micro_batch_size, run.state.micro_batch_size or run.micro_batch_size)
    if run.group.is_first:  # these are sums over all ranks, so only one rank adds them
        run.window.total += torch.tensor(run.state.window, dtype=torch.float64, device=run.group.device)
        run.epoch.total += torch.tensor(run.state.epoch, dtype=torch.float64, device=run.group.device)
        run.samples = int(run.state.samples, 16)


def samples_digest(step: int, positions: NDArray[np.int64], numbers: NDArray[np.int64]) -> int:
    """The contribution of a step to State.samples: images `numbers` at `positions` of its global batch.

    A sum of random bits modulo 2^64, so it does not depend on the number of ranks; an image that is missing, repeated
    or at another position changes it.
    """
    return int(draws.bits("samples", step, positions, numbers).sum(dtype=np.uint64))


def save(run: Run, saver: Saver) -> None:
    """Start a checkpoint of the current state; rank 0 writes it in the background."""
    state, group = run.state, run.group
    state.window = group.sum_(run.window.total.clone()).tolist()
    state.epoch = group.sum_(run.epoch.total.clone()).tolist()
    state.schedule = run.schedule.state()
    state.samples = f"{sum(group.gather(run.samples)) % 2**64:016x}"
    if group.is_first:
        saver.save(run.model.state_dict(), run.momentum(), vars(state))


def settle(run: Run, saver: Saver) -> None:
    """Wait until the last checkpoint is on disk.  Raises its error on rank 0, Preempted on others."""
    failure: Exception | None = None
    try:
        saver.settle()
    except (Problem, OSError) as problem:
        failure = problem
    if run.group.any(failure is not None):
        raise failure or Preempted("rank 0 could not save its checkpoint")
