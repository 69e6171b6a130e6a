"""The boxes of a localisation as files: arrays, and the devkit's text."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from components.localise.schema import SCHEMA
from runtime import manifest
from runtime.shards.shardset import ShardSet
from vgg.localisation import devkit
from vgg.localisation.results import Results

DEVKIT = "val.pred.det.txt"


def write(
    directory: Path,
    shards: ShardSet,
    results: Results,
    metrics: dict[str, Any],
    params: dict[str, Any],
    inputs: dict[str, str],
) -> str:
    """Write everything, the manifest last; returns the directory's digest.

    guesses.npy: int64 (n, 5).  boxes.npy: (modes, n, 5, 4), given.npy: (1 + modes, n, 4), half-open pixels.  All in the
    order of the index.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / manifest.NAME).unlink(missing_ok=True)
    split = shards.split("val")
    arrays = {"guesses.npy": results.guesses, "boxes.npy": results.boxes, "given.npy": results.given}
    for name, array in arrays.items():
        manifest.write_atomically(directory / name, partial(_save, array))
    keys = [split.key(number) for number in range(len(split))]
    devkit.write_predictions(directory / DEVKIT, keys, results.guesses, results.boxes[-1], ids(shards))
    entries = [manifest.file_entry(directory, name) for name in (*arrays, DEVKIT)]
    body = {"localise": params, "metrics": metrics, "inputs": inputs, "classes_sha256": shards.classes_sha256}
    return manifest.directory_digest(directory, manifest.write(directory, SCHEMA, body, entries))


def ids(shards: ShardSet) -> list[int]:
    """ILSVRC2012_ID of every class: of the edition's table, else its number from 1."""
    path = shards.directory / "synsets.json"
    if not path.exists():
        return list(range(1, len(shards.wnids) + 1))
    import json

    by_wnid = {synset["wnid"]: synset["id"] for synset in json.loads(path.read_text(encoding="utf-8"))}
    return [int(by_wnid[wnid]) for wnid in shards.wnids]


def _save(array: NDArray[Any], file: BinaryIO) -> None:
    np.save(file, array, allow_pickle=False)
