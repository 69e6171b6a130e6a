"""Answers for image files, from any function that predicts; as a script, from a model version with its own code.

The script imports nothing of this checkout, because a version has its own vgg and runtime, of the day it was made.  It
reads {"model": folder, "files": [...], "top_k": number} from stdin and prints an answer a line; {"failure": reason} if
the model cannot be loaded.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

CHUNK = 32  # files in memory, and answered together
COLUMNS = {  # boxes: of versions with a localiser
    "class": "classes", "wnid": "wnids", "name": "names", "probability": "probabilities", "box": "boxes",
}  # fmt: skip
Predict = Callable[[list[bytes]], list[dict[str, Any]]]  # rows of the served model; ValueError for a bad image


def answers(predict: Predict, files: list[str]) -> Iterator[dict[str, Any]]:
    """For every file, in order: {"file", "predictions": best first}, or {"file", "error"} if it cannot be used."""
    for first in range(0, len(files), CHUNK):
        chunk = files[first : first + CHUNK]
        contents: dict[str, bytes] = {}
        errors: dict[str, str] = {}
        for file in chunk:
            try:
                with open(file, "rb") as opened:
                    contents[file] = opened.read()
            except OSError as error:
                errors[file] = error.strerror or str(error)
        rows = _rows(predict, contents, errors)
        for file in chunk:
            yield {"file": file, "error": errors[file]} if file in errors else {"file": file, "predictions": rows[file]}


def _rows(predict: Predict, contents: dict[str, bytes], errors: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Predictions by file; for those that cannot be used, a reason in errors."""
    if not contents:
        return {}
    try:
        found = predict(list(contents.values()))
    except ValueError as error:
        if len(contents) > 1:  # find the bad ones
            return {k: v for file, data in contents.items() for k, v in _rows(predict, {file: data}, errors).items()}
        errors[next(iter(contents))] = str(error).removeprefix("image in row 0: ")
        return {}
    return {file: _predictions(row) for file, row in zip(contents, found, strict=True)}


def _predictions(row: dict[str, Any]) -> list[dict[str, Any]]:
    names = {key: name for key, name in COLUMNS.items() if name in row}
    columns = [row[name] for name in names.values()]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def main() -> None:
    asked = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print
    warnings.simplefilter("ignore")
    try:
        import mlflow
        import pandas as pd

        model = mlflow.pyfunc.load_model(asked["model"])
    except Exception as error:  # of any package that the version needs, or of its own code
        print(json.dumps({"failure": f"{type(error).__name__}: {error}"}), file=out, flush=True)
        return

    def predict(images: list[bytes]) -> list[dict[str, Any]]:
        table = pd.DataFrame({"image": images})  # the form that versions of every age take
        rows: list[dict[str, Any]] = model.predict(table, params={"top_k": asked["top_k"]}).to_dict("records")
        return rows

    for answer in answers(predict, asked["files"]):
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
