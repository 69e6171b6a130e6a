"""Geometry of boxes: the devkit's inclusive pixels as half-open ones, crops and back, NumPy and torch alike."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vgg.data.windows import Window, centre_window
from vgg.localisation.boxes import (
    area,
    centred,
    clamp,
    cornered,
    flip,
    from_crop,
    half_open,
    inclusive,
    intersection,
    iou,
    paired_iou,
    to_crop,
    visible,
    whole_pixels,
)

# Two boxes as in a file; their IoU with 1 added to every side, as the devkit does it, and without.
GOLDEN = [
    ((1, 1, 10, 10), (1, 1, 10, 5), 0.5, 0.444444),
    ((0, 0, 9, 9), (0, 0, 9, 4), 0.5, 0.444444),
    ((0, 0, 10, 10), (0, 0, 10, 5), 0.545455, 0.5),
    ((1, 1, 100, 100), (1, 1, 100, 50), 0.5, 0.494949),
    ((1, 1, 100, 100), (34, 1, 133, 100), 0.503759, 0.5),
    ((1, 1, 100, 100), (35, 1, 134, 100), 0.492537, 0.488722),
    ((0, 0, 20, 20), (20, 0, 40, 20), 0.024390, 0.0),
    ((10, 10, 10, 10), (10, 10, 10, 10), 1.0, 0.0),  # without the 1 it has no area
]


def devkits_iou(a: list[int], b: list[int]) -> Fraction:
    """Of boxes as in a file, 1 added to every side; 0 if disjoint."""
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if w <= 0 or h <= 0:
        return Fraction(0)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return Fraction(w * h, sum(areas) - w * h)


def random_boxes(rng: np.random.Generator, n: int, side: int) -> NDArray[np.int64]:
    """As in a file: inclusive integers in [0, side), of at least one pixel."""
    corners = np.sort(rng.integers(0, side, (n, 2, 2)), axis=2)
    return np.concatenate([corners[..., 0], corners[..., 1]], 1)


@pytest.mark.parametrize(("a", "b", "devkit", "plain"), GOLDEN)
@pytest.mark.parametrize("origin", [0, 1])
def test_the_plain_iou_of_half_open_boxes_is_the_devkits(
    a: tuple[int, ...], b: tuple[int, ...], devkit: float, plain: float, origin: int
) -> None:
    inside = half_open(np.array([a, b]), origin)
    found = iou(inside[:1], inside[1:]).item()
    assert found == float(devkits_iou(list(a), list(b))) == pytest.approx(devkit, abs=1e-6)
    assert (found >= 0.5) == (devkit >= 0.5)
    assert iou(*np.array([[a], [b]], float)).item() == pytest.approx(plain, abs=1e-6)


def test_it_is_the_devkits_to_the_last_bit() -> None:
    """Of all pairs of 250 random boxes, also where the quotient is one half."""
    rng = np.random.default_rng(1)
    files = np.concatenate([random_boxes(rng, 200, 500), random_boxes(rng, 50, 6)])
    found = iou(half_open(files), half_open(files))
    halves = 0
    for i, a in enumerate(files.tolist()):
        for j, b in enumerate(files.tolist()):
            exact = devkits_iou(a, b)
            assert found[i, j] == float(exact) and (found[i, j] >= 0.5) == (exact >= Fraction(1, 2))
            halves += exact == Fraction(1, 2)
    assert halves > 20


@pytest.mark.parametrize("origin", [0, 1])
def test_files_and_back(origin: int) -> None:
    files = random_boxes(np.random.default_rng(2), 100, 50) + origin
    inside = half_open(files, origin)
    assert inside.dtype == np.float64 and inside.min() >= 0
    assert np.array_equal(inside[:, 2:] - inside[:, :2], files[:, 2:] - files[:, :2] + 1)
    assert np.array_equal(inclusive(inside, origin), files)
    assert half_open(np.array([1, 1, 10, 10]), 1).tolist() == [0, 0, 10, 10]


def test_disjoint_touching_and_inverted_boxes_share_nothing() -> None:
    box = np.array([[10.0, 10, 20, 20]])
    others = np.array([[20.0, 10, 30, 20], [40, 40, 50, 50], [18, 18, 12, 12], [20, 10, 10, 20], [15, 15, 15, 15]])
    assert iou(box, others).tolist() == [[0] * 5]
    assert iou(others[2:], others[2:]).max() == 0
    assert not (iou(box, np.array([[np.nan, 10, 20, 20]])) >= 0.5).any()
    assert iou(box, np.zeros((0, 4))).shape == (1, 0)


def windows(rng: np.random.Generator, n: int) -> list[tuple[Window, int]]:
    """Random windows of images up to 3,000 pixels wide, with sizes of their crops."""
    corners = rng.integers(0, 2000, (n, 2)).tolist()
    sides = rng.integers(1, 1000, (n, 2)).tolist()
    return [(Window(*corner, *side), int(rng.integers(16, 513))) for corner, side in zip(corners, sides, strict=True)]


def test_source_to_crop_and_back() -> None:
    rng = np.random.default_rng(3)
    worst = {np.float64: 0.0, np.float32: 0.0}
    for window, size in windows(rng, 500):
        boxes = half_open(random_boxes(rng, 20, 3000))
        for kind, crop in ((np.float64, size), (np.float32, (float(size), size / 2))):
            ours = boxes.astype(kind)
            back = from_crop(to_crop(ours, window, crop), window, crop)
            assert back.dtype == kind
            worst[kind] = max(worst[kind], float(np.abs(back - boxes).max()))
    assert worst[np.float64] < 1e-9 and worst[np.float32] < 1e-3


def test_the_window_becomes_the_crop() -> None:
    window = Window(30, 50, 60, 120)
    box = np.array([window.box, (60, 50, 90, 110), (0, 0, 30, 50)], float)
    assert to_crop(box, window, 224).tolist() == pytest.approx(
        np.array([[0, 0, 224, 224], [112, 0, 224, 112], [-112, -280 / 3, 0, 0]])
    )
    # a whole image of 500 x 375, rescaled to 341 x 256
    whole = Window(0, 0, 500, 375)
    assert from_crop(np.array([0.0, 0, 341, 256]), whole, (341, 256)).tolist() == [0, 0, 500, 375]
    central = centre_window(500, 375, 256, 224)
    assert to_crop(np.array(central.box, float), central, 224).tolist() == [0, 0, 224, 224]


def test_flipping() -> None:
    boxes = half_open(random_boxes(np.random.default_rng(4), 100, 224))
    assert np.array_equal(flip(flip(boxes, 224), 224), boxes)
    assert flip(np.array([0.0, 5, 30, 20]), 224).tolist() == [194, 5, 224, 20]
    moved = centred(flip(boxes, 224))
    assert np.array_equal(moved[:, 0], 224 - centred(boxes)[:, 0])
    assert np.array_equal(moved[:, 1:], centred(boxes)[:, 1:])
    # as pixels move: a painted box, mirrored
    image = np.zeros((40, 40))
    image[5:20, 3:30] = 1
    mirrored = np.zeros((40, 40))
    x1, y1, x2, y2 = flip(np.array([3.0, 5, 30, 20]), 40).astype(int)
    mirrored[y1:y2, x1:x2] = 1
    assert np.array_equal(image[:, ::-1], mirrored)


def test_centres_and_back() -> None:
    boxes = half_open(random_boxes(np.random.default_rng(5), 100, 500))
    assert centred(np.array([10.0, 20, 30, 60])).tolist() == [20, 40, 20, 40]
    assert np.array_equal(cornered(centred(boxes)), boxes)
    assert cornered(np.array([20.0, 40, -3, 0.5]), min_side=1.0).tolist() == [19.5, 39.5, 20.5, 40.5]
    assert cornered(np.array([20.0, 40, -3, 4])).tolist() == [20, 38, 20, 42]


def test_the_visible_share() -> None:
    boxes = np.array([[0.0, 0, 224, 224], [-10, 0, 10, 20], [-10, -10, 10, 10], [230, 0, 240, 9], [5, 5, 5, 5]])
    assert visible(boxes, 224).tolist() == [1, 0.5, 0.25, 0, 0]
    assert visible(np.array([[50.0, 0, 150, 10]]), (100.0, 5.0)).tolist() == [0.25]


def test_whole_pixels_inside_the_image() -> None:
    boxes = np.array(
        [
            [0.5, 1.5, 10.4, 10.5],  # halves round up
            [-7, -0.6, 120, 70],
            [3.2, 3.2, 3.4, 3.4],  # less than a pixel
            [9, 8, 5, 2],  # inverted
            [-20, 10, -10, 20],  # outside
            [110, 60, 120, 70],
        ]
    )
    expected = [[1, 2, 10, 11], [0, 0, 100, 50], [3, 3, 4, 4], [9, 8, 10, 9], [0, 10, 1, 20], [99, 49, 100, 50]]
    assert whole_pixels(boxes, 100, 50).tolist() == expected
    assert clamp(boxes, 100, 50)[[1, 4]].tolist() == [[0, 0, 100, 50], [0, 10, 0, 20]]
    sides = np.array([[100], [20]]), np.array([[50], [9]])  # of two images
    assert whole_pixels(boxes.reshape(2, 3, 4), *sides)[1].tolist() == whole_pixels(boxes[3:], 20, 9).tolist()
    random = np.random.default_rng(6).normal(50, 60, (2000, 4))
    whole = whole_pixels(random, 100, 50)
    assert np.array_equal(whole, np.floor(whole)) and np.array_equal(whole_pixels(whole, 100, 50), whole)
    assert (whole >= 0).all() and (whole <= [100, 50, 100, 50]).all() and (whole[:, :2] < whole[:, 2:]).all()
    with pytest.raises(ValueError, match="finite"):
        whole_pixels(np.array([[0, 0, np.nan, 1]]), 100, 50)


WINDOW = Window(13, 7, 301, 299)
BOTH: dict[str, Callable[..., Any]] = {
    "iou": lambda a, b: iou(a, b),
    "paired_iou": paired_iou,
    "intersection": intersection,
    "area": lambda a, b: area(a),
    "centred": lambda a, b: centred(a),
    "cornered": lambda a, b: cornered(centred(a), 3.0),
    "to_crop": lambda a, b: to_crop(a, WINDOW, 224),
    "from_crop": lambda a, b: from_crop(a, WINDOW, (224, 300)),
    "flip": lambda a, b: flip(a, 224),
    "visible": lambda a, b: visible(a, 224),
    "clamp": lambda a, b: clamp(a, 224, 100),
}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_numpy_and_torch_give_the_same_numbers(name: str, kind: type) -> None:
    a, b = np.random.default_rng(7).uniform(-50, 400, (2, 200, 4)).astype(kind)
    with np.errstate(all="raise"):
        ours = BOTH[name](a, b)
    theirs = BOTH[name](torch.from_numpy(a), torch.from_numpy(b))
    assert isinstance(theirs, torch.Tensor) and ours.dtype == kind and np.array_equal(ours, theirs.numpy())


def test_gradients_pass_through() -> None:
    """For a loss on boxes; also where they do not overlap."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]], requires_grad=True)
    paired_iou(boxes, torch.tensor([[2.0, 0, 12, 10], [0, 0, 5, 5]])).sum().backward()
    assert boxes.grad is not None and boxes.grad.isfinite().all() and boxes.grad[0].abs().sum() > 0


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(…, 4\), got \(3, 5\)"):
        centred(np.zeros((3, 5)))
