"""python -m components.summary: print the results of the last pipeline run, its outputs, and next steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from components import program
from components.evaluate.table import table
from components.localise.table import table as localised
from components.tracking.access import has_version
from components.tracking.address import shown, tracking_uri
from runtime.errors import WrongParameters


def main() -> None:
    program.Parser("components.summary", __doc__).parse_args()
    try:
        text = summary({stage: read(stage) for stage in ("shard", "train", "evaluate", "register")}, localisation())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WrongParameters(f"metrics/: not the results of a whole run ({error}). Run: make run") from None
    print(text)


def localisation() -> dict[str, Any] | None:
    """The metrics of the optional stage, if dvc.yaml has it."""
    return read("localise") if "\n  localise:\n" in Path("dvc.yaml").read_text(encoding="utf-8") else None


def summary(metrics: dict[str, dict[str, Any]], boxes: dict[str, Any] | None = None) -> str:
    data, evaluation, model = metrics["shard"], metrics["evaluate"], metrics["register"]
    correct = f"{100 * (1 - evaluation['top1_error']):.2f} % top-1 on {evaluation['num_images']:,} validation images"
    lines = ["", table(evaluation), "", correct, ""]
    if boxes:
        lines += [localised(boxes), ""]
    found = boxes and [
        ("localiser", f"models/localiser     weights {boxes['weights_sha256'][:16]}…"),
        ("boxes", "data/localisations   of every image, also as ILSVRC's devkit reads them; metrics/localisation.html"),
    ]
    for name, description in (
        ("shards", f"data/shards          {data['num_train']:,} + {data['num_val']:,} images, {data['digest']}"),
        ("network", f"models/vgg           weights {metrics['train']['weights_sha256'][:16]}…"),
        ("predictions", "data/predictions     posteriors of every image, errors and confusions as CSV"),
        ("numbers", "metrics/             JSON, the curves as CSV, evaluation.html"),
        *(found or []),
        ("model", f"{model['uri']}  version {model['version']}{missing(model)}"),
    ):
        lines.append(f"{name:12} {description}")
    lines.append(
        "\nnext:\n"
        "  make ui                                    runs, curves and the model in the browser\n"
        "  $EDITOR params.yaml && make run            change a number; only what depends on it runs again\n"
        "  cp recipes/cifar10.yaml params.yaml        train on photographs (its header says how)"
    )
    return "\n".join(lines)


def missing(model: dict[str, Any]) -> str:
    """What to do if the database here does not have the model, although DVC has nothing to do; a server is not asked.

    model: metrics/register.json.
    """
    uri = tracking_uri()
    if not uri.startswith("sqlite") or has_version(uri, model["model_name"], str(model["version"])):
        return ""
    return f"\n{'':12} which is not in {shown(uri)} (any more). To register it there: dvc repro -f -s register"


def read(stage: str) -> dict[str, Any]:
    return dict(json.loads((Path("metrics") / f"{stage}.json").read_bytes()))


if __name__ == "__main__":
    program.run(main)
