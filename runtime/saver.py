"""Checkpoints in the background: training waits for a copy in memory; a thread writes it."""

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

    metadata: for the manifest.  keep: number of newest checkpoints to keep, in addition to the best.
    saved: called by the thread after every checkpoint.
    """

    def __init__(self, directory: Path, metadata: dict[str, Any], keep: int, saved: Callable[[], None]) -> None:
        self._directory, self._metadata, self._keep, self._saved = directory, metadata, keep, saved
        self._copies: dict[str, Tensors] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self.blocked_seconds = 0.0  # time that training waited

    def save(self, weights: Tensors, momentum: Tensors, state: dict[str, Any]) -> None:
        """Copy the tensors and write the copy while training continues.

        state: JSON, with "step" and "best_step".  Raises the error of the previous checkpoint.
        """
        self.settle()
        start = time.monotonic()
        copies = self._copy("weights", weights), self._copy("momentum", momentum)
        copied = None
        if any(tensor.is_cuda for tensor in weights.values()):
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._writing = self._thread.submit(self._write, *copies, copy.deepcopy(state), copied)
        self.blocked_seconds += time.monotonic() - start

    def settle(self) -> None:
        """Wait until the last checkpoint is on disk.  Raises its error, for example StorageFailure for a full disk."""
        start = time.monotonic()
        writing, self._writing = self._writing, None
        try:
            if writing:
                writing.result()
        finally:
            self.blocked_seconds += time.monotonic() - start

    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._writing is None or self._writing.done()

    def failed(self) -> bool:
        """Whether writing the last checkpoint has failed; settle() raises the error."""
        return bool(self._writing and self._writing.done() and self._writing.exception())

    def close(self) -> None:
        """Wait for the last checkpoint, ignoring its errors, and end the thread."""
        wait([self._writing] if self._writing else [])
        self._thread.shutdown()

    def _copy(self, kind: str, tensors: Tensors) -> Tensors:
        """Copy into reused memory; from a GPU into pinned memory, asynchronously."""
        if kind not in self._copies or self._copies[kind].keys() != tensors.keys():  # momentum may be empty
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
        checkpoint.save(directory, step, weights, momentum, state, self._metadata)
        ours = [older for older in checkpoint.steps(directory) if older <= step]  # later ones belong to another run
        checkpoint.prune(directory, {*ours[-self._keep :], state["best_step"]})
        self._saved()
