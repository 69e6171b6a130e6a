"""Localisation as an objective of training (appendix A): the last layer regresses a box instead of class scores.

A box in a crop is (centre x - 1/2, centre y - 1/2, width, height), all divided by the side of the crop; the paper does
not state the unit.  The target is the whole box, also where it leaves the crop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.errors import Refused
from runtime.shards.batches import Crops
from runtime.shards.loader import Make
from runtime.shards.shardset import ShardSet, Split
from vgg.data.stream import CentreWindows, Cut, TrainingCrops
from vgg.data.windows import Window
from vgg.localisation import boxes as geometry
from vgg.localisation.instances import Instances
from vgg.network.init import for_pixels, initialise
from vgg.network.model import VGG, Architecture
from vgg.network.trained import Trained
from vgg.params.localise import LocaliseParams
from vgg.params.train import TrainParams
from vgg.training.objective import Measured, Pixels

SIDES = 4  # of a box
CENTRE = np.array([0.5, 0.5, 0, 0])
LAST = "classifier.6."  # the layer that is new
RIGHT = 0.5  # IoU from which on a box is right
FROZEN = {"first_last": ("features.", "classifier.3."), "fc": ("features.",), "all": ()}


class Localisation:
    """Euclidean loss of the true class's box; the share of boxes with IoU < 0.5, and 1 - IoU.

    instances: of the splits train and val.  digest: of the boxes.  Only images with boxes are used.
    """

    errors = ("box_error", "box_distance")

    def __init__(self, params: LocaliseParams, instances: Mapping[str, Instances], digest: str) -> None:
        self.params, self.digest = params, digest
        self.instances = {name: found.of_images(found.has_box) for name, found in instances.items()}
        self._has_box = {name: found.has_box for name, found in instances.items()}
        self._splits: dict[str, Split] = {}

    def split(self, shards: ShardSet, name: str) -> Split:
        if name not in self._splits:
            whole = shards.split(name)
            self._splits[name] = replace(whole, rows=np.asarray(whole.rows[self._has_box[name]]))
        return self._splits[name]

    def num_outputs(self, shards: ShardSet) -> int:
        return SIDES * (len(shards.wnids) if self.params.regression == "per_class" else 1)

    def described(self, architecture: Architecture) -> dict[str, Any]:
        with torch.device("meta"):
            names = [name for name, _ in VGG(architecture).named_parameters()]
        return {
            "localise": self.params.model_dump(
                mode="json", include={"regression", "trainable", "min_visible", "instances"}
            ),
            "boxes": self.digest,
            "frozen": [name for name in names if name.startswith(FROZEN[self.params.trainable])],
        }

    def begin(self, model: VGG, params: TrainParams, shards: ShardSet, initial: Trained | None, pixels: Pixels) -> None:
        """Raises Refused if the first weights are not of a classification network of these shapes and classes."""
        assert initial is not None
        initial.expect_network(replace(model.architecture, num_classes=len(shards.wnids)))
        if initial.manifest["run"]["data"]["classes_sha256"] != shards.classes_sha256:
            raise Refused(f"{initial.directory}: is of other classes than {shards.address}")
        initialise(model, "normal", params.seed)
        last = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(LAST)}
        weights = for_pixels(initial.step.weights(), initial.manifest["pixels"], pixels)
        model.load_state_dict({**weights, **last})
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(FROZEN[self.params.trainable]))

    def set_training(self, model: VGG) -> None:
        model.train()
        if self.params.trainable != "all":
            model.features.eval()  # running statistics of batch norm stay

    def training_crops(self, split: Split, params: TrainParams, cut: Cut) -> Make:
        instances = self.instances["train"]
        if self.params.instances == "largest":
            instances = instances.largest()
        return BoxCrops(TrainingCrops(split, params, cut), instances, self.params.min_visible)

    def validation_crops(self, split: Split, params: TrainParams, cut: Cut) -> Make:
        self._windows = CentreWindows(split, params, cut)
        return self._windows

    def measure(self, outputs: torch.Tensor, crops: Crops) -> Measured:
        found, known = self.of_class(outputs, crops.labels), ~crops.boxes.isnan().any(1)
        target = torch.where(known[:, None], crops.boxes, 0)
        loss = torch.where(known[:, None], found - target, 0).square().sum() / 2
        overlap = geometry.paired_iou(geometry.cornered(found.detach()), geometry.cornered(target))
        right = torch.stack([((overlap >= RIGHT) & known).sum().double(), (overlap * known).sum().double()])
        return Measured(loss, known.sum(), right)

    def validate(self, outputs: torch.Tensor, crops: Crops) -> Measured:
        """With any box of the image, in pixels of the source (the central crop does not show all of it)."""
        size, numbers = self._windows.params.input_size, crops.numbers.cpu().numpy()
        windows = self._windows.windows(numbers, size)
        found = self.of_class(outputs, crops.labels).double().cpu().numpy()
        sides = self._windows.split.rows[numbers]
        loss = right = distance = 0.0
        for number, one, window, row in zip(numbers.tolist(), found, windows, sides, strict=True):
            true = self.instances["val"].of(number)
            targets = in_unit(geometry.to_crop(true, window, size), size)
            loss += float(np.square(targets - one).sum(1).min()) / 2
            box = geometry.from_crop(from_unit(one[None], size), window, size)
            overlap = geometry.iou(geometry.clamp(box, float(row["width"]), float(row["height"])), true).max()
            right, distance = right + float(overlap >= RIGHT), distance + float(overlap)
        return Measured(torch.tensor(loss), len(numbers), torch.tensor([right, distance], device=outputs.device))

    def chance(self, model: VGG) -> float | None:  # noqa: ARG002  # of the mean box, which depends on the data
        return None

    def of_class(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The boxes of these classes, (n, 4), of outputs (n, 4) or (n, 4 classes)."""
        if self.params.regression == "single":
            return outputs
        return outputs.view(len(outputs), -1, SIDES)[torch.arange(len(labels), device=labels.device), labels]


@dataclass(frozen=True)
class BoxCrops:
    """Random crops with what is to be found in them: a runtime.shards.loader.Make.

    Of several boxes one is drawn, a function of (seed, epoch, image).  A crop that shows less than min_visible of it
    has none: NaN.
    """

    crops: TrainingCrops
    instances: Instances
    min_visible: float

    def __call__(self, wanted: tuple[NDArray[np.int64], NDArray[np.int64]], into: Any) -> NDArray[np.void]:
        (numbers, epochs), size = wanted, into.shape[1]
        rows = self.crops(wanted, into)
        windows = np.array(self.crops.windows(numbers, epochs, size), np.float64).reshape(-1, SIDES)
        boxes = self.instances.drawn(self.crops.params.seed, epochs, numbers)
        boxes = geometry.to_crop(boxes, Window(*windows.T), size)  # arrays: of every image
        seen = geometry.visible(boxes, size)
        boxes = np.where(rows["flip"][:, None], geometry.flip(boxes, size), boxes)
        rows["box"] = np.where((seen >= self.min_visible)[:, None], in_unit(boxes, size), np.nan)
        return rows


def in_unit(boxes: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Boxes (n, 4) in pixels of a crop of this side as the network has them: see the beginning of this file."""
    unit: NDArray[np.float64] = geometry.centred(boxes) / size - CENTRE
    return unit


def from_unit(unit: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """The inverse of in_unit(); negative sides become 0."""
    return geometry.cornered((unit + CENTRE) * size)
