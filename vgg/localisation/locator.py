"""Boxes of the classes of any image, as a server needs them: by the code of the evaluation, dense and merged.

An image is scaled up or down to every test scale, so that a small one needs nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vgg.evaluation.classifier import BadPicture, Classifier
from vgg.evaluation.classifier import Picture as Given
from vgg.evaluation.views import Picture
from vgg.localisation import boxes as geometry
from vgg.localisation.dense import Dense, Net
from vgg.network.model import VGG, Architecture, blank
from vgg.network.precision import precision_on

Weights = dict[str, torch.Tensor]
Box = list[int]  # x1, y1, x2, y2


class Locator:
    """The boxes that one localiser gives for the classes of a classifier.

    most: classes of a picture; merging the boxes of one takes a while.
    """

    most = 50

    def __init__(
        self, classifier: Classifier, own: dict[str, Any], own_weights: Weights, description: dict[str, Any],
        weights: Weights,
    ) -> None:  # fmt: skip
        """own, own_weights: what the classifier was made of.  description: of the localiser, as a version keeps it."""
        views, self.classifier, params = classifier.views, classifier, description["localise"]
        precision = precision_on("auto", views.device)
        shared = not views.params.ceil_pooling and views.precision == precision  # as localisation computes
        classes = Net(views.net, views.prepare) if shared else _net(own, own_weights, precision, views.device)
        localiser = _net(description, weights, precision, views.device)
        self.scales: list[int] = params["test_scales"]
        self.dense = Dense(
            classes, [localiser], params["train_scale"], self.scales, params["match"], params["merge_threshold"]
        )

    def boxes(self, pictures: Sequence[Given], classes: Sequence[Sequence[int]]) -> list[list[Box]]:
        """For every picture a box for each of its classes: [x1, y1, x2, y2], pixels of the picture as it was given.

        Both corners belong to the box and the first pixel is 0, as in the annotations of ILSVRC.
        Raises BadPicture for the first picture that cannot be used.
        """
        for number, picture in enumerate(pictures):
            self.classifier.size(number, picture, self.scales)
        found = []
        for number, (picture, wanted) in enumerate(zip(pictures, classes, strict=True)):
            scaled = Picture.of(torch.from_numpy(self.classifier.pixels(number, picture)), self.dense.bases, "bilinear")
            boxes = self.classifier.in_thread(self.dense.boxes, scaled, np.array(wanted, np.int64))[-1]
            if not np.isfinite(boxes).all():
                raise BadPicture(number, "a box is not finite: the localiser cannot be used")
            whole = geometry.whole_pixels(boxes, scaled.width, scaled.height)
            found.append(geometry.inclusive(whole).astype(int).tolist())
        return found


def _net(description: dict[str, Any], weights: Weights, precision: torch.dtype, device: torch.device) -> Net:
    model: VGG = blank(Architecture(**description["network"]))
    model.load_state_dict(weights)
    single = description.get("localise", {}).get("regression") == "single"
    return Net.of(model.eval(), description["pixels"], precision, device, single)
