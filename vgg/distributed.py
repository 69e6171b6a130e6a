"""The processes that train together: torchrun's, or just this one under plain python."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from vgg.errors import WrongParameters

TIMEOUT = timedelta(minutes=10)  # of a collective: a rank that is gone for longer will not come back


@dataclass(frozen=True)
class Group:
    """This process among all of them.  device: where it computes."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every rank the tensor of rank 0, in place."""
        if self.world_size > 1:
            distributed.broadcast(tensor, 0)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank: all ranks get the same answer."""
        if self.world_size == 1:
            return flag
        return bool(self.sum_(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            distributed.barrier()


@contextmanager
def joined() -> Iterator[Group]:
    """Join the group that torchrun describes in the environment (nccl on GPUs, gloo on CPUs); leave it at the end."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise WrongParameters(
                f"rank {rank}: this machine has {torch.cuda.device_count()} GPUs; start as many processes"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Group(rank, world_size, local_rank, local_world_size, device)
    finally:
        if world_size > 1:
            distributed.destroy_process_group()
