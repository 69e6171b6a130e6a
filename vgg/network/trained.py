"""The result of a finished training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime import checkpoint, manifest
from runtime.checkpoint import Expected, Step
from runtime.errors import Refused
from vgg.network.model import VGG, Architecture, blank

DTYPES = {torch.float32: "F32", torch.int64: "I64"}  # types of a VGG, as named in safetensors


def shapes_of(network: dict[str, Any]) -> Expected:
    """Names, types and shapes of the tensors of a network: a runtime.checkpoint.ShapesOf.

    network: the fields of an Architecture.  Raises ValueError if they do not describe a VGG.
    """
    try:
        with torch.device("meta"):
            model = VGG(Architecture(**network))
    except (TypeError, KeyError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"not a VGG ({error!r})") from None
    weights = {name: (DTYPES[t.dtype], list(t.shape)) for name, t in model.state_dict().items()}
    return Expected(weights, {name for name, _ in model.named_parameters()})


@dataclass(frozen=True)
class Trained:
    """The verified network of a finished training, for evaluation, registration and as initial weights."""

    directory: Path
    manifest: dict[str, Any]
    step: Step
    digest: str  # of the directory, as in dvc.lock

    @classmethod
    def open(cls, directory: Path, which: str = "last") -> Trained:
        """which: "last" or "best".  Raises Refused if training is not finished or anything is damaged."""
        finished, step = checkpoint.open_finished(directory, which, shapes_of)
        return cls(directory, finished, step, manifest.directory_digest(directory, finished))

    @classmethod
    def finish(cls, directory: Path, last: int, best: int, metadata: dict[str, Any]) -> Trained:
        """Finish a training with its last and its best step.  metadata: of the run.

        Raises Refused if a checkpoint does not verify.
        """
        finished, step = checkpoint.finish(directory, last, best, metadata, shapes_of)
        return cls(directory, finished, step, manifest.directory_digest(directory, finished))

    @property
    def weights_sha256(self) -> str:
        entries = {entry["path"]: entry["sha256"] for entry in self.step.metadata["files"]}
        return str(entries["weights.safetensors"])

    def expect_network(self, architecture: Architecture) -> None:
        """Raises Refused unless it is a network of this architecture."""
        if changes := list(checkpoint.differences(self.manifest["network"], architecture.as_dict())):
            raise Refused(f"{self.directory}: init 'checkpoint' needs the same network; {'; '.join(changes)}")

    def network(self) -> VGG:
        """The network with its weights, in evaluation mode."""
        model = blank(Architecture(**self.manifest["network"]))
        model.load_state_dict(self.step.weights())
        return model.eval()
