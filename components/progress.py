"""Progress of a stage: a live bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

INTERVAL_SECONDS = 10.0


class Progress:
    """Call it with (done, total); figures() adds further values.

    unit: name of what is counted, for the rate.  scale: units per step of `done`.  warm: measure the rate from the
    first call on, which leaves out start-up and the work of earlier attempts.
    """

    def __init__(self, title: str, unit: str = "images", scale: float = 1.0, warm: bool = False) -> None:
        self.title, self.unit, self.scale = title, unit, scale
        self.started = self.printed = time.monotonic()
        self.first: float | None = None if warm else 0.0
        self.text = ""
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            self._bar = Bar(
                *columns, TimeRemainingColumn(), TextColumn("{task.fields[text]}"), console=Console(stderr=True)
            )
            self._task = self._bar.add_task(title, total=None, text="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def figures(self, **values: float) -> None:
        """loss=0.3, error=0.01 and similar values, shown next to the bar."""
        self.text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())

    def __call__(self, done: float, total: float) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.started = done, now
        rate = (done - self.first) * self.scale / max(now - self.started, 1e-9)
        text = f"{rate:,.0f} {self.unit}/s  {self.text}"
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, text=text)
        elif now - self.printed >= INTERVAL_SECONDS:
            self.printed = now
            left = (total - done) * self.scale / rate if rate else 0.0
            print(f"{self.title}: {done:,.0f} of {total:,.0f}  {text}  {left:,.0f} s left", file=sys.stderr, flush=True)
