"""The numbers of a localisation as tables: text for the terminal, Markdown for MLflow."""

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


def markdown(metrics: dict[str, Any]) -> str:
    """The result and the errors of every kind of box."""
    headline = (
        f"{100 * metrics['top5_localisation_error']:.2f} % top-5 localisation error, "
        f"{100 * metrics['class_given_error']:.2f} % with the class given, on {metrics['num_images']:,} validation "
        f"images of {metrics['dataset']}"
    )
    rows = [
        f"| {mode.replace('_', ' ')} | {100 * found['error']:.2f} | {found['mean_iou']:.3f} | {_guesses(mode, metrics)}"
        for mode, found in metrics["class_given"].items()
    ]
    rows += [
        f"| {name.replace('_', ' ')} (nothing learnt) | {100 * error:.2f} | | | |"
        for name, error in metrics["floors"].items()
    ]
    head = ["| box | error, class given, % | mean IoU | top-1 error % | top-5 error % |", "|---|---|---|---|---|"]
    return "\n".join([f"**{headline}**", "", *head, *rows]) + "\n"


def _guesses(mode: str, metrics: dict[str, Any]) -> str:
    """The last cells of a row; the central crop makes no guesses of classes."""
    found = metrics["localisation"].get(mode)
    return f"{100 * found['top1_error']:.2f} | {100 * found['top5_error']:.2f} |" if found else "| |"


def errors(metrics: dict[str, Any]) -> dict[str, float]:
    """Every error as a fraction, named by kind of box for MLflow."""
    given = {f"{mode}/class_given_error": found["error"] for mode, found in metrics["class_given"].items()}
    floors = {f"{name}/class_given_error": error for name, error in metrics["floors"].items()}
    guesses = {
        f"{mode}/{name}": found[name]
        for mode, found in metrics["localisation"].items()
        for name in ("top1_error", "top5_error")
    }
    return {**given, **floors, **guesses}
