"""Say what is in photographs: python -m components.classify models:/vgg16-digits@champion photo.jpg …

MODEL is models:/NAME@ALIAS or models:/NAME/VERSION in MLflow (MLFLOW_TRACKING_URI), a folder of a version that was
downloaded, or a finished checkpoint folder (models/vgg).  A version answers with its own code, as it was evaluated; a
checkpoint at one scale, that of its training.  An image that cannot be used is named, exit code 65; the others are
answered all the same.

A version with a localiser gives a box for every class: x1, y1, x2, y2, pixels of the image as it is stored (not turned
as its EXIF says), both corners inside the box, the first pixel 0.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from components import program
from runtime.errors import BadData
from runtime.wording import counted, listing


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.classify", __doc__)
    flags.add_argument("model", metavar="MODEL")
    flags.add_argument("images", nargs="+", metavar="IMAGE", help="an image file: JPEG, PNG, WebP, BMP, GIF, TIFF, PPM")
    flags.add_argument("--top", type=_count, default=5, metavar="N", help="classes to name for an image (5)")
    flags.add_argument(
        "--json", action="store_true",
        help="print a JSON object a line: file, and predictions (class, wnid, name, probability, box if there is "
        "one) or error",
    )  # fmt: skip
    return flags


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of classes, 1 or more")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    program.expect_one_process("components.classify")
    from components.classify import models

    bad = []
    files = list(dict.fromkeys(args.images))
    for answer in models.answers(args.model, files, args.top):
        if error := answer.get("error"):
            bad.append(f"{answer['file']}: {error}")
        if args.json:
            print(json.dumps(answer, ensure_ascii=False), flush=True)
        elif not error:
            print(_table(answer), flush=True)
    if bad:
        raise BadData(f"{counted(len(bad), 'image')} of {len(files):,} cannot be used:\n{listing(bad)}", everything=bad)


def _table(answer: dict[str, Any]) -> str:
    lines = [
        f"  {100 * p['probability']:6.2f} %  {p['name']}  ({p['wnid']}){_box(p.get('box'))}"
        for p in answer["predictions"]
    ]
    return "\n".join([answer["file"], *lines])


def _box(box: list[int] | None) -> str:
    return "  box {}, {}, {}, {}".format(*box) if box else ""


if __name__ == "__main__":
    program.run(main)
