"""The table of a proof: on the terminal, as Markdown, and as JUnit XML."""

from __future__ import annotations

import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field

from runtime.wording import counted

OK, FAILED, NOT_TRIED = "ok", "failed", "not tried"
WIDTHS = (9, 16, 40, 64)  # of the columns of the table on a terminal: state, check, expected, seen
TITLES = ("state", "check", "expected", "seen", "seconds")


@dataclass(frozen=True)
class Row:
    """What came of one check.  seen: also the reason of a failure, or why it was not tried."""

    check: str
    expected: str
    state: str
    seen: str
    seconds: float


@dataclass
class Report:
    """about: facts about the cluster, in words.  left: what was made and is still there."""

    name: str
    about: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def count(self, state: str) -> int:
        return sum(row.state == state for row in self.rows)

    def summary(self) -> str:
        parts = ", ".join(f"{self.count(state)} {state}" for state in (OK, FAILED, NOT_TRIED))
        return f"{self.name}: {counted(len(self.rows), 'check')}: {parts}"

    def text(self) -> str:
        lines = [_line([[one] for one in TITLES])]
        for row in self.rows:
            cells = (row.state, row.check, row.expected, row.seen)
            wrapped = [_wrapped(cell, width) for cell, width in zip(cells, WIDTHS, strict=True)]
            lines.append(_line([*wrapped, [f"{row.seconds:7.0f}"]]))
        return "\n".join([*lines, self.summary(), *(f"left behind: {one}" for one in self.left)])

    def markdown(self) -> str:
        lines = [f"# {self.name}", "", *(f"* {what}: {value}" for what, value in self.about.items()), ""]
        lines += [f"| {' | '.join(TITLES)} |", f"|{'---|' * len(TITLES)}"]
        for row in self.rows:
            cells = (row.state, row.check, row.expected, row.seen, f"{row.seconds:.0f}")
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        lines += ["", self.summary(), *(f"* left behind: {_cell(one)}" for one in self.left)]
        return "\n".join(lines) + "\n"

    def junit(self) -> bytes:
        """A test case for every row."""
        suite = ElementTree.Element(
            "testsuite", name=self.name, tests=str(len(self.rows)), failures=str(self.count(FAILED)), errors="0",
            skipped=str(self.count(NOT_TRIED)), time=f"{sum(row.seconds for row in self.rows):.1f}",
        )  # fmt: skip
        properties = ElementTree.SubElement(suite, "properties")
        for what, value in self.about.items():
            ElementTree.SubElement(properties, "property", name=what, value=_printable(value))
        for row in self.rows:
            case = ElementTree.SubElement(
                suite, "testcase", classname="pipelines.prove", name=row.check, time=f"{row.seconds:.1f}"
            )
            seen = _printable(row.seen)
            if row.state == OK:
                ElementTree.SubElement(case, "system-out").text = seen
            else:
                kind = "failure" if row.state == FAILED else "skipped"
                ElementTree.SubElement(case, kind, message=seen[:200]).text = f"expected: {row.expected}\nseen: {seen}"
        if self.left:
            ElementTree.SubElement(suite, "system-out").text = _printable("left behind:\n" + "\n".join(self.left))
        ElementTree.indent(suite)
        return bytes(ElementTree.tostring(suite, "utf-8", xml_declaration=True)) + b"\n"


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() or [""] for part in textwrap.wrap(line, width) or [""]]


def _line(columns: Sequence[Sequence[str]]) -> str:
    """A row of the table, as high as its highest cell."""
    lines = []
    for number in range(max(map(len, columns))):
        cells = [column[number] if number < len(column) else "" for column in columns]
        padded = [cell.ljust(width) for cell, width in zip(cells[:-1], WIDTHS, strict=True)]
        lines.append("  ".join([*padded, cells[-1]]).rstrip())
    return "\n".join(lines)


def _cell(text: str) -> str:
    """In a cell of a Markdown table."""
    return "<br>".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").splitlines())


def _printable(text: str) -> str:
    """Without the characters that XML cannot hold, such as colours in a log."""
    return "".join(char for char in text if char in "\n\t" or char.isprintable())
