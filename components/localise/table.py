"""The numbers of a localisation as a table for the terminal."""

from __future__ import annotations

from typing import Any


def table(metrics: dict[str, Any]) -> str:
    """For the terminal: both protocols, and what they are compared with."""
    lines = [f"{'class given (Table 8)':<28}{'error %':>9}{'mean IoU':>10}"]
    for mode, found in metrics["class_given"].items():
        lines.append(f"{mode.replace('_', ' '):<28}{100 * found['error']:>9.2f}{found['mean_iou']:>10.3f}")
    for name, error in metrics["floors"].items():
        lines.append(f"{name.replace('_', ' ') + ' (nothing learnt)':<28}{100 * error:>9.2f}")
    lines.append(f"{'five guesses (Table 9)':<28}{'top-1 %':>9}{'top-5 %':>10}")
    for mode, found in metrics["localisation"].items():
        lines.append(f"{mode.replace('_', ' '):<28}{100 * found['top1_error']:>9.2f}{100 * found['top5_error']:>10.2f}")
    found = metrics["classification"]
    lines.append(f"{'classes alone':<28}{100 * found['top1_error']:>9.2f}{100 * found['top5_error']:>10.2f}")
    return "\n".join(lines)
