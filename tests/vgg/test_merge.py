"""Greedy merging of boxes: published and hand-made cases, and the same by a naive loop over all pairs."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from vgg.localisation.merge import MATCHES, merge

A, B, C = (0, 0, 10, 10), (2, 0, 12, 10), (40, 40, 50, 50)
THREE = np.array([A, B, C], float), np.array([0.6, 0.5, 0.9])


def naive_score(a: list[float], b: list[float], match: str) -> float:
    distance = math.hypot((a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2)
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = w * h if w > 0 and h > 0 else 0.0
    if match == "overfeat_literal":
        return distance + shared
    first, second = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return distance / math.sqrt((first + second) / 2) + 1 - shared / (first + second - shared)


def naive_merge(
    boxes: NDArray[np.float64], scores: NDArray[np.float64], threshold: float, match: str
) -> list[tuple[list[float], float, int]]:
    """(box, score, members) of what is left, from a list of members of each, all pairs compared again every time."""
    groups = [[number] for number in range(len(boxes))]

    def mean(group: list[int]) -> list[float]:
        return [sum(float(boxes[number, side]) for number in group) / len(group) for side in range(4)]

    while len(groups) > 1:
        means = [mean(group) for group in groups]
        pairs = [(i, j) for i in range(len(groups)) for j in range(i + 1, len(groups))]
        found = {(i, j): naive_score(means[i], means[j], match) for i, j in pairs}
        i, j = min(pairs, key=lambda pair: (found[pair], pair))
        if found[i, j] > threshold:
            break
        groups[i] += groups.pop(j)
    return [(mean(group), sum(float(scores[number]) for number in group), len(group)) for group in groups]


def clusters(seed: int, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, 400, (4, 2))[rng.integers(0, 4, n)] + rng.normal(0, 15, (n, 2))
    sides = rng.uniform(60, 160, (n, 2))
    return np.concatenate([centres - sides / 2, centres + sides / 2], 1), rng.random(n)


def test_the_two_that_overlap_merge_and_win() -> None:
    """Their match score is 0.2 + 1 - 80 / 120; that of the result with the third box 5.587 + 1."""
    merged = merge(*THREE, threshold=0.7)
    assert merged.boxes.tolist() == [[1, 0, 11, 10], [40, 40, 50, 50]]
    assert merged.scores == pytest.approx([1.1, 0.9])
    assert merged.sizes.tolist() == [2, 1]
    exact = 0.2 + 1 - 80 / 120
    assert len(merge(*THREE, threshold=exact + 1e-12).boxes) == 2
    apart = merge(*THREE, threshold=exact - 1e-12)
    assert apart.boxes.tolist() == THREE[0].tolist() and apart.scores.argmax() == 2
    assert len(merge(*THREE, threshold=0.5).boxes) == 3
    last = math.hypot(39, 40) / 10 + 1
    assert len(merge(*THREE, threshold=last - 1e-9).boxes) == 2
    assert merge(*THREE, threshold=last + 1e-9).sizes.tolist() == [3]


def test_a_pair_at_the_threshold_merges() -> None:
    same = np.array([A, A], float), np.array([0.5, 0.25])  # match score 0
    assert merge(*same, threshold=0.0).scores.tolist() == [0.75]


def test_the_literal_score_merges_disjoint_boxes_first() -> None:
    """A, B: 2 + 80; A, C: 56.569; B, C: 55.172.  So the literal reading is not the default."""
    for pair, score in (([0, 1], 82), ([0, 2], math.hypot(40, 40)), ([1, 2], math.hypot(38, 40))):
        for threshold, left in ((score + 1e-9, 1), (score - 1e-9, 2)):
            assert len(merge(THREE[0][pair], THREE[1][pair], threshold, "overfeat_literal").boxes) == left
    # only B and C are below; their mean is 29 from A, and so the third follows
    merged = merge(*THREE, threshold=55.2, match="overfeat_literal")
    assert merged.boxes == pytest.approx(np.array([[14, 40 / 3, 24, 70 / 3]])) and merged.sizes.tolist() == [3]
    assert len(merge(*THREE, threshold=55.1, match="overfeat_literal").boxes) == 3


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.5, 60.0, np.inf])
def test_it_does_what_a_naive_loop_does(match: str, threshold: float) -> None:
    for seed in range(4):
        boxes, scores = clusters(seed, 28)
        expected = naive_merge(boxes, scores, threshold, match)
        merged = merge(boxes, scores, threshold, match)
        assert merged.sizes.tolist() == [size for _, _, size in expected]
        np.testing.assert_allclose(merged.boxes, [box for box, _, _ in expected], rtol=0, atol=1e-9)
        np.testing.assert_allclose(merged.scores, [score for _, score, _ in expected], rtol=0, atol=1e-12)


def test_equal_matches_are_settled_by_index() -> None:
    """Boxes in a row, equally far apart: the first two merge, then the last two."""
    row = np.array([[x, 0.0, x + 8, 8] for x in (0, 2, 4, 6)])
    assert merge(row[:3], np.ones(3), 0.7).boxes.tolist() == [[1, 0, 9, 8], [4, 0, 12, 8]]
    for match, threshold in (("centre_iou", 0.7), ("overfeat_literal", 51.0)):
        expected = naive_merge(row, np.ones(4), threshold, match)
        assert merge(row, np.ones(4), threshold, match).boxes.tolist() == [box for box, _, _ in expected]
    assert merge(row, np.ones(4), 0.7).boxes.tolist() == [[1, 0, 9, 8], [5, 0, 13, 8]]
    equal = merge(np.tile(row[:1], (50, 1)), np.arange(50.0), 0.0)
    assert (equal.boxes.tolist(), equal.scores.tolist(), equal.sizes.tolist()) == ([[0, 0, 8, 8]], [1225], [50])


def test_the_order_of_boxes_does_not_matter() -> None:
    boxes, scores = clusters(7, 120)
    merged = merge(boxes, scores, 0.7)
    assert 1 < len(merged.boxes) < 60
    by_place = np.lexsort(merged.boxes.T)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(boxes))
        other = merge(boxes[order], scores[order], 0.7)
        place = np.lexsort(other.boxes.T)
        np.testing.assert_allclose(other.boxes[place], merged.boxes[by_place], rtol=0, atol=1e-9)
        np.testing.assert_allclose(other.scores[place], merged.scores[by_place], rtol=0, atol=1e-12)
        assert other.sizes[place].tolist() == merged.sizes[by_place].tolist()


def test_no_pair_that_is_left_matches_and_nothing_is_lost() -> None:
    boxes, scores = clusters(8, 300)
    kept = boxes.copy(), scores.copy()
    merged = merge(boxes, scores, 0.7)
    left = merged.boxes.tolist()
    assert min(naive_score(a, b, "centre_iou") for i, a in enumerate(left) for b in left[i + 1 :]) > 0.7
    assert merged.sizes.sum() == 300 and merged.scores.sum() == pytest.approx(scores.sum())
    np.testing.assert_allclose(merged.sizes @ merged.boxes, boxes.sum(0))
    again = merge(boxes, scores, 0.7)
    assert [part.tobytes() for part in again] == [part.tobytes() for part in merged]
    assert np.array_equal(boxes, kept[0]) and np.array_equal(scores, kept[1])  # the caller's arrays stay


def test_classes_that_share_boxes_merge_at_once() -> None:
    boxes, first = clusters(9, 60)
    second = np.random.default_rng(9).random(60)
    both = merge(boxes, np.stack([first, second], 1), 0.7)
    for number, scores in enumerate((first, second)):
        one = merge(boxes, scores, 0.7)
        assert np.array_equal(both.boxes, one.boxes) and np.array_equal(both.scores[:, number], one.scores)


@pytest.mark.parametrize("match", MATCHES)
def test_none_and_one(match: str) -> None:
    none = merge(np.zeros((0, 4)), np.zeros(0), 1.0, match)
    assert (none.boxes.shape, none.scores.shape, none.sizes.shape) == ((0, 4), (0,), (0,))
    one = merge(np.array([A], float), np.array([0.5]), np.inf, match)
    assert (one.boxes.tolist(), one.scores.tolist(), one.sizes.tolist()) == ([list(A)], [0.5], [1])


@pytest.mark.parametrize("box", [(0, 0, 0, 10), (0, 10, 10, 0), (10, 10, 0, 0), (0, 0, np.nan, 10), (0, 0, np.inf, 1)])
def test_boxes_without_an_area_are_refused(box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="positive width"):
        merge(np.array([A, box], float), np.ones(2), 1.0)
    with pytest.raises(ValueError, match="expected"):
        merge(np.array([A, B], float), np.ones(3), 1.0)
