"""Where the weights of a checkpoint come from: trained here, or imported from a file (components.weights).

An imported network has no parameters of a training, and nothing may look as if it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.errors import Refused

Manifest = Mapping[str, Any]  # of a checkpoint


def imported(manifest: Manifest) -> dict[str, Any] | None:
    """The record of an import: file, size, sha256, kind, weights (name in its library); None if trained here."""
    found = manifest["run"].get("imported")
    return dict(found) if found else None


def in_words(record: Mapping[str, Any]) -> str:
    """imported from vgg16-397923af.pth (torchvision, VGG16_Weights.IMAGENET1K_V1, sha256 397923af…)"""
    parts = [record["kind"], record["weights"], f"sha256 {record['sha256'][:16]}…"]
    return f"imported from {record['file']} ({', '.join(part for part in parts if part)})"


def parameters(manifest: Manifest) -> dict[str, Any]:
    """The parameters of the training; of an imported network what is known of it, and the file."""
    record = imported(manifest)
    if record is None:
        return dict(manifest["run"]["train"])
    network = manifest["network"]
    known = {name: network[name] for name in ("configuration", "batch_norm", "classifier_width", "input_size")}
    return {**known, "imported": record["file"], "imported_sha256": record["sha256"]}


def chain(manifest: Manifest) -> dict[str, Any]:
    """Parameters, inputs and code of a training for its model version; of an imported network, the import."""
    run = manifest["run"]
    if record := imported(manifest):
        return {"imported": record}
    return {
        "params": run["train"],
        "inputs": {"shards": run["data"]["digest"], "initial": run["initial"]},
        "code": run["code"],
    }


def publishers_scale(manifest: Manifest) -> int:
    """Q of the publishers' own figures: 256 for 224 pixels."""
    return int(manifest["network"]["input_size"]) * 256 // 224


def expect_classifier(manifest: Manifest, name: object) -> None:
    """Raises Refused for a network whose classifier was drawn anew when it was imported.  name: of the checkpoint."""
    record = imported(manifest)
    if record and record["classifier"].startswith("drawn"):
        raise Refused(
            f"{name}: {in_words(record)} has convolutions only; its classifier was drawn anew. It serves as initial "
            "weights (train.init: checkpoint), not for answers."
        )
