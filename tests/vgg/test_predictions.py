"""The numbers that summarise predictions, against definitions and published examples."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import log_loss, top_k_accuracy_score

from vgg.evaluation.paired import bootstrap, mcnemar
from vgg.evaluation.predictions import (
    calibration,
    calibration_error,
    class_errors,
    hierarchical_error,
    rows_of,
    summary,
    wilson,
)


@pytest.mark.parametrize(("count", "total"), [(0, 10), (10, 10), (3, 10), (1260, 50_000), (1, 1)])
def test_wilsons_interval_is_scipys(count: int, total: int) -> None:
    low, high = wilson(count, total)
    expected = binomtest(count, total).proportion_ci(0.95, "wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert low <= count / total <= high


def test_errors_and_loss_are_scikit_learns() -> None:
    torch.manual_seed(1)
    posteriors = torch.randn(200, 2, 12).mul(2).softmax(2)
    labels = np.random.default_rng(1).integers(0, 12, 200)
    found = summary(rows_of(np.arange(200), labels, posteriors), ["a", "b"])
    for mode, probabilities in zip(("a", "b"), posteriors.double().unbind(1), strict=True):
        every = {"labels": np.arange(12)}
        assert found[mode]["top1_error"] == pytest.approx(1 - top_k_accuracy_score(labels, probabilities, k=1, **every))
        assert found[mode]["top5_error"] == pytest.approx(1 - top_k_accuracy_score(labels, probabilities, k=5, **every))
        assert found[mode]["loss"] == pytest.approx(log_loss(labels, probabilities.numpy(), **every), rel=1e-5)


def test_calibration_of_a_hand_made_case() -> None:
    """Two images of confidence 0.9, one right; two of 0.3, none right: |0.9 - 0.5| / 2 + |0.3 - 0| / 2."""
    confidence = np.array([0.9, 0.9, 0.3, 0.3], np.float32)
    right = np.array([True, False, False, False])
    assert calibration_error(confidence, right) == pytest.approx(0.35, abs=1e-6)
    assert [count for count, _, _ in calibration(confidence, right) if count] == [2, 2]
    assert calibration_error(np.ones(3, np.float32), np.array([True, True, True])) == 0


def test_the_hierarchical_error_is_the_lowest_cost_of_the_five() -> None:
    costs = np.array([[0, 3, 9], [3, 0, 7], [9, 7, 0]], np.uint8)
    classes = np.array([[1, 2, -1, -1, -1], [2, 0, 1, -1, -1], [0, 1, -1, -1, -1]], np.int32)
    assert hierarchical_error(np.array([0, 1, 2], np.uint32), classes, costs) == pytest.approx((3 + 0 + 7) / 3)


def test_errors_by_class() -> None:
    posteriors = torch.eye(6)[[0, 1, 1, 5]][:, None] * 0.9 + 0.01
    counts = class_errors(rows_of(np.arange(4), np.array([0, 1, 2, 2]), posteriors), 6)
    assert counts.tolist() == [[1, 0, 0], [1, 0, 0], [2, 2, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 15), (20, 20), (1500, 1200)])
def test_mcnemars_test_is_the_binomial_test(b: int, c: int) -> None:
    expected = binomtest(min(b, c), b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def test_the_bootstrap_covers_the_difference() -> None:
    low, high = bootstrap(300, 200, 10_000)
    assert low < 0.01 < high
    normal = 1.96 * np.sqrt((0.05 - 0.01**2) / 10_000)
    assert (high - low) / 2 == pytest.approx(normal, rel=0.05)
    assert bootstrap(300, 200, 10_000) == (low, high)
