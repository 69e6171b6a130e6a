"""python -m components.summary: print the results of the last pipeline run, its outputs, and next steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from components import program
from components.evaluate.table import table
from runtime.errors import WrongParameters


def main() -> None:
    program.Parser("components.summary", __doc__).parse_args()
    try:
        text = summary({stage: read(stage) for stage in ("shard", "train", "evaluate", "register")})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WrongParameters(f"metrics/: not the results of a whole run ({error}). Run: make run") from None
    print(text)


def summary(metrics: dict[str, dict[str, Any]]) -> str:
    data, evaluation, model = metrics["shard"], metrics["evaluate"], metrics["register"]
    correct = f"{100 * (1 - evaluation['top1_error']):.2f} % top-1 on {evaluation['num_images']:,} validation images"
    lines = ["", table(evaluation), "", correct, ""]
    for name, description in (
        ("shards", f"data/shards          {data['num_train']:,} + {data['num_val']:,} images, {data['digest']}"),
        ("network", f"models/vgg           weights {metrics['train']['weights_sha256'][:16]}…"),
        ("predictions", "data/predictions     posteriors of every image, errors and confusions as CSV"),
        ("numbers", "metrics/             JSON, the curves as CSV, evaluation.html"),
        ("model", f"{model['uri']}  version {model['version']}"),
    ):
        lines.append(f"{name:12} {description}")
    lines.append(
        "\nnext:\n"
        "  make ui                                    runs, curves and the model in the browser\n"
        "  $EDITOR params.yaml && make run            change a number; only what depends on it runs again\n"
        "  cp recipes/cifar10.yaml params.yaml        train on photographs (its header says how)"
    )
    return "\n".join(lines)


def read(stage: str) -> dict[str, Any]:
    return dict(json.loads((Path("metrics") / f"{stage}.json").read_bytes()))


if __name__ == "__main__":
    program.run(main)
