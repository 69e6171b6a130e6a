"""What a training minimises, on which images, and how it is measured."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional

from runtime.shards.batches import Crops
from runtime.shards.loader import Make
from runtime.shards.shardset import ShardSet, Split
from vgg.data.stream import CentreWindows, Cut, TrainingCrops
from vgg.evaluation.metrics import ranks_of_labels
from vgg.network.init import for_pixels, initialise, transplant
from vgg.network.model import VGG, Architecture
from vgg.network.trained import Trained
from vgg.params.train import TrainParams

Pixels = dict[str, list[float]]


class Measured(NamedTuple):
    """loss: summed over the images, float32 ().  num_images: that count.  right: (2,), in the sense of each error."""

    loss: torch.Tensor
    num_images: int | torch.Tensor
    right: torch.Tensor


class Objective(Protocol):
    """Classification here; localisation has another one (vgg.localisation.objective).

    errors: names of two errors, fractions, in the curves; the first one decides on drops of the rate and the best step.
    """

    errors: tuple[str, str]

    def split(self, shards: ShardSet, name: str) -> Split:
        """The images of a split that are used."""
        ...

    def num_outputs(self, shards: ShardSet) -> int:
        """Outputs of fc8."""
        ...

    def described(self, architecture: Architecture) -> dict[str, Any]:
        """What identifies a run besides parameters, images, first weights and code: JSON."""
        ...

    def begin(self, model: VGG, params: TrainParams, shards: ShardSet, initial: Trained | None, pixels: Pixels) -> None:
        """Give the network its first weights, and freeze the parameters that are not trained.

        initial: for init 'shallower' and 'checkpoint'.  pixels: mean and std that the network will get.
        """
        ...

    def set_training(self, model: VGG) -> None:
        """Set every layer to its mode of training."""
        ...

    def training_crops(self, split: Split, params: TrainParams, cut: Cut) -> Make: ...
    def validation_crops(self, split: Split, params: TrainParams, cut: Cut) -> Make: ...

    def measure(self, outputs: torch.Tensor, crops: Crops) -> Measured:
        """Of training_crops.  outputs: float32 (n, num_outputs).  The host does not wait for the device."""
        ...

    def validate(self, outputs: torch.Tensor, crops: Crops) -> Measured:
        """Of validation_crops; the host may wait."""
        ...

    def chance(self, model: VGG) -> float | None:
        """The loss of a network that has learnt nothing, if it is known."""
        ...


class Classification:
    """Cross-entropy of the class; top-1 and top-5 errors."""

    errors = ("top1_error", "top5_error")

    def split(self, shards: ShardSet, name: str) -> Split:
        return shards.split(name)

    def num_outputs(self, shards: ShardSet) -> int:
        return len(shards.wnids)

    def described(self, architecture: Architecture) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def begin(
        self,
        model: VGG,
        params: TrainParams,
        shards: ShardSet,  # noqa: ARG002
        initial: Trained | None,
        pixels: Pixels,
    ) -> None:
        if params.init != "checkpoint" and params.init != "shallower":  # mypy understands this
            initialise(model, params.init, params.seed)
            return
        assert initial is not None
        if params.init == "checkpoint":
            initial.expect_network(model.architecture)
            model.load_state_dict(for_pixels(initial.step.weights(), initial.manifest["pixels"], pixels))
        else:
            initialise(model, "normal", params.seed)
            shallower = initial.network()
            shallower.load_state_dict(for_pixels(shallower.state_dict(), initial.manifest["pixels"], pixels))
            transplant(model, shallower)

    def set_training(self, model: VGG) -> None:
        model.train()

    def training_crops(self, split: Split, params: TrainParams, cut: Cut) -> Make:
        return TrainingCrops(split, params, cut)

    def validation_crops(self, split: Split, params: TrainParams, cut: Cut) -> Make:
        return CentreWindows(split, params, cut)

    def measure(self, outputs: torch.Tensor, crops: Crops) -> Measured:
        ranks = ranks_of_labels(outputs.detach(), crops.labels)
        loss = functional.cross_entropy(outputs, crops.labels, reduction="sum")
        return Measured(loss, len(ranks), torch.stack([(ranks < 1).sum(), (ranks < 5).sum()]))

    def validate(self, outputs: torch.Tensor, crops: Crops) -> Measured:
        return self.measure(outputs, crops)

    def chance(self, model: VGG) -> float | None:
        return math.log(model.architecture.num_classes)
