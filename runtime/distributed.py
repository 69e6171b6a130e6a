"""The processes that train together: torchrun's, or just this one under plain python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from runtime import environment
from runtime.errors import Preempted, WrongParameters

# gloo raises plain RuntimeErrors; NCCL's and the store's are DistErrors.  Texts of torch 2.11 and 2.15, provoked by
# tests/runtime/test_distributed.py.
GLOO_LOST_A_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "Socket")


@dataclass(frozen=True)
class Group:
    """This process among all of them.  device: where it computes.

    Tensors of the device are reduced there, and nobody waits for them; what processes agree on (any, gather, barrier)
    goes from host to host and never waits for a device.
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
    """Join the group that torchrun describes in the environment (nccl on GPUs, gloo on CPUs); leave it at the end.

    timeout_seconds: how long ranks wait for each other.
    Raises Preempted when another rank is gone: what was saved is good, and the ranks start again together.
    """
    rank, world_size = environment.RANK.get(), environment.WORLD_SIZE.get()
    local_rank, local_world_size = environment.LOCAL_RANK.get(), environment.LOCAL_WORLD_SIZE.get() or world_size
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
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        yield Group(rank, world_size, local_rank, local_world_size, device)
    except (RuntimeError, distributed.DistError) as error:
        if not lost_a_rank(error):
            raise
        raise Preempted(
            f"rank {rank}: another rank is gone ({str(error).splitlines()[0][:200]}). Run again to go on from the "
            "last checkpoint; the rank that failed first says why."
        ) from error
    # after a failure the group is left to end with the process: leaving it could wait for a rank that is gone
    if world_size > 1:
        distributed.destroy_process_group()


def lost_a_rank(error: BaseException) -> bool:
    """Whether a collective failed because of another process, not of this one's own doing."""
    return isinstance(error, distributed.DistError) or any(text in str(error) for text in GLOO_LOST_A_PEER)
