"""The localisation metric: a case by hand, a slow evaluator written apart, and the devkit's files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.errors import BadData
from vgg.evaluation.predictions import wilson
from vgg.localisation.boxes import half_open, whole_pixels
from vgg.localisation.devkit import read_blacklist, read_predictions, write_predictions
from vgg.localisation.metric import (
    best_ious,
    class_counts,
    class_given,
    corloc,
    counts,
    judge,
    summary,
)


def slow_errors(
    truths: list[tuple[int, list[list[float]]]],
    predictions: list[list[tuple[int, list[float]]]],
    num_guesses: int,
    blacklist: set[int],
) -> tuple[float, float]:
    """(classification error, localisation error), image by image, from inclusive corners as they are in files."""
    bad_class = bad_place = 0
    for number, ((label, instances), guesses) in enumerate(zip(truths, predictions, strict=True)):
        class_found = place_found = False
        for guess, (x1, y1, x2, y2) in guesses[:num_guesses]:
            if guess != label:
                continue
            class_found = True
            for tx1, ty1, tx2, ty2 in instances:
                w = min(x2, tx2) - max(x1, tx1) + 1
                h = min(y2, ty2) - max(y1, ty1) + 1
                overlap = -1.0
                if w > 0 and h > 0:
                    both = (x2 - x1 + 1) * (y2 - y1 + 1) + (tx2 - tx1 + 1) * (ty2 - ty1 + 1)
                    overlap = w * h / (both - w * h)
                place_found = place_found or not overlap < 0.5
        bad_class += not class_found
        bad_place += not place_found and number not in blacklist
    return bad_class / len(truths), bad_place / (len(truths) - len(blacklist))


def errors(result: dict[str, Any], task: str) -> list[float]:
    return [result[task][f"top{k}_error"] for k in range(1, 6)]


class Case:
    """Random images: 1 to 4 instances, guesses with equal labels and without any, boxes near the instances.

    In a file's corners: truths and predictions; and as arrays: labels, first, boxes, guesses, predicted.
    """

    def __init__(self, seed: int, n: int = 300, k: int = 5, classes: int = 6, origin: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.truths: list[tuple[int, list[list[int]]]] = []
        self.predictions: list[list[tuple[int, list[int]]]] = []
        for _ in range(n):
            instances = []
            for _ in range(rng.integers(1, 5)):
                x, y, w, h = rng.integers(0, 60), rng.integers(0, 60), *rng.integers(1, 24, 2)
                instances.append([int(value) + origin for value in (x, y, x + w - 1, y + h - 1)])
            guesses = []
            for _ in range(k if rng.random() < 0.7 else rng.integers(0, k + 1)):
                x1, y1, x2, y2 = instances[rng.integers(len(instances))]
                moved = [x1 + rng.integers(-4, 5), y1 + rng.integers(-4, 5), x2 + rng.integers(-4, 5), y2]
                if rng.random() < 0.3:  # a part of the width, often exactly half
                    moved = [x1, y1, x1 + (x2 - x1 + 1) // 2 - 1, y2]
                guesses.append((int(rng.integers(0, classes)), [int(value) for value in moved]))
            self.truths.append((int(rng.integers(0, classes)), instances))
            self.predictions.append(guesses)
        self.labels = np.array([label for label, _ in self.truths])
        self.first = np.cumsum([0, *(len(instances) for _, instances in self.truths)])
        self.boxes = half_open(np.array([box for _, instances in self.truths for box in instances]), origin)
        self.guesses = np.full((n, k), -1)
        self.predicted = np.zeros((n, k, 4))
        for image, guesses in enumerate(self.predictions):
            for place, (label, box) in enumerate(guesses):
                self.guesses[image, place] = label
                self.predicted[image, place] = half_open(np.array(box), origin)

    def ious(self) -> NDArray[np.float64]:
        return best_ious(self.first, self.boxes, self.predicted)


GOLDEN_LABELS = np.array([3, 7, 5, 2])
GOLDEN_FIRST = np.array([0, 1, 3, 4, 5])
GOLDEN_BOXES = half_open(
    np.array([(1, 1, 10, 10), (51, 1, 150, 49), (1, 1, 70, 100), (35, 1, 134, 100), (1, 1, 10, 10)]), 1
)
GOLDEN_GUESSES = np.array([[4, 3, -1, -1, -1], [7, -1, -1, -1, -1], [5, 1, -1, -1, -1], [1, 4, 6, 8, 9]])
GOLDEN_PREDICTED = np.zeros((4, 5, 4))
GOLDEN_PREDICTED[0, :2] = half_open(np.array([(1, 1, 10, 10), (1, 1, 10, 5)]), 1)
GOLDEN_PREDICTED[1, 0] = half_open(np.array([1, 1, 100, 100]), 1)
GOLDEN_PREDICTED[2, 0] = half_open(np.array([1, 1, 100, 100]), 1)
GOLDEN_PREDICTED[3] = half_open(np.array([1, 1, 10, 10]), 1)


def test_four_images_by_hand() -> None:
    """1: a wrong label with a perfect box, then the right label with an IoU of exactly 0.5.  2: the second of two
    instances is found (0.7).  3: the best IoU is 0.4925.  4: the right box, but never the label."""
    ious = best_ious(GOLDEN_FIRST, GOLDEN_BOXES, GOLDEN_PREDICTED)
    assert ious[0, :2].tolist() == [1, 0.5]
    assert ious[1, 0] == 0.7 and ious[2, 0] == pytest.approx(0.492537, abs=1e-6) and ious[3].tolist() == [1] * 5
    right = judge(GOLDEN_LABELS, GOLDEN_GUESSES, ious)
    result = summary(counts(right))
    assert errors(result, "localisation") == [0.75, 0.5, 0.5, 0.5, 0.5]
    assert errors(result, "classification") == [0.5, 0.25, 0.25, 0.25, 0.25]
    blacklisted = np.array([False, False, True, False])
    result = summary(counts(right, blacklisted))
    assert errors(result, "localisation") == [2 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3]
    assert errors(result, "classification") == [0.5, 0.25, 0.25, 0.25, 0.25]
    assert (result["classification"]["num_images"], result["localisation"]["num_images"]) == (4, 3)
    assert result["localisation"]["top1_interval"] == wilson(2, 3)


@pytest.mark.parametrize("origin", [0, 1])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_slow_evaluator_finds_the_same(origin: int, k: int) -> None:
    case = Case(seed=k, k=k, origin=origin)
    ious = case.ious()
    assert (ious == 0.5).sum() > 10  # the edge is tested
    blacklist = {3, 50, 299}
    blacklisted = np.isin(np.arange(300), list(blacklist))
    right = judge(case.labels, case.guesses, ious)
    for names, mask in ((set(), None), (blacklist, blacklisted)):
        result = summary(counts(right, mask))
        expected = [slow_errors(case.truths, case.predictions, number, names) for number in range(1, 6)]
        assert errors(result, "classification") == [wrong for wrong, _ in expected]
        assert errors(result, "localisation") == [wrong for _, wrong in expected]
        assert 0.2 < errors(result, "localisation")[0] < 1


def test_an_iou_of_one_half_is_right() -> None:
    """And the next smaller number is not."""
    ious = np.array([[0.5], [np.nextafter(0.5, 0)], [np.nan]])
    right = judge(np.array([1, 1, 1]), np.ones((3, 1), int), ious)
    assert right.localised[:, 0].tolist() == [True, False, False]
    assert class_counts(np.array([1, 1, 1]), ious[:, 0], 2).tolist() == [[0, 0], [3, 1]]


def test_parts_add_up() -> None:
    """Counts of parts of the images, in any division, are those of all."""
    case = Case(seed=8)
    right = judge(case.labels, case.guesses, case.ious())
    ious = best_ious(case.first, case.boxes, case.predicted[:, :1])[:, 0]
    whole = counts(right), class_counts(case.labels, ious, 6)
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for start, end in ((0, 1), (1, 150), (150, 150), (150, 300)):
        first = case.first[start : end + 1]
        own = best_ious(first - first[0], case.boxes[first[0] : first[-1]], case.predicted[start:end])
        labels = case.labels[start:end]
        part = judge(labels, case.guesses[start:end], own)
        parts.append((counts(part), class_counts(labels, own[:, 0], 6)))
    for place in range(2):
        assert np.array_equal(sum(part[place] for part in parts), whole[place])


def test_with_the_class_given() -> None:
    """Three images of class 0, two right; one of class 2; class 1 has none."""
    labels, ious = np.array([0, 0, 2, 0]), np.array([0.9, 0.5, 0.2, 0.49])
    found = class_counts(labels, ious, 3)
    assert found.tolist() == [[3, 2], [0, 0], [1, 0]]
    assert corloc(found)[[0, 2]].tolist() == [2 / 3, 0] and np.isnan(corloc(found)[1])
    assert class_given(found) == {
        "num_images": 4,
        "error": 0.5,
        "interval": wilson(2, 4),
        "mean_corloc": 1 / 3,
    }
    without = class_counts(labels, ious, 3, np.array([False, False, True, True]))
    assert without.tolist() == [[2, 2], [0, 0], [0, 0]] and class_given(without)["error"] == 0


def test_impossible_numbers_stop() -> None:
    case = Case(seed=9, n=5)
    with pytest.raises(ValueError, match="image 2 has no box"):
        best_ious(np.array([0, 1, 2, 2, 3, 4]), case.boxes[:4], case.predicted)
    with pytest.raises(ValueError, match="expected, got"):
        best_ious(case.first[:-1], case.boxes, case.predicted)
    with pytest.raises(ValueError, match="expected, got"):
        judge(case.labels, np.zeros((5, 6), int), np.zeros((5, 6)))
    with pytest.raises(ValueError, match="expected, got"):
        judge(case.labels[:1], case.guesses, case.ious())  # would broadcast
    right = judge(case.labels, case.guesses, case.ious())
    with pytest.raises(AssertionError, match="without being classified"):
        counts(right._replace(classified=np.zeros_like(right.classified), localised=np.ones_like(right.localised)))
    better = np.array([[10, 5, 4, 3, 3, 3], [10, 4, 4, 3, 3, 3]])
    with pytest.raises(AssertionError, match="fewer images"):
        summary(better)
    # but with blacklisted images the error may be smaller
    assert summary(np.array([[10, 5, 4, 3, 3, 3], [8, 4, 4, 3, 3, 3]]))["localisation"]["top1_error"] == 0.5


@pytest.mark.parametrize("origin", [0, 1])
def test_the_devkits_file_gives_the_same_errors(tmp_path: Path, origin: int) -> None:
    """Also read as the devkit does: by lines in the order of names, with its own ids and inclusive boxes."""
    case = Case(seed=10, origin=origin)
    keys = [f"val_{number:08d}" for number in np.random.default_rng(1).permutation(300)]
    ids = [40, 7, 1000, 3, 2, 11]
    path = tmp_path / "val.pred.det.txt"
    write_predictions(path, keys, case.guesses, case.predicted, ids, origin)
    guesses, boxes = read_predictions(path, keys, ids, origin)
    assert np.array_equal(guesses, case.guesses) and np.array_equal(boxes, case.predicted)
    order = sorted(range(300), key=lambda image: keys[image])
    lines = path.read_text().splitlines()
    as_devkit = [
        [(int(words[at]), [float(word) for word in words[at + 1 : at + 5]]) for at in range(0, len(words), 5)]
        for words in (line.split() for line in lines)
    ]
    truths = [(ids[label], boxes) for label, boxes in (case.truths[image] for image in order)]
    result = summary(counts(judge(case.labels, case.guesses, case.ious())))
    expected = [slow_errors(truths, as_devkit, number, set()) for number in range(1, 6)]
    assert list(zip(errors(result, "classification"), errors(result, "localisation"), strict=True)) == expected
    before = path.read_bytes()
    write_predictions(path, keys, guesses, boxes, ids, origin)
    assert path.read_bytes() == before


def test_a_line_of_the_devkits_file(tmp_path: Path) -> None:
    """Absent guesses are zeros, also before others; both corners belong to the box."""
    path = tmp_path / "predictions.txt"
    guesses, boxes = np.array([[1, -1, 0], [-1, -1, -1]]), np.array([[[0, 0, 10, 5], [9, 9, 9, 9], [3, 4, 4, 5]]] * 2)
    write_predictions(path, ["b", "a"], guesses, boxes.astype(float), [5, 9], origin=1)
    assert path.read_text() == "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n9 1 1 10 5 0 0 0 0 0 5 4 5 4 5\n"
    write_predictions(path, ["b", "a"], guesses, boxes.astype(float), [5, 9])
    assert path.read_text().splitlines()[1] == "9 0 0 9 4 0 0 0 0 0 5 3 4 3 4"
    rounded = whole_pixels(np.array([[[0.4, 0.5, 9.7, 5.2]]]), 100, 100)
    write_predictions(path, ["a"], np.array([[0]]), rounded, [5])
    assert path.read_text() == "5 0 1 9 4\n"
    with pytest.raises(ValueError, match="whole_pixels"):
        write_predictions(path, ["a"], np.array([[0]]), np.array([[[0.4, 0, 9, 5]]]), [5])
    with pytest.raises(ValueError, match="different keys"):
        write_predictions(path, ["a", "a"], guesses, boxes.astype(float), [5, 9])


def test_other_peoples_predictions(tmp_path: Path) -> None:
    """Short lines, fractions, a sixth guess: read as the devkit reads them."""
    path = tmp_path / "predictions.txt"
    six = " ".join(f"9 {x} 0 9 9" for x in range(6))
    path.write_text(f"5 1.5 0 1e1 9\r\n{six}\n0 0 0 0 0")
    guesses, boxes = read_predictions(path, ["a", "b", "c"], [5, 9])
    assert guesses.tolist() == [[0, -1, -1, -1, -1], [1] * 5, [-1] * 5]
    assert boxes[0].tolist() == [[1.5, 0, 11, 10], *[[0] * 4] * 4] and boxes[1, 4].tolist() == [4, 0, 10, 10]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5 0 0 9 9\n", "1 lines for 2 images"),
        ("5 0 0 9 9\n\n", "line 2: 0 numbers"),
        ("5 0 0 9 9\n5 0 0 9\n", "line 2: 4 numbers"),
        ("5 0 0 9 9\n6 0 0 9 9\n", "line 2: '6' is not a label"),
        ("5.5 0 0 9 9\n5 0 0 9 9\n", "line 1: '5.5' is not a label"),
        ("5 0 0 9 9\n-1 0 0 9 9\n", "line 2: '-1' is not a label"),
        ("5 0 0 9 x\n5 0 0 9 9\n", "line 1: 'x' is not a number"),
        ("5 0 0 9 nan\n5 0 0 9 9\n", "line 1: 'nan' is not a number"),
        ("5 0 0 9 1e999\n5 0 0 9 9\n", "line 1: '1e999' is not a number"),
        ("5 0 0 9 1_0\n5 0 0 9 9\n", "line 1: '1_0' is not a number"),
        ("5 0 0 9 é\n5 0 0 9 9\n", "not a text file"),
    ],
)
def test_damaged_predictions_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "predictions.txt"
    path.write_text(text)
    with pytest.raises(BadData) as caught:
        read_predictions(path, ["a", "b"], [5, 9])
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_the_blacklist_counts_images_by_name() -> None:
    keys = ["b", "c", "a"]
    assert read_blacklist(b"1\n3\n", "list.txt", keys).tolist() == [False, True, True]
    assert read_blacklist(b"", "list.txt", keys).tolist() == [False] * 3
    for text, message in (
        (b"4", "'4' is no image"), (b"0", "'0' is no image"), (b"2\n02", "twice"), (b"x", "'x' is no"),
        (b"3 1 2", "all 3 images"), (b"\xff", "not a text file"),
    ):  # fmt: skip
        with pytest.raises(BadData, match=f"list.txt: .*{message}"):
            read_blacklist(text, "list.txt", keys)
