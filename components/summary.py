"""python -m components.summary: print the results of the last pipeline run, its outputs, and next steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from components.evaluate.table import table


def main() -> None:
    metrics = {stage: read(stage) for stage in ("shard", "train", "evaluate", "register")}
    data, evaluation, model = metrics["shard"], metrics["evaluate"], metrics["register"]
    print(f"\n{table(evaluation)}\n")
    print(f"{100 * (1 - evaluation['top1_error']):.2f} % top-1 on {evaluation['num_images']:,} validation images\n")
    for name, description in (
        ("shards", f"data/shards          {data['num_train']:,} + {data['num_val']:,} images, {data['digest']}"),
        ("network", f"models/vgg           weights {metrics['train']['weights_sha256'][:16]}…"),
        ("predictions", "data/predictions     every image, confusion.png, mistakes.png"),
        ("numbers", "metrics/             JSON, the curves as CSV, evaluation.html"),
        ("model", f"{model['uri']}  version {model['version']}"),
    ):
        print(f"{name:12} {description}")
    print(
        "\nnext:\n"
        "  make ui                                    runs, curves and the model in the browser\n"
        "  $EDITOR params.yaml && make run            change a number; only what depends on it runs again\n"
        "  cp recipes/cifar10.yaml params.yaml        train on photographs (its header says how)"
    )


def read(stage: str) -> dict[str, Any]:
    return dict(json.loads((Path("metrics") / f"{stage}.json").read_bytes()))


if __name__ == "__main__":
    main()
