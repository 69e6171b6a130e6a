"""Which class was taken for which: for DVC to plot, and for Kubeflow's page."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.shardset import ShardSet
from vgg.evaluation.evaluate import Evaluation

MAX_CLASSES = 30  # rows shown: the classes most often mistaken, where there are more
OTHERS = "(others)"


def matrix(shards: ShardSet, evaluation: Evaluation) -> NDArray[np.int64]:
    """How many images of a class (row) the headline mode took for a class (column): int64 (classes, classes)."""
    rows = evaluation.predictions
    counts = np.zeros((len(shards.wnids),) * 2, np.int64)
    np.add.at(counts, (rows["label"], rows["modes"]["classes"][:, -1, 0]), 1)
    return counts


def most_mistaken(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The classes to show, in their order."""
    mistaken = counts.sum(1) - counts.diagonal()
    return np.sort(np.argsort(-mistaken, kind="stable")[:MAX_CLASSES])


def table(shards: ShardSet, evaluation: Evaluation) -> bytes:
    """A row of every image: its class and the headline mode's guess."""
    rows = evaluation.predictions
    guesses = rows["modes"]["classes"][:, -1, 0]
    pairs = (f"{shards.wnids[t]},{shards.wnids[g]}" for t, g in zip(rows["label"], guesses, strict=True))
    return ("\n".join(["actual,predicted", *pairs]) + "\n").encode()


def for_kubeflow(shards: ShardSet, evaluation: Evaluation) -> dict[str, Any]:
    """Metadata of a ClassificationMetrics artifact; a thousand classes would not fit into its database."""
    counts = matrix(shards, evaluation)
    shown = most_mistaken(counts)
    names = [shards.class_names[c] for c in shown]
    part = counts[np.ix_(shown, shown)]
    if len(shown) < len(counts):
        beside = counts[shown].sum(1) - part.sum(1)
        below = counts[:, shown].sum(0) - part.sum(0)
        corner = counts.sum() - part.sum() - beside.sum() - below.sum()
        part = np.block([[part, beside[:, None]], [below[None, :], np.array([[corner]])]])
        names.append(OTHERS)
    return {
        "confusionMatrix": {
            "annotationSpecs": [{"displayName": name} for name in names],
            "rows": [{"row": [int(count) for count in row]} for row in part],
        }
    }
