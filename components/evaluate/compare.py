"""Compare two evaluations of the same images: python -m components.evaluate compare PREDICTIONS PREDICTIONS

Whether the networks differ (McNemar's exact test), by how much (bootstrap of the images), and on which images and
classes.  PREDICTIONS: an output of the evaluate stage, a folder or an s3:// address.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import program

if TYPE_CHECKING:
    import numpy as np

SHOWN = 10  # classes and images, on the terminal


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.evaluate compare", __doc__)
    flags.add_argument("first", metavar="PREDICTIONS", help="an evaluation, for example of the network until now")
    flags.add_argument("second", metavar="PREDICTIONS", help="another one of the same images")
    flags.add_argument("--images", type=Path, metavar="FILE", help="write all images that changed as CSV")
    flags.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return flags


@dataclass(frozen=True)
class Opened:
    """An evaluation: its metrics, and rows (vgg.evaluation.predictions.row_type) of its images, by key."""

    where: str
    metrics: dict[str, Any]
    data_digest: str
    classes: list[dict[str, str]]
    keys: np.ndarray
    rows: np.ndarray


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    from runtime import manifest

    first, second = (opened(where) for where in (args.first, args.second))
    expect_comparable(first, second)
    changed = changes(first, second)
    numbers = compared(first, second, changed)
    if args.images:
        manifest.write_atomically(args.images, lambda file: file.write(as_table(first, changed)))
    print(json.dumps(numbers, indent=1) if args.json else report(first, second, numbers, changed))


def opened(where: str) -> Opened:
    """Raises Refused if it is not finished, or damaged."""
    import numpy as np

    from components.evaluate.report import read
    from runtime.store.place import downloaded

    directory, names = downloaded(where), ("keys.npy", "predictions.npy")
    content = read(directory, names)
    keys, rows = (np.load(directory / name, allow_pickle=False) for name in names)
    order = np.argsort(keys, kind="stable")
    return Opened(where, content["metrics"], content["inputs"]["shards"], content["classes"], keys[order], rows[order])


def expect_comparable(first: Opened, second: Opened) -> None:
    """Raises Refused if the evaluations are of other images or other classes."""
    import numpy as np

    from runtime.errors import Refused

    wnids = [[c["wnid"] for c in each.classes] for each in (first, second)]
    if wnids[0] != wnids[1]:
        raise Refused(f"{first.where} and {second.where} are of other classes, so they cannot be compared.")
    if not np.array_equal(first.keys, second.keys):
        common = len(np.intersect1d(first.keys, second.keys))
        raise Refused(
            f"{first.where} has {len(first.keys):,} images, {second.where} {len(second.keys):,}, {common:,} in common. "
            "Evaluate both networks on the same shards."
        )


def changes(first: Opened, second: Opened) -> np.ndarray:
    """Per image: -1 if only the first is right, 1 if only the second is, 0 otherwise.  Top-1 of the headline modes."""
    import numpy as np

    before, after = ((each.rows["modes"][:, -1]["rank"] == 0).astype(np.int64) for each in (first, second))
    changed: np.ndarray = after - before
    return changed


def compared(first: Opened, second: Opened, changed: np.ndarray) -> dict[str, Any]:
    from vgg.evaluation.paired import bootstrap, mcnemar

    only_first, only_second, total = int((changed > 0).sum()), int((changed < 0).sum()), len(changed)
    each = [first.metrics, second.metrics]
    low, high = bootstrap(only_first, only_second, total)
    return {
        "num_images": total,
        "headlines": [e["headline"] for e in each],
        "top1_error": [e["top1_error"] for e in each],
        "top1_interval": [e["top1_interval"] for e in each],
        "top5_error": [e["top5_error"] for e in each],
        "only_first_wrong": only_first,
        "only_second_wrong": only_second,
        "difference": (only_first - only_second) / total,
        "difference_interval": [low, high],
        "mcnemar_p": mcnemar(only_first, only_second),
        "same_data": first.data_digest == second.data_digest,
    }


def report(first: Opened, second: Opened, numbers: dict[str, Any], changed: np.ndarray) -> str:
    import numpy as np

    lines = []
    for place, (each, error) in enumerate(zip((first, second), numbers["top1_error"], strict=True)):
        low, high = numbers["top1_interval"][place]
        lines.append(
            f"{'first' if place == 0 else 'second':7} {100 * error:6.2f} % top-1 error "
            f"[{100 * low:.2f}, {100 * high:.2f}], {100 * numbers['top5_error'][place]:.2f} % top-5   "
            f"{each.where} ({each.metrics['headline']})"
        )
    low, high = numbers["difference_interval"]
    better = "second" if numbers["difference"] > 0 else "first"
    known = numbers["mcnemar_p"] < 0.05
    lines += [
        "",
        f"of {numbers['num_images']:,} images {numbers['only_first_wrong']:,} are wrong only in the first, "
        f"{numbers['only_second_wrong']:,} only in the second: {100 * numbers['difference']:+.2f} points "
        f"[{100 * low:+.2f}, {100 * high:+.2f}]",
        f"McNemar's exact test: p = {numbers['mcnemar_p']:.3g}; "
        + (f"the {better} is better" if known else "that may be chance"),
    ]
    by_class = np.zeros(len(first.classes), np.int64)
    np.add.at(by_class, first.rows["label"], changed)
    worst = [c for c in np.argsort(-np.abs(by_class), kind="stable")[:SHOWN] if by_class[c]]
    if worst:
        lines += ["", "classes that changed most (images more right in the second):"]
        lines += [f"  {by_class[c]:+4d}  {first.classes[c]['wnid']} {first.classes[c]['name']}" for c in worst]
    shown = described(first, changed)[:SHOWN]
    if shown:
        lines += [
            "",
            "images that changed"
            + (f", {SHOWN} of {np.count_nonzero(changed):,}" if len(shown) == SHOWN else "")
            + ":",
        ]
        lines += [f"  {key:30} {wnid:12} right in the {right}" for key, wnid, right in shown]
    return "\n".join(lines)


def described(first: Opened, changed: np.ndarray) -> list[tuple[str, str, str]]:
    """Key, class, and which network is right, of every image that changed."""
    import numpy as np

    found = []
    for number in np.flatnonzero(changed):
        key, wnid = bytes(first.keys[number]).decode(), first.classes[int(first.rows["label"][number])]["wnid"]
        found.append((key, wnid, "second" if changed[number] > 0 else "first"))
    return found


def as_table(first: Opened, changed: np.ndarray) -> bytes:
    from components.evaluate.table import as_csv

    return as_csv(("key", "class", "right_in"), *described(first, changed))
