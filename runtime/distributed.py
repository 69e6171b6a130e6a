"""The processes of a distributed training: those started by torchrun, or only this one under plain python."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from runtime import environment
from runtime.errors import Preempted, WrongParameters

log = logging.getLogger("vgg")

# gloo raises plain RuntimeErrors; NCCL and the store raise DistErrors.  Texts of torch 2.11 and 2.15, checked by
# tests/runtime/test_distributed.py.
GLOO_LOST_A_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "Socket")


@dataclass(frozen=True)
class Group:
    """This process among all processes of the training.  device: where it computes.

    sum_ and broadcast_ run on the device of the tensor, asynchronously on a GPU.  any, gather and barrier run between
    hosts and never wait for a device.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy the tensor of rank 0 to every rank, in place."""
        if self.world_size > 1:
            distributed.broadcast(tensor, 0)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same result on all ranks."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return bool(flags)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.any(False)


@contextmanager
def joined(timeout_seconds: float = 600) -> Iterator[Group]:
    """Join the process group described by torchrun's environment (nccl on GPUs, gloo on CPUs); leave it at the end.

    timeout_seconds: how long ranks wait for each other.
    Raises WrongParameters if there are more processes than GPUs, and Preempted when another rank is gone: saved
    checkpoints are good, and all ranks have to start again together.
    """
    rank, world_size = environment.RANK.get(), environment.WORLD_SIZE.get()
    local_rank, local_world_size = environment.LOCAL_RANK.get(), environment.LOCAL_WORLD_SIZE.get() or world_size
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise WrongParameters(
                f"rank {rank}: this machine has only {torch.cuda.device_count()} GPUs; start one process per GPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size > 1:
        if not environment.ELASTIC_RUN.is_set():  # the variable of another program or job would have it wait in silence
            log.warning("WORLD_SIZE=%d: rank %d waits for the other ranks; unset it to train alone", world_size, rank)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        yield Group(rank, world_size, local_rank, local_world_size, device)
    except (RuntimeError, distributed.DistError) as error:
        if not lost_a_rank(error):
            raise
        raise Preempted(
            f"rank {rank}: another rank is gone ({str(error).splitlines()[0][:200]}). Run again to continue from "
            "the last checkpoint; the rank that failed first reports the cause."
        ) from error
    # not after a failure: destroying the group could wait for a rank that is gone
    if world_size > 1:
        distributed.destroy_process_group()


def lost_a_rank(error: BaseException) -> bool:
    """Whether a collective operation failed because another process is gone, not because of an error in this one."""
    return isinstance(error, distributed.DistError) or any(text in str(error) for text in GLOO_LOST_A_PEER)
