"""The runs that the tables need, with FLOPs and hours, before any data is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from components.evaluate.published import shown_scale
from pipelines.paper.recipes import Run
from runtime.errors import WrongParameters

REFERENCE = "D"  # whose images/s a single number is


def rates(texts: Sequence[str]) -> dict[str, float]:
    """Images/s by configuration, of '140' (net D) or 'A=260'.  Raises WrongParameters."""
    found = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        try:
            found[name if equals else REFERENCE] = rate = float(number)
            if not 0 < rate < float("inf"):
                raise ValueError
        except ValueError:
            raise WrongParameters(f"--images-per-second {text}: write a number above 0, or NET=NUMBER") from None
    return found


def make(
    runs: Sequence[Run], rate: dict[str, float], manifest: dict[str, Any] | None = None,
    num_images: int | None = None, num_classes: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One entry a run, and totals.  FLOPs of training: forward and backward, without validation and evaluation.

    rate: as rates(); hours of a network without one go by its FLOPs and the rate of net D; without any they are None.
    manifest: of the shards, or num_images and num_classes; else the source determines them.
    Raises WrongParameters if the size of the training set is not known.
    """
    import torch

    from vgg.network.model import VGG, Architecture
    from vgg.training import plan
    from vgg.training.agenda import num_steps_of

    data = plan.data(str(runs[0].recipe), manifest, num_images, num_classes)

    def flops(configuration: str, run: Run) -> int:
        train = run.train
        with torch.device("meta"):
            architecture = Architecture(
                configuration, train.batch_norm, train.classifier_width, data.num_classes, train.input_size
            )
            return 6 * plan.macs(VGG(architecture, train.dropout))  # 2 a multiply-add, 3 × for the backward pass

    entries: list[dict[str, Any]] = []
    for run in runs:
        each, name = flops(run.train.configuration, run), run.train.configuration
        images = num_steps_of(run.train, data.num_images) * run.train.batch_size
        speed = rate.get(name) or (rate[REFERENCE] * flops(REFERENCE, run) / each if REFERENCE in rate else None)
        entries.append(
            {
                "name": run.name, "recipe": str(run.recipe), "configuration": name,
                "train_scale": run.train_scale, "seed": run.seed, "init": run.train.init, "before": run.before,
                "epochs": run.train.epochs, "flops": each * images, "tables": run.tables,
                "hours": images / speed / 3600 if speed else None,
            }
        )  # fmt: skip
    hours = [entry["hours"] for entry in entries]
    total = sum(hours) if None not in hours else None
    return {
        "runs": entries,
        "num_images": data.num_images,
        "flops": sum(entry["flops"] for entry in entries),
        "hours": total,
    }


def text(plan: dict[str, Any]) -> str:
    heads = ["run", "net", "S", "first weights", "epochs", "FLOPs", "hours", "tables"]
    body = []
    for entry in plan["runs"]:
        epochs, hours = str(entry["epochs"]), _hours(entry["hours"])
        first = f"of {entry['before']}" if entry["before"] else entry["init"]
        body.append(
            [
                entry["name"], entry["configuration"], shown_scale(entry["train_scale"]), first, epochs,
                f"{entry['flops']:.2e}", hours, ",".join(map(str, entry["tables"])),
            ]
        )  # fmt: skip
    body.append([f"{len(body)} runs", "", "", "", "", f"{plan['flops']:.2e}", _hours(plan["hours"]), ""])
    widths = [max(len(line[i]) for line in [heads, *body]) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [heads, *body]]
    lines = [line.rstrip() for line in lines]
    images = f"{plan['num_images']:,} training images; epochs are the most, a plateau schedule ends earlier"
    note = "training only, without validation and evaluation"
    if plan["hours"] is None:
        note = "no hours: measure the training (its log says images/s), and give --images-per-second"
    return "\n".join([*lines, "", images, note])


def _hours(hours: float | None) -> str:
    return "" if hours is None else f"{hours:,.2f}" if hours < 10 else f"{hours:,.0f}"
