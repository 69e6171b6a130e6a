"""Tables: the errors as text, names and counts as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any


def table(metrics: dict[str, Any]) -> str:
    """The errors of every mode as plain text."""
    width = max(len(mode) for mode in metrics["modes"])
    lines = [f"{'mode':{width}}  top-1 error  top-5 error    loss   images"]
    for mode, result in metrics["modes"].items():
        lines.append(
            f"{mode:{width}}  {100 * result['top1_error']:9.2f} %  {100 * result['top5_error']:9.2f} %  "
            f"{result['loss']:6.4f}  {result['num_images']:7,}{'  ← headline' if mode == metrics['headline'] else ''}"
        )
    return "\n".join(lines)


def headline(metrics: dict[str, Any], dataset: str) -> str:
    """The result in one line.  metrics: of an evaluation."""
    return (
        f"{100 * metrics['top1_error']:.2f} % top-1 and {100 * metrics['top5_error']:.2f} % top-5 error on "
        f"{metrics['num_images']:,} validation images of {dataset} ({metrics['headline']})"
    )


def markdown(metrics: dict[str, Any], dataset: str) -> str:
    """The result and the errors of every mode as Markdown."""
    rows = [
        f"| {mode} | {100 * result['top1_error']:.2f} | {100 * result['top5_error']:.2f} | {result['loss']:.4f} |"
        for mode, result in metrics["modes"].items()
    ]
    lines = "\n".join(["| mode | top-1 error % | top-5 error % | loss |", "|---|---|---|---|", *rows])
    return f"**{headline(metrics, dataset)}**\n\n{lines}\n"


def as_csv(*rows: Iterable[Any]) -> bytes:
    """The rows as CSV, UTF-8: names are quoted where necessary.  Sharding refuses names that spreadsheets calculate."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue().encode()
