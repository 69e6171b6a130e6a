"""Boxes of any picture are those of the evaluation's code."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EVALUATE, photograph
from PIL import Image

from vgg.evaluation.classifier import BadPicture, Classifier
from vgg.evaluation.views import Picture
from vgg.localisation.boxes import whole_pixels
from vgg.localisation.dense import Dense, Net
from vgg.localisation.locator import Locator
from vgg.network.init import initialise
from vgg.network.model import VGG, Architecture, blank
from vgg.network.precision import precision_on

PIXELS = {"mean": [120.0, 110.0, 100.0], "std": [60.0, 60.0, 60.0]}
PARAMS = {
    "train_scale": 36, "test_scales": [64, 36], "match": "centre_iou", "merge_threshold": 0.7,
}  # fmt: skip


def network(outputs: int, seed: int) -> VGG:
    model = blank(Architecture("A", False, 16, outputs, 32))
    initialise(model, "kaiming", seed)
    return model.eval()


@pytest.mark.parametrize(  # with ceil_pooling the classifier's network cannot be shared
    ("outputs", "regression", "ceil_pooling"), [(12, "per_class", False), (4, "single", True)]
)
def test_boxes_are_those_of_the_evaluation(outputs: int, regression: str, ceil_pooling: bool) -> None:
    classes, localiser = network(3, 1), network(outputs, 2)
    own: dict[str, Any] = {
        "network": classes.architecture.as_dict(), "pixels": PIXELS, "max_pixels": 1_000_000,
        "classes": [{"wnid": f"n{n}", "name": name} for n, name in enumerate(("cat", "dog", "emu"))],
        "evaluate": {**EVALUATE, "ceil_pooling": ceil_pooling},
    }  # fmt: skip
    description = {
        "network": localiser.architecture.as_dict(), "pixels": PIXELS, "localise": {**PARAMS, "regression": regression}
    }  # fmt: skip
    weights, boxes = classes.state_dict(), localiser.state_dict()
    locator = Locator(Classifier.of(own, weights, 1), own, weights, description, boxes)

    cpu, single = torch.device("cpu"), regression == "single"
    precision = precision_on("auto", cpu)  # of localisation
    nets = [Net.of(each, PIXELS, precision, cpu, single) for each in (classes, localiser)]
    dense = Dense(nets[0], nets[1:], 36, [36, 64], "centre_iou", 0.7)
    images = [photograph(size, seed) for seed, size in enumerate(((101, 67), (20, 30)))]  # one smaller than the crops
    file = io.BytesIO()
    images[0].save(file, "PNG")
    answers = locator.boxes([file.getvalue(), np.array(images[1])], [[2, 0], [0, 1, 2]])
    for image, wanted, found in zip(images, ([2, 0], [0, 1, 2]), answers, strict=True):
        picture = Picture.of(torch.from_numpy(np.array(image)), [dense.crop, *dense.bases], "bilinear")
        evaluated = dense(picture, given=0)
        known = dict(zip(evaluated.classes.tolist(), whole_pixels(evaluated.boxes[-1], *image.size), strict=True))
        assert found == [(known[label] - [0, 0, 1, 1]).tolist() for label in wanted]
        assert all(0 <= x1 <= x2 < image.width and 0 <= y1 <= y2 < image.height for x1, y1, x2, y2 in found)
    with pytest.raises(BadPicture, match="row 1: 10 x 900 is too long and narrow"):
        locator.scales = [1000]
        locator.boxes([images[0], Image.new("RGB", (10, 900))], [[0], [0]])
