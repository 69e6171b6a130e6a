"""Checkpoints in the background: training waits for a copy in memory, a thread does the rest."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from typing import Any

import torch

from vgg import checkpoint
from vgg.checkpoint import Tensors
from vgg.errors import Problem


class Saver:
    """Writes the checkpoints of a run, one at a time.

    keep: how many of the newest stay; the best stays too.
    """

    def __init__(self, directory: Path, about: dict[str, Any], keep: int) -> None:
        self._directory, self._about, self._keep = directory, about, keep
        self._copies: dict[str, Tensors] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.blocked_seconds = 0.0  # that training has waited in save() and wait()

    def save(self, weights: Tensors, momentum: Tensors, state: dict[str, Any]) -> None:
        """Take a copy of the tensors as they are now and write it while training goes on.

        state: JSON, with "step" and "best_step".  Raises the failure of an earlier checkpoint.
        """
        self.wait()
        began = time.monotonic()
        snapshot = copy.deepcopy(state)
        copied = [self._copy("weights", weights), self._copy("momentum", momentum)]
        event = None
        if any(tensor.is_cuda for tensor in weights.values()):
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._thread = threading.Thread(
            target=self._write, args=(*copied, snapshot, event), name="checkpoint", daemon=True
        )
        self._thread.start()
        self.blocked_seconds += time.monotonic() - began

    def wait(self) -> None:
        """Until the last save() is on disk.  Raises what went wrong there: StorageFailure when the disk is full."""
        began = time.monotonic()
        if self._thread:
            self._thread.join()
            self._thread = None
        self.blocked_seconds += time.monotonic() - began
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the background, once it is known."""
        failure, self._failure = self._failure, None
        if failure:
            raise failure

    def close(self) -> None:
        """Let the last checkpoint get to disk, whatever else has gone wrong."""
        if self._thread:
            self._thread.join()

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def _copy(self, kind: str, tensors: Tensors) -> Tensors:
        """Into memory that is used again: page-locked for a GPU, which then copies while the host goes on."""
        if self._copies.get(kind, {}).keys() != tensors.keys():
            self._copies[kind] = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                for name, tensor in tensors.items()
            }
        for name, target in self._copies[kind].items():
            target.copy_(tensors[name], non_blocking=True)
        return self._copies[kind]

    def _write(self, weights: Tensors, momentum: Tensors, state: dict[str, Any], copied: Any) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            step, directory = int(state["step"]), self._directory
            checkpoint.save(directory, step, weights, momentum, state, self._about)
            until_now = [older for older in checkpoint.steps(directory) if older <= step]  # later ones are damaged
            checkpoint.prune(directory, {*until_now[-self._keep :], state["best_step"]})
        except (Problem, OSError) as failure:
            self._failure = failure
        except BaseException as failure:
            self._failure = RuntimeError(f"saving step {state['step']}: {failure!r}")
            self._failure.__cause__ = failure
