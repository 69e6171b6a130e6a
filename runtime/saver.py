"""Checkpoints in the background: training waits for a copy in memory, a thread does the rest."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from runtime import checkpoint
from runtime.checkpoint import Tensors


class Saver:
    """Writes the checkpoints of a run, one at a time.

    keep: how many of the newest stay; the best stays too.  saved: called behind every checkpoint, by the thread.
    """

    def __init__(self, directory: Path, about: dict[str, Any], keep: int, saved: Callable[[], None]) -> None:
        self._directory, self._about, self._keep, self._saved = directory, about, keep, saved
        self._copies: dict[str, Tensors] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self.blocked_seconds = 0.0  # that training has waited for it

    def save(self, weights: Tensors, momentum: Tensors, state: dict[str, Any]) -> None:
        """Take a copy of the tensors as they are now and write it while training goes on.

        state: JSON, with "step" and "best_step".  Raises the failure of the checkpoint before.
        """
        self.settle()
        began = time.monotonic()
        copies = self._copy("weights", weights), self._copy("momentum", momentum)
        copied = None
        if any(tensor.is_cuda for tensor in weights.values()):
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._writing = self._thread.submit(self._write, *copies, copy.deepcopy(state), copied)
        self.blocked_seconds += time.monotonic() - began

    def settle(self) -> None:
        """Wait until the last checkpoint is on disk.  Raises what went wrong: StorageFailure when the disk is full."""
        began = time.monotonic()
        writing, self._writing = self._writing, None
        try:
            if writing:
                writing.result()
        finally:
            self.blocked_seconds += time.monotonic() - began

    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._writing is None or self._writing.done()

    def failed(self) -> bool:
        """Whether the last checkpoint is known not to have got to disk; settle() raises why."""
        return bool(self._writing and self._writing.done() and self._writing.exception())

    def close(self) -> None:
        """Let the last checkpoint get to disk, whatever else has gone wrong."""
        wait([self._writing] if self._writing else [])
        self._thread.shutdown()

    def _copy(self, kind: str, tensors: Tensors) -> Tensors:
        """Into memory that is used again: page-locked for a GPU, which then copies while the host goes on."""
        if kind not in self._copies or self._copies[kind].keys() != tensors.keys():  # there may be none at all
            self._copies[kind] = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                for name, tensor in tensors.items()
            }
        for name, target in self._copies[kind].items():
            target.copy_(tensors[name], non_blocking=True)
        return self._copies[kind]

    def _write(self, weights: Tensors, momentum: Tensors, state: dict[str, Any], copied: Any) -> None:
        if copied is not None:
            copied.synchronize()
        step, directory = int(state["step"]), self._directory
        checkpoint.save(directory, step, weights, momentum, state, self._about)
        until_now = [older for older in checkpoint.steps(directory) if older <= step]  # later ones are another run's
        checkpoint.prune(directory, {*until_now[-self._keep :], state["best_step"]})
        self._saved()
