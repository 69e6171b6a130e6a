"""Small files as a finished evaluation writes them: metrics/evaluate.json, and the manifest of predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime import manifest

IMAGENET = {"dataset": "ilsvrc2012", "data_digest": f"{'1' * 32}.dir", "classes_sha256": "c" * 64}
CIFAR = {"dataset": "folder", "data_digest": f"{'2' * 32}.dir", "classes_sha256": "d" * 64}


def result(
    top1: float, top5: float, method: str, scales: list[int], num_images: int = 50_000, mirror: bool = True
) -> Any:
    """A mode of evaluate.json.  top1, top5: errors in %."""
    mode: dict[str, Any] = {"num_images": num_images, "loss": 1.0, "calibration_error": 0.02}
    for name, error in (("top1", top1 / 100), ("top5", top5 / 100)):
        mode |= {f"{name}_error": error, f"{name}_interval": [error - 0.004, error + 0.004]}
    return {**mode, "protocol": {"method": method, "scales": scales, "mirror": mirror}}


def metrics(
    configuration: str, train_scale: Any, modes: dict[str, Any], data: dict[str, str], seed: int = 1, **training: Any
) -> dict[str, Any]:
    """evaluate.json.  seed: of the weights."""
    headline = list(modes)[-1]
    trained = {"configuration": configuration, "batch_norm": False, "train_scale": train_scale, "input_size": 224}
    trained |= {"source": "trained", **training}
    return {
        **{name: value for name, value in modes[headline].items() if name != "protocol"},
        "headline": headline,
        "modes": modes,
        "weights_sha256": manifest.digest_of([trained, seed]),
        "training": trained,
        **data,
    }


def fused_network(content: dict[str, Any], method: str) -> dict[str, Any]:
    """As a fusion records one of its networks.  content: its own metrics."""
    return {**content["training"], "method": method, "weights_sha256": content["weights_sha256"]}


def write(folder: Path, content: dict[str, Any]) -> Path:
    """A project folder with metrics/evaluate.json, and the numbers that DVC shows."""
    (folder / "metrics/dvc").mkdir(parents=True)
    shown = {name: content[name] for name in ("top1_error", "top5_error")}
    (folder / "metrics/dvc/evaluate.json").write_text(json.dumps(shown))
    (folder / "metrics/evaluate.json").write_text(json.dumps(content))
    return folder


def write_predictions(folder: Path, content: dict[str, Any], **params: Any) -> Path:
    """The manifest of data/predictions in a project folder.  params: of section evaluate."""
    predictions = folder / "data/predictions"
    predictions.mkdir(parents=True)
    inputs = {"weights_sha256": content["weights_sha256"], "shards": content["data_digest"]}
    manifest.write(predictions, "vgg.predictions/2", {"metrics": content, "inputs": inputs, "evaluate": params}, [])
    return predictions
