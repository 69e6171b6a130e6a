"""Boxes at the positions of whole images: where they are, whose they are, and that nothing depends on the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import photograph

from vgg.data.augment import Prepare
from vgg.evaluation.views import Picture
from vgg.localisation.dense import MODES, Dense, Net
from vgg.localisation.objective import from_unit
from vgg.network.init import initialise
from vgg.network.model import VGG, Architecture

PIXELS = {"mean": [120.0, 110.0, 100.0], "std": [60.0, 60.0, 60.0]}
CLASSES = 7
CPU = torch.device("cpu")


def network(outputs: int, seed: int = 1) -> VGG:
    model = VGG(Architecture("A", False, 16, outputs, 32))
    initialise(model, "kaiming", seed)
    return model.eval()


def dense(localiser: VGG, scales: list[int], single: bool = False, threshold: float = 0.7, **more: Any) -> Dense:
    classifier = more.get("classifier", network(CLASSES))
    nets = [Net.of(each, PIXELS, torch.float32, CPU, single) for each in (localiser, *more.get("others", []))]
    return Dense(Net.of(classifier, PIXELS, torch.float32, CPU), nets, 32, scales, "centre_iou", threshold)


def picture(made: Dense, width: int, height: int) -> Picture:
    image = torch.from_numpy(np.asarray(photograph((width, height))).copy())
    return Picture.of(image, [made.crop, *made.bases], "bilinear")


@pytest.mark.parametrize("single", [False, True])
def test_an_image_of_the_networks_size_has_one_position(narrow: None, single: bool) -> None:
    localiser = network(4 if single else 4 * CLASSES, seed=2)
    made = dense(localiser, [32], single)
    shown = picture(made, 32, 32)
    image = Prepare(**PIXELS)(shown.scaled[32, 32][None])
    units = localiser(image).detach().double().view(-1, 4).numpy()
    found = made(shown, given=3)
    expected = from_unit(units.clip(min=[-9, -9, 1 / 32, 1 / 32]), 32)  # a side has a pixel or more
    assert np.allclose(found.given, expected[0 if single else 3], atol=1e-3)  # the central crop, and every mode
    for place, number in enumerate(found.classes):
        assert np.allclose(found.boxes[:, place], expected[0 if single else number], atol=1e-3)
    top = network(CLASSES)(image).detach().softmax(1)[0].argsort(descending=True)[:5]
    assert found.classes.tolist() == top.tolist()


def constant(units: list[list[float]]) -> VGG:
    """A localiser that always gives these boxes, one for each class."""
    model = network(4 * len(units))
    last = model.classifier[6]
    assert isinstance(last, torch.nn.Linear)
    last.weight.data.zero_()
    last.bias.data = torch.tensor(units, dtype=torch.float32).flatten()
    return model


def test_every_position_looks_through_its_window(narrow: None) -> None:
    """The window itself as the box: 96 x 64 rescaled pixels have 3 x 2 windows, the source is twice as wide."""
    made = dense(constant([[0, 0, 1, 1]] * CLASSES), [64], threshold=0.0)
    found = made(picture(made, 192, 128), given=2)
    windows = {(64.0 * j, 64.0 * i, 64.0 * j + 64, 64.0 * i + 64) for i in range(2) for j in range(3)}
    best = found.boxes[MODES.index("best_window")]
    assert {tuple(box) for box in best.tolist()} <= windows
    assert np.allclose(found.boxes[MODES.index("mean")], [64, 32, 128, 96])
    assert {tuple(box) for box in found.boxes[MODES.index("merged")].tolist()} <= windows  # nothing matches at 0
    # all positions merge into their mean
    together = dense(constant([[0, 0, 1, 1]] * CLASSES), [64], threshold=99.0)
    assert np.allclose(together(picture(together, 192, 128), given=2).boxes[-1], [64, 32, 128, 96])
    # the central crop of 32 pixels of the image rescaled to 48 x 32: from 8 to 40, four times as large in the source
    assert np.allclose(found.given[0], [32, 0, 160, 128])


def test_classes_have_boxes_of_their_own_and_scales_and_nets_are_merged(narrow: None) -> None:
    shifted = [[number / 10, 0.0, 0.5, 0.5] for number in range(CLASSES)]
    made = dense(constant(shifted), [32, 64])
    found = made(picture(made, 64, 64), given=4)
    central = found.given[0]
    assert np.allclose(central, [(0.5 + 0.4 - 0.25) * 64, 16, (0.5 + 0.4 + 0.25) * 64, 48])
    alone = found.boxes[:, 0]
    other = [[number / 10, 0.0, 0.5, 0.7] for number in range(CLASSES)]
    both = dense(constant(shifted), [32, 64], others=[constant(other)], threshold=99.0)
    fused = both(picture(both, 64, 64), given=4).boxes[-1, 0]
    assert fused[3] - fused[1] > alone[MODES.index("mean")][3] - alone[MODES.index("mean")][1]


def test_better_classifiers_choose_the_classes(narrow: None) -> None:
    made = dense(constant([[0, 0, 1, 1]] * CLASSES), [32])
    better = np.zeros(CLASSES, np.float32)
    better[[6, 1, 3]] = 0.5, 0.3, 0.2
    assert made(picture(made, 40, 40), given=0, posteriors=better).classes.tolist()[:3] == [6, 1, 3]


def test_a_box_does_not_depend_on_what_was_computed_before(narrow: None) -> None:
    made = dense(network(4 * CLASSES, 3), [32, 48])
    first = made(picture(made, 70, 50), given=1)
    made(picture(made, 90, 40), given=1)
    again = made(picture(made, 70, 50), given=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
