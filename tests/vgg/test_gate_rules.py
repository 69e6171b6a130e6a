"""The gate as a pure function: every rule, and the paired test of non-inferiority."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from vgg.evaluation.gate import Contender, Hits, Rule, Verdict, judge
from vgg.evaluation.paired import score, upper_bound
from vgg.params.register import Gate

IMAGES = 1000
GATE = Gate(
    max_top1_error=0.3, max_top5_error=0.1, max_regression=0.01, confidence=0.95, incomparable_champion="refuse"
)


def contender(*wrong: int, top5: int = 50, digest: str = "a", weights: str = "w", **changes: Any) -> Contender:
    """A network that misclassifies these images; the first `top5` of all also among the best five."""
    hits = Hits(digest, ~np.isin(np.arange(IMAGES), wrong), np.arange(IMAGES) >= top5)
    errors = {"top1_error": hits.errors()[0], "top5_error": hits.errors()[1], "num_images": IMAGES}
    return Contender("this", weights, {**errors, "data_digest": digest, **changes}, hits)


def verdict(challenger: Contender, champion: Contender | None = None, **gate: Any) -> Verdict:
    return judge(GATE.model_copy(update=gate), challenger, champion, IMAGES, "a")


CHAMPION = contender(*range(100), weights="c")


@pytest.mark.parametrize(
    ("challenger", "said", "remedy"),
    [
        (contender(*range(301)), "top1_error 0.3010 is above register.gate.max_top1_error 0.3", "0.301 or more"),
        (contender(0, top1_error=float("nan")), "top1_error nan", "a finite error"),
        (contender(0, top5=200), "max_top5_error", "max_top5_error: 0.2 or more"),
        (contender(0, num_images=999), "evaluated on 999 of 1,000 images", "all validation images"),
        (contender(0, digest="b"), "evaluated on b, not on these shards, a", "an evaluation of these shards"),
        (contender(0, top1_error=0.002), "the predictions have a top1_error of 0.001000, the evaluation 0.002000", ""),
    ],
)
def test_absolute_rules(challenger: Contender, said: str, remedy: str) -> None:
    """Each is named with its number, its limit and what would have passed; no version is made."""
    assert verdict(contender(0)).promoted
    found = verdict(challenger)
    assert not found.registrable
    assert not found.passed
    failed = [rule for rule in found.rules if not rule.passed]
    assert any(said in rule.text and remedy in rule.remedy for rule in failed), failed


@pytest.mark.parametrize(
    ("challenger", "outcome"),
    [
        (contender(*range(99)), "promoted"),
        (contender(*range(1, 101)), "passed"),  # as good: the champion stays
        (contender(*range(100), top5=49), "promoted"),  # top5_error decides between equals
        (contender(*range(103)), "passed"),  # worse, but by less than the margin with confidence
        (contender(*range(109)), "failed"),  # by less than the margin, but without confidence
        (contender(*range(150)), "failed"),
        (contender(*range(150), weights="c"), "promoted"),  # the champion itself
        (contender(*range(100, 199)), "failed"),  # better by one, but 199 images differ: it may be 2 % worse
    ],
)
def test_the_comparison(challenger: Contender, outcome: str) -> None:
    found = verdict(challenger, CHAMPION)
    assert found.registrable
    assert (found.passed, found.promoted) == (outcome != "failed", outcome == "promoted"), found.failures()


def rule(found: Verdict, name: str) -> Rule:
    [only] = [rule for rule in found.rules if rule.name == name]
    return only


def test_a_failure_says_what_would_have_passed() -> None:
    failed = rule(verdict(contender(*range(150)), CHAMPION), "max_regression")
    assert "50 images only this model gets wrong, 0 only the champion, of 1,000" in failed.text
    needed = float(failed.remedy.split(": ")[1].split()[0])
    assert verdict(contender(*range(150)), CHAMPION, max_regression=needed).passed
    assert not verdict(contender(*range(150)), CHAMPION, max_regression=needed - 0.0002).passed


def test_confidence_of_one_half_compares_the_errors_as_they_are() -> None:
    assert verdict(contender(*range(110)), CHAMPION, confidence=0.5).passed
    assert not verdict(contender(*range(111)), CHAMPION, confidence=0.5).passed


@pytest.mark.parametrize(
    ("champion", "said"),
    [
        (contender(0, digest="b", weights="c"), "the champion was evaluated on other images (b instead of a)"),
        (Contender("version 1", "c", CHAMPION.errors, None), "version 1, has no predictions of single images"),
    ],
)
def test_a_champion_that_cannot_be_compared(champion: Contender, said: str) -> None:
    found = verdict(contender(0), champion)
    assert (found.registrable, found.passed) == (True, False)
    [reason] = found.failures()
    assert said in reason
    assert "incomparable_champion: reevaluate" in rule(found, "comparable").remedy


def test_weights_that_were_rolled_back_do_not_pass() -> None:
    found = judge(GATE, contender(0), CHAMPION, IMAGES, "a", "were rolled back by me")
    assert (found.registrable, found.passed, found.promoted) == (True, False, False)
    assert "--replace-champion" in rule(found, "rolled_back").remedy


# --- the paired test


@pytest.mark.parametrize(
    ("b", "c", "n", "difference"), [(5, 3, 50, 0.1), (0, 0, 296, 0.01), (7, 2, 296, 0.02), (9, 3, 50, -0.1)]
)
def test_the_score_has_the_variance_of_the_maximum_of_likelihood(b: int, c: int, n: int, difference: float) -> None:
    """The closed form against a numerical search of q, the probability that only the second errs."""
    d = difference

    def minus_log_likelihood(q: float) -> float:
        return -float(b * np.log(q + d) + c * np.log(q) + (n - b - c) * np.log(1 - 2 * q - d))

    bounds = (max(0, -d) + 1e-12, (1 - d) / 2 - 1e-12)
    q = minimize_scalar(minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    assert score(b, c, n, d) == pytest.approx((b - c - n * d) / np.sqrt(n * (2 * q + d - d * d)), rel=1e-5)


def test_the_score_for_no_difference_is_mcnemars() -> None:
    assert score(9, 4, 200, 0.0) == pytest.approx((9 - 4) / np.sqrt(9 + 4))
    bound = upper_bound(9, 4, 200, 0.95)
    assert score(9, 4, 200, bound) == pytest.approx(-norm.ppf(0.95), abs=1e-9)


@pytest.mark.parametrize(("n", "only_second"), [(296, 0.01), (2000, 0.02)])
def test_a_model_at_the_margin_passes_as_often_as_the_confidence_allows(n: int, only_second: float) -> None:
    """One in twenty at 95 %."""
    margin, random = 0.02, np.random.default_rng(1)
    chances = [only_second + margin, only_second, 1 - 2 * only_second - margin]
    counts = random.multinomial(n, chances, 2000)
    passed = np.mean([upper_bound(int(b), int(c), n, 0.95) <= margin for b, c, _ in counts])
    assert 0.03 < passed < 0.07


def test_extreme_counts() -> None:
    assert upper_bound(5, 0, 5, 0.95) == 1
    assert 0 < upper_bound(0, 0, 296, 0.95) < 0.01
    assert upper_bound(0, 13, 13, 0.95) < 0
