"""The gate before registration and promotion, as a pure function.

Three kinds of rules.  All absolute ones: the model may get a version (alias challenger).  Those of the comparison too:
it is not inferior to the champion, and the gate has passed.  It becomes the champion if, in addition, it comes before
the champion in the order (top1_error, top5_error, version): so the champion is the best that passed, however many
registrations run at once and in whatever sequence; a series of small regressions within the margin cannot add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vgg.evaluation.paired import upper_bound
from vgg.params.register import Gate

Kind = Literal["absolute", "comparison", "order"]


@dataclass(frozen=True)
class Hits:
    """Which images a network classified right, in the order of the index.

    data_digest: of the shards.  top1, top5: bool (num_images,); the true class was the best, was among the best five.
    """

    data_digest: str
    top1: np.ndarray
    top5: np.ndarray

    def errors(self) -> tuple[float, float]:
        """top1_error and top5_error, fractions."""
        n = len(self.top1)
        return (n - int(self.top1.sum())) / n, (n - int(self.top5.sum())) / n


@dataclass(frozen=True)
class Contender:
    """A network at the gate.

    errors: top1_error and top5_error (fractions), num_images, data_digest, as its evaluation states them.
    hits: None if its predictions for these images are not known.
    """

    name: str
    weights_sha256: str
    errors: dict[str, Any]
    hits: Hits | None


@dataclass(frozen=True)
class Rule:
    """One rule, judged.  text: what was found, in words.  remedy: what would have passed; "" if it has passed."""

    name: str
    kind: Kind
    passed: bool
    value: float | int | str | None
    limit: float | int | str | None
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Verdict:
    rules: tuple[Rule, ...]

    def failures(self, *kinds: Kind) -> list[str]:
        """The texts of the failed rules of these kinds; by default of all but the order."""
        wanted = kinds or ("absolute", "comparison")
        return [rule.text for rule in self.rules if not rule.passed and rule.kind in wanted]

    @property
    def registrable(self) -> bool:
        return not self.failures("absolute")

    @property
    def passed(self) -> bool:
        return not self.failures()

    @property
    def promoted(self) -> bool:
        """Whether it becomes the champion."""
        return all(rule.passed for rule in self.rules)


def judge(
    gate: Gate,
    challenger: Contender,
    champion: Contender | None,
    num_images: int,
    data_digest: str,
    rolled_back: str = "",
) -> Verdict:
    """Judge a network.  champion: None if there is nothing to compare with.

    num_images, data_digest: of the validation images.  rolled_back: how these weights were the champion and were put
    back, "" if they were not.
    """
    rules = [*_absolute(gate, challenger, num_images, data_digest)]
    if rolled_back:
        remedy = "--replace-champion promotes them again"
        rules.append(
            Rule("rolled_back", "comparison", False, rolled_back, None, f"these weights {rolled_back}", remedy)
        )
    if champion is not None:
        rules += _compared(gate, challenger, champion, data_digest)
    return Verdict(tuple(rules))


def _absolute(gate: Gate, challenger: Contender, num_images: int, data_digest: str) -> list[Rule]:
    errors, rules = challenger.errors, []
    found = errors["num_images"]
    text = f"evaluated on {found:,} of {num_images:,} images"
    rules.append(Rule("num_images", "absolute", found == num_images, found, num_images, text, "all validation images"))
    digest, hits = errors["data_digest"], challenger.hits
    same = digest == data_digest and (hits is None or hits.data_digest == data_digest)
    text = f"evaluated on {digest}" + ("" if same else f", not on these shards, {data_digest}")
    rules.append(Rule("data_digest", "absolute", same, digest, data_digest, text, "an evaluation of these shards"))
    limits = {"top1_error": gate.max_top1_error, "top5_error": gate.max_top5_error}
    finite = all(math.isfinite(errors[name]) for name in limits)
    if hits is not None and finite:
        agrees = len(hits.top1) == found and hits.errors() == (errors["top1_error"], errors["top5_error"])
        stated, counted = f"{errors['top1_error']:.6f}", f"{hits.errors()[0]:.6f}"
        text = f"the predictions have a top1_error of {counted}, the evaluation {stated}"
        rules.append(Rule("predictions", "absolute", agrees, counted, stated, text, "an evaluation of these weights"))
    for name, limit in limits.items():
        value, parameter = errors[name], f"register.gate.max_{name}"
        good = math.isfinite(value) and value <= limit
        text = f"{name} {value:.4f} is {'at most' if good else 'above'} {parameter} {limit:g}"
        remedy = f"{parameter}: {_up(value)} or more" if math.isfinite(value) else "a finite error"
        shown = value if math.isfinite(value) else str(value)  # JSON has no NaN
        rules.append(Rule(f"max_{name}", "absolute", good, shown, limit, text, remedy))
    return [rule if not rule.passed else _without_remedy(rule) for rule in rules]


def _compared(gate: Gate, challenger: Contender, champion: Contender, data_digest: str) -> list[Rule]:
    if challenger.weights_sha256 == champion.weights_sha256:
        text = f"these are the weights of the champion, {champion.name}"
        return [Rule("same_weights", "comparison", True, champion.name, None, text)]
    mine, theirs = challenger.hits, champion.hits
    if theirs is None or mine is None or theirs.data_digest != data_digest or mine.data_digest != data_digest:
        digest = champion.errors["data_digest"]
        text = (
            f"the champion was evaluated on other images ({digest} instead of {data_digest})"
            if digest != data_digest
            else f"the champion, {champion.name}, has no predictions of single images"
        ) + ", so the two cannot be compared"
        remedy = (
            "register.gate.incomparable_champion: reevaluate, which evaluates the champion on these images; another "
            "model_name for another data set; or --replace-champion"
        )
        return [Rule("comparable", "comparison", False, digest, data_digest, f"{text}; {remedy}", remedy)]
    if len(mine.top1) != len(theirs.top1):
        raise AssertionError(f"{len(mine.top1)} and {len(theirs.top1)} predictions for the images of {data_digest}")
    rules = [Rule("comparable", "comparison", True, data_digest, data_digest, f"both evaluated on {data_digest}")]
    only_mine, only_theirs = int((~mine.top1 & theirs.top1).sum()), int((mine.top1 & ~theirs.top1).sum())
    bound = upper_bound(only_mine, only_theirs, len(mine.top1), gate.confidence)
    good, parameter = bound <= gate.max_regression, "register.gate.max_regression"
    (error, error5), (best, best5) = mine.errors(), theirs.errors()
    text = (
        f"top1_error {error:.4f} {'is not' if good else 'may be'} more than {parameter} {gate.max_regression:g} above "
        f"the champion's {best:.4f}: at most {bound:+.4f} with {100 * gate.confidence:g} % confidence "
        f"({only_mine} images only this model gets wrong, {only_theirs} only the champion, of {len(mine.top1):,})"
    )
    remedy = "" if good else f"{parameter}: {_up(bound)} or more"
    rules.append(Rule("max_regression", "comparison", good, bound, gate.max_regression, text, remedy))
    better = (error, error5) < (best, best5)
    text = (
        f"(top1_error, top5_error) ({error:.4f}, {error5:.4f}) is {'better' if better else 'not better'} than the "
        f"champion's ({best:.4f}, {best5:.4f})"
    )
    remedy = "" if better else "lower errors than the champion's; or --replace-champion"
    rules.append(Rule("order", "order", better, f"{error:.6f}", f"{best:.6f}", text, remedy))
    return rules


def _up(value: float) -> str:
    """Four digits, rounded up."""
    return f"{math.ceil(value * 10_000) / 10_000:g}"


def _without_remedy(rule: Rule) -> Rule:
    return Rule(rule.name, rule.kind, True, rule.value, rule.limit, rule.text)
