"""Names of runs, metrics and parameters in MLflow, chosen for its pages.

MLflow draws a chart for every metric, and a section for what stands before the last slash of their names, in
alphabetical order; metrics without a slash come last.  So curves are called <quantity>/<what>, which puts train and val
of a quantity side by side, and results have no slash.  Single values are drawn with two decimals: errors are
percentages there.  components.tracking.view draws train and val of a quantity in one chart.
"""

from __future__ import annotations

from typing import Any

CURVES = {  # name in vgg.training: section and name in MLflow
    "train/top1_error": "error_percent/train_top1",
    "val/top1_error": "error_percent/val_top1",
    "val/top5_error": "error_percent/val_top5",
    "train/box_error": "error_percent/train_box",
    "val/box_error": "error_percent/val_box",
    "val/box_distance": "box_distance/val",
    "train/loss": "loss/train",
    "val/loss": "loss/val",
    "learning_rate": "schedule/learning_rate",
}
SPEED, DATA_WAIT = "speed/images_per_second", "speed/data_wait_percent"
PARENT_PARAMS = (  # what people vary, and compare with the results; the runs of the stages have all parameters
    "shard.source",
    "train.configuration",
    "train.batch_norm",
    "train.classifier_width",
    "train.input_size",
    "train.init",
    "train.crop",
    "train.train_scale",
    "train.flip",
    "train.colour_shift",
    "train.dropout",
    "train.epochs",
    "train.batch_size",
    "train.learning_rate",
    "train.momentum",
    "train.weight_decay",
    "train.schedule.rule",
    "train.precision",
    "train.seed",
    "evaluate.test_scales",
)


def curves(values: dict[str, float]) -> dict[str, float]:
    """A point of the training's curves: errors, which are fractions there, as percentages."""
    return {
        CURVES.get(name, name): _percent(value) if name.endswith("_error") else value for name, value in values.items()
    }


def results(values: dict[str, float]) -> dict[str, float]:
    """Results, with every error as a fraction and as a percentage."""
    percent = {f"{name}_percent": _percent(value) for name, value in values.items() if name.endswith("_error")}
    return {**values, **percent}


def _percent(fraction: float) -> float:
    """As lists show it; a fiftieth of an image of ImageNet's 50,000 is still seen."""
    return round(100 * fraction, 4)


def title(dataset: str, train: dict[str, Any], top1_error: float | None = None) -> str:
    """Name of a pipeline run: digits · D · 32 px · rate 0.006 → 1.01 %.

    train: section of the parameters, or components.weights.origin.parameters; an imported network has a file, no rate.
    """
    network = f"{train['configuration']}{'-BN' if train['batch_norm'] else ''}"
    how = f"imported {train['imported']}" if "imported" in train else f"rate {train['learning_rate']:g}"
    text = f"{dataset} · {network} · {train['input_size']} px · {how}"
    return text if top1_error is None else f"{text} → {100 * top1_error:.2f} %"
