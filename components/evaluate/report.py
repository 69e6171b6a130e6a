"""Predictions of an evaluation, its confusion matrix as a picture, confusions and errors as CSV."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from components.evaluate.confusion import matrix, most_misclassified
from components.evaluate.table import as_csv
from runtime import manifest
from runtime.shards.shardset import ShardSet
from vgg.evaluation.evaluate import Evaluation

SCHEMA = "vgg.predictions/2"
REPORT_FILES = ("confusion.png", "confusion.csv", "mistakes.csv")
MAX_NAME = 30  # characters of a class name in pictures; the tables have the whole name

log = logging.getLogger("vgg")


def write(
    directory: Path,
    shards: ShardSet,
    evaluation: Evaluation,
    metrics: dict[str, Any],
    params: dict[str, Any],
    inputs: dict[str, str],
) -> str:
    """Write predictions, posteriors and the report's files, then the manifest; returns the directory's digest.

    predictions.npy: rows of vgg.evaluation.predictions.row_type.  keys.npy: bytes (images,).  posteriors/<mode>.npy:
    float16 (images, classes).  All in the order of the index.
    metrics: of the stage.  inputs: digests of shards, checkpoint and weights, by name.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a dollar
    directory.mkdir(parents=True, exist_ok=True)
    (directory / manifest.NAME).unlink(missing_ok=True)
    rows, keys = evaluation.predictions, np.asarray(shards.split("val").rows["key"])
    arrays: dict[str, Callable[[], NDArray[Any]]] = {"predictions.npy": lambda: rows, "keys.npy": lambda: keys}
    for number, mode in enumerate(evaluation.modes):
        arrays[f"posteriors/{mode}.npy"] = partial(evaluation.posteriors, number)
    for name, array in arrays.items():
        manifest.write_atomically(directory / name, partial(_save_array, array()))
    _write_confusion(directory, shards, matrix(shards, evaluation))
    _write_mistakes(directory, shards, rows)
    entries = [manifest.file_entry(directory, name) for name in (*arrays, *REPORT_FILES)]
    body = {
        "evaluate": params,
        "metrics": metrics,
        "inputs": inputs,
        "classes": shards.manifest["classes"],
        "classes_sha256": shards.classes_sha256,
        "headline_of_network": evaluation.network_mode,
    }
    content = manifest.write(directory, SCHEMA, body, entries)
    return manifest.directory_digest(directory, content)


def read(directory: Path, names: Collection[str] = ()) -> dict[str, Any]:
    """The manifest of a finished evaluation.  names: of the files to verify; by default all of them.

    Raises Refused if it is not finished, or damaged.
    """
    content = manifest.read(directory, SCHEMA)
    for entry in content["files"]:
        if not names or entry["path"] in names:
            manifest.verify_file(directory, entry)
    return content


def _save_array(array: NDArray[Any], file: BinaryIO) -> None:
    np.save(file, array, allow_pickle=False)


def _write_confusion(directory: Path, shards: ShardSet, confusion: np.ndarray) -> None:
    from matplotlib import pyplot

    pairs = sorted(((int(confusion[t, p]), t, p) for t, p in np.argwhere(confusion) if t != p), reverse=True)
    rows = as_csv(("count", "true", "guessed"), *((n, shards.wnids[t], shards.wnids[p]) for n, t, p in pairs))
    manifest.write_atomically(directory / "confusion.csv", lambda file: file.write(rows))

    shown = most_misclassified(confusion)
    part = confusion[np.ix_(shown, shown)]
    share = part / np.maximum(confusion[shown].sum(1, keepdims=True), 1)
    names = [shortened(shards.class_names[c]) for c in shown]
    side = 2.5 + 0.38 * len(shown)
    figure, axes = pyplot.subplots(figsize=(side, side), layout="constrained")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(part):
        if count:
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    total = int(confusion.sum())
    title = f"{total - int(confusion.trace()):,} of {total:,} images misclassified"
    axes.set_title(title if len(shown) == len(confusion) else f"{title}; the {len(shown)} most misclassified classes")
    save_figure(figure, directory / "confusion.png")


def _write_mistakes(directory: Path, shards: ShardSet, rows: np.ndarray) -> None:
    split, headline = shards.split("val"), rows["modes"][:, -1]
    wrong = np.flatnonzero(headline["rank"] > 0)
    wrong = wrong[np.argsort(-headline["probabilities"][wrong, 0], kind="stable")]
    mistakes = []
    for i in wrong:
        predicted, probability = headline["classes"][i, 0], headline["probabilities"][i, 0]
        number, label = int(rows["number"][i]), rows["label"][i]
        mistakes.append((split.key(number), shards.wnids[label], shards.wnids[predicted], f"{probability:.4f}"))
    table = as_csv(("key", "true", "guessed", "probability"), *mistakes)
    manifest.write_atomically(directory / "mistakes.csv", lambda file: file.write(table))


def save_figure(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    with warnings.catch_warnings(record=True) as caught:  # matplotlib has one for every letter
        manifest.write_atomically(
            path, lambda file: figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
        )
    if any("missing from font" in str(warning.message) for warning in caught):
        log.warning("%s: its font lacks letters of the class names; the tables beside it have them", path)
    pyplot.close(figure)


def shortened(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
