"""The gate before registration: completeness, absolute limits, and no regression from the champion."""

from __future__ import annotations

import math
from typing import Any

from vgg.params.register import Gate


def failures(
    gate: Gate, challenger: dict[str, Any], expected_images: int, champion: dict[str, Any] | None
) -> list[str]:
    """The reasons not to register a model; empty if it passes.

    challenger, champion: top1_error and top5_error (fractions), num_images, and data_digest of the evaluation data.
    expected_images: number of validation images, from the manifest of the shards.
    """
    reasons = []
    if challenger["num_images"] != expected_images:
        reasons.append(f"evaluated on {challenger['num_images']:,} of {expected_images:,} images")
    for name, limit in (("top1_error", gate.max_top1_error), ("top5_error", gate.max_top5_error)):
        value = challenger[name]
        if not math.isfinite(value) or value > limit:
            reasons.append(f"{name} {value:.4f} is above register.gate.max_{name} {limit:g}")
    if champion is None:
        return reasons
    if champion["data_digest"] != challenger["data_digest"]:
        reasons.append(
            f"the champion was evaluated on other images ({champion['data_digest']} instead of "
            f"{challenger['data_digest']}), so the two cannot be compared; use another model_name for another data set"
        )
    elif challenger["top1_error"] - champion["top1_error"] > gate.max_regression:
        reasons.append(
            f"top1_error {challenger['top1_error']:.4f} is more than register.gate.max_regression "
            f"{gate.max_regression:g} above the champion's {champion['top1_error']:.4f}"
        )
    return reasons
