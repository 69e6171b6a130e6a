"""Confusion of classes: a table for DVC's plots, a matrix for Kubeflow's UI."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.evaluate.table import as_csv
from runtime.shardset import ShardSet
from vgg.evaluation.evaluate import Evaluation

MAX_CLASSES = 30  # shown at most: those with the most misclassified images
OTHERS = "(others)"


def matrix(shards: ShardSet, evaluation: Evaluation) -> NDArray[np.int64]:
    """Images by true class (row) and class predicted by the headline mode (column): int64 (classes, classes)."""
    rows = evaluation.predictions
    counts = np.zeros((len(shards.wnids),) * 2, np.int64)
    np.add.at(counts, (rows["label"], rows["modes"]["classes"][:, -1, 0]), 1)
    return counts


def most_misclassified(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The classes to show, ascending."""
    misclassified = counts.sum(1) - counts.diagonal()
    return np.sort(np.argsort(-misclassified, kind="stable")[:MAX_CLASSES])


def table(shards: ShardSet, evaluation: Evaluation) -> bytes:
    """CSV with one row per image: its class and the one predicted by the headline mode."""
    rows = evaluation.predictions
    predicted = rows["modes"]["classes"][:, -1, 0]
    pairs = ((shards.wnids[t], shards.wnids[p]) for t, p in zip(rows["label"], predicted, strict=True))
    return as_csv(("actual", "predicted"), *pairs)


def for_kubeflow(shards: ShardSet, evaluation: Evaluation) -> dict[str, Any]:
    """Metadata of a ClassificationMetrics artifact; a thousand classes would not fit into its database."""
    counts = matrix(shards, evaluation)
    shown = most_misclassified(counts)
    names = [shards.class_names[c] for c in shown]
    part = counts[np.ix_(shown, shown)]
    if len(shown) < len(counts):
        column = counts[shown].sum(1) - part.sum(1)
        row = counts[:, shown].sum(0) - part.sum(0)
        corner = counts.sum() - part.sum() - column.sum() - row.sum()
        part = np.block([[part, column[:, None]], [row[None, :], np.array([[corner]])]])
        names.append(OTHERS)
    return {
        "confusionMatrix": {
            "annotationSpecs": [{"displayName": name} for name in names],
            "rows": [{"row": [int(count) for count in row]} for row in part],
        }
    }
