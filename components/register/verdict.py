"""The gate's verdict as files: gate.json for programs, gate.md for people.  Every rule, its number, its limit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtime import manifest
from vgg.evaluation.gate import Contender, Verdict

FILES = ("gate.json", "gate.md")


def write(folder: Path, model: str, verdict: Verdict, challenger: Contender, champion: Contender | None) -> list[Path]:
    """Write both files; returns their paths.  model: name of the registered model."""
    text = as_markdown(model, verdict, champion)
    json_path, text_path = (folder / name for name in FILES)
    manifest.write_json(json_path, as_json(model, verdict, challenger, champion))
    manifest.write_atomically(text_path, lambda file: file.write(text.encode()))
    return [json_path, text_path]


def as_json(model: str, verdict: Verdict, challenger: Contender, champion: Contender | None) -> dict[str, Any]:
    return {
        "model_name": model,
        "registrable": verdict.registrable,
        "passed": verdict.passed,
        "champion_moves": verdict.promoted,
        "challenger": _contender(challenger),
        "champion": _contender(champion) if champion else None,
        "rules": [asdict(rule) for rule in verdict.rules],
    }


def _contender(contender: Contender) -> dict[str, Any]:
    names = ("top1_error", "top5_error", "num_images", "data_digest")
    errors = {name: contender.errors[name] for name in names}
    shown = {name: str(value) if value != value else value for name, value in errors.items()}  # JSON has no NaN
    return {"name": contender.name, "weights_sha256": contender.weights_sha256, **shown}


def as_markdown(model: str, verdict: Verdict, champion: Contender | None) -> str:
    """A heading with the outcome, a table of the rules, and what would have passed."""
    rows = [
        f"| {rule.name} | {rule.kind} | {_cell(rule.value)} | {_cell(rule.limit)} | "
        f"{'yes' if rule.passed else 'no' if rule.kind != 'order' else 'stays challenger'} | {_cell(rule.text)} |"
        for rule in verdict.rules
    ]
    lines = [
        f"# {model}: {outcome(verdict)}",
        "",
        f"Compared with: {champion.name if champion else 'no champion'}.",
        "",
    ]
    lines += ["| rule | kind | value | limit | passed | in words |", "|---|---|---|---|---|---|", *rows]
    if missing := [rule for rule in verdict.rules if not rule.passed]:
        lines += ["", "What would have passed:", "", *(f"* {rule.name}: {rule.remedy}" for rule in missing)]
    return "\n".join(lines) + "\n"


def outcome(verdict: Verdict) -> str:
    """The verdict in a few words."""
    if not verdict.registrable:
        return "gate failed; no version"
    if not verdict.passed:
        return "gate failed; challenger only"
    return "gate passed" if verdict.promoted else "gate passed; the champion is better and stays"


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
