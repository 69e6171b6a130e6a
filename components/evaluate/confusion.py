"""Confusion of classes: a table for DVC's plots, a matrix for Kubeflow's UI."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.evaluate.table import as_csv
from runtime.shards.shardset import ShardSet
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


def _condensed(names: list[str], counts: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
    """Names and matrix of the classes to show; the last one is OTHERS if there are more."""
    shown = most_misclassified(counts)
    part = counts[np.ix_(shown, shown)]
    if len(shown) < len(counts):
        column = counts[shown].sum(1) - part.sum(1)
        row = counts[:, shown].sum(0) - part.sum(0)
        corner = counts.sum() - part.sum() - column.sum() - row.sum()
        part = np.block([[part, column[:, None]], [row[None, :], np.array([[corner]])]])
        return [*(names[c] for c in shown), OTHERS], part
    return [names[c] for c in shown], part


def table(shards: ShardSet, evaluation: Evaluation) -> bytes:
    """CSV for DVC's plots: class, predicted class, number of images; at most (MAX_CLASSES + 1)² rows."""
    # two classes of ImageNet are called crane
    labels = [w if w == n else f"{w} {n.split(',')[0]}" for w, n in zip(shards.wnids, shards.class_names, strict=True)]
    names, counts = _condensed(labels, matrix(shards, evaluation))
    pairs = ((names[t], names[p], int(counts[t, p])) for t, p in np.argwhere(counts))
    return as_csv(("actual", "predicted", "images"), *pairs)


def for_kubeflow(shards: ShardSet, evaluation: Evaluation) -> dict[str, Any]:
    """Metadata of a ClassificationMetrics artifact; a thousand classes would not fit into its database."""
    names, counts = _condensed(shards.class_names, matrix(shards, evaluation))
    return {
        "confusionMatrix": {
            "annotationSpecs": [{"displayName": name} for name in names],
            "rows": [{"row": [int(count) for count in row]} for row in counts],
        }
    }
