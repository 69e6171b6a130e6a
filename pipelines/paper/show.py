"""A table as text, Markdown or JSON."""

from __future__ import annotations

from typing import Any

from components.evaluate.published import shown_scale
from pipelines.paper.table import Row, Table, shown_members
from runtime.wording import some

INTERVAL = "95 %"  # of evaluate.json
ERRORS = ("top1_error", "top5_error")


def text(table: Table) -> str:
    """Aligned columns."""
    heads, body = _cells(table)
    widths = [max(len(line[i]) for line in [heads, *body]) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [heads, *body]]
    return "\n".join([table.title, "", *(line.rstrip() for line in lines), "", *_notes(table)])


def markdown(table: Table) -> str:
    heads, body = _cells(table)
    lines = [f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *body]]
    return "\n".join([f"**{table.title}**", "", *lines, "", *(f"{note}  " for note in _notes(table))]).rstrip()


def as_json(table: Table) -> dict[str, Any]:
    """Errors of ours are fractions, as in evaluate.json; those of the paper are % as printed."""
    return {
        "table": table.number,
        "title": table.title,
        "dataset": table.dataset,
        "data_digest": table.data_digest,
        "num_images": table.num_images,
        "comparable": table.comparable,
        "rows": [_json_row(row, table) for row in table.rows],
        "missing": table.missing,
        "unused": list(table.unused),
    }


def _json_row(row: Row, table: Table) -> dict[str, Any]:
    key, count = row.key, len(row.results)
    scale = list(key.train_scale) if isinstance(key.train_scale, tuple) else key.train_scale
    shown: dict[str, Any] = {
        "configuration": key.configuration, "train_scale": scale, "test_scales": list(key.test_scales),
        "method": key.method, "mirror": key.mirror, "source": "imported" if key.imported else "trained",
        "members": [[name, list(s) if isinstance(s, tuple) else s] for name, s in key.members],
        "num_seeds": count, "runs": list(row.paths),
    }  # fmt: skip
    for name in ERRORS:
        values = [result[name] for result in row.results]
        one = row.results[0][name.replace("_error", "_interval")] if count == 1 else None
        shown[name] = (
            {"mean": sum(values) / count, "range": [min(values), max(values)], "interval": one} if count else None
        )
    if table.comparable:
        shown["paper"] = dict(zip(ERRORS, row.paper, strict=True)) if row.paper else None
    return shown


def _cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows.  The paper's columns are there only if its numbers are of the same images."""
    fusion, methods = table.number == 6, table.number >= 5
    heads = ["networks"] if fusion else ["net", "S", "Q"]
    heads += ["method"] * methods + ["seeds", "top-1 %", "top-5 %"]
    heads += ["paper top-1", "paper top-5"] * table.comparable
    body = []
    for row in table.rows:
        key = row.key
        remarks = ["imported"] * key.imported + ["not mirrored"] * (not key.mirror and table.comparable)
        name = shown_members(key.members) if fusion else key.configuration
        line = [f"{name} ({', '.join(remarks)})" if remarks else name]
        line += [] if fusion else [shown_scale(key.train_scale), ",".join(map(str, key.test_scales))]
        line += [key.method.replace("_", " ")] * methods
        line += [str(len(row.results) or ""), *(_error(row, error) for error in ERRORS)]
        if table.comparable:
            line += [f"{value:.1f}" for value in row.paper] if row.paper else ["", ""]
        body.append(line)
    return heads, body


def _error(row: Row, name: str) -> str:
    """25.61 [25.23, 26.00] of one network; 25.61 (25.40–25.80) of several; empty if there is none."""
    values = [100 * result[name] for result in row.results]
    if not values:
        return ""
    if len(values) == 1:
        low, high = row.results[0][name.replace("_error", "_interval")]
        return f"{values[0]:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
    return f"{sum(values) / len(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def _notes(table: Table) -> list[str]:
    counts = {len(row.results) for row in table.rows}
    notes = [f"[low, high]: {INTERVAL} interval of one network"] * (1 in counts)
    notes += ["(smallest–largest): of several seeds, with their mean"] * bool(counts - {0, 1})
    if not table.comparable:
        notes.append("other images than the paper's: its numbers do not compare")
    if table.missing:
        notes.append(f"missing: {' · '.join(table.missing)}")
    if table.unused:
        notes.append(f"not in this table: {some(table.unused)}")
    return notes
