"""Drawings of the report as SVG inside HTML: curves and bars, with text that can be read and selected."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 480, 240  # of a drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 34  # margins
COLOURS = ("#1f6feb", "#bc4c00", "#1a7f37", "#8250df")


class Axes:
    """A frame with ticks.  x, y: (lowest, highest) value.  labels: below whole numbers of x, instead of ticks."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], x_name: str, y_name: str, labels: Sequence[str] = ()
    ) -> None:
        self.x, self.y = (widened(*x), widened(*y))
        self.parts = [
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>',
            f'<text x="12" y="{(TOP + HEIGHT - BOTTOM) / 2}" text-anchor="middle" '
            f'transform="rotate(-90 12 {(TOP + HEIGHT - BOTTOM) / 2})">{escape(y_name)}</text>',
        ]
        places = dict(enumerate(labels)) if labels else {value: f"{value:g}" for value in ticks(*self.x)}
        for value, label in places.items():
            self.parts.append(
                f'<text x="{self.across(value):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{escape(label)}'
                "</text>"
            )
        for value in ticks(*self.y):
            down = self.down(value)
            self.parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
            self.parts.append(f'<text x="{LEFT - 5}" y="{down + 3.5:.1f}" text-anchor="end">{value:g}</text>')

    def across(self, value: float) -> float:
        return LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def down(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)

    def svg(self, description: str) -> str:
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">'
            f"{''.join(self.parts)}</svg>"
        )


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str) -> str:
    """Lines by name, with a legend.  Values that are not finite are left out."""
    finite = {name: [p for p in line if all(map(math.isfinite, p))] for name, line in lines.items()}
    points = [point for line in finite.values() for point in line]
    if not points:
        return ""
    xs, ys = zip(*points, strict=True)
    axes = Axes((min(xs), max(xs)), (min(0.0, *ys), max(ys)), x_name, y_name)
    for line, colour in zip(finite.values(), COLOURS, strict=False):
        path = " ".join(f"{axes.across(x):.1f},{axes.down(y):.1f}" for x, y in line)
        axes.parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
    return _figure(axes, f"{y_name} by {x_name}", lines)


def _figure(axes: Axes, description: str, names: Iterable[str]) -> str:
    """With a legend: a colour for every name, in their order."""
    legend = [
        f'<span style="color:{colour}">■</span> {escape(name)}' for name, colour in zip(names, COLOURS, strict=False)
    ]
    return f"<figure>{axes.svg(description)}<figcaption>{' &ensp; '.join(legend)}</figcaption></figure>"


class Bar(NamedTuple):
    """low, high: ends of its interval of confidence, NaN without one.  title: what one reads over it."""

    value: float
    low: float
    high: float
    title: str


def bars(
    groups: Mapping[str, Sequence[Bar]], labels: Sequence[str], x_name: str, y_name: str, top: float | None = None
) -> str:
    """Bars side by side, a colour for every name of groups.  labels: of the places.  top: highest value of the axis."""
    highest = max(max(bar.value, bar.high if math.isfinite(bar.high) else 0) for row in groups.values() for bar in row)
    axes = Axes((-0.5, len(labels) - 0.5), (0, top or highest or 1), x_name, y_name, labels)
    width = 0.8 / len(groups)
    for number, (row, colour) in enumerate(zip(groups.values(), COLOURS, strict=False)):
        for place, bar in enumerate(row):
            left, right = (axes.across(place - 0.4 + width * (number + end)) for end in (0, 1))
            axes.parts.append(
                f'<rect x="{left:.1f}" y="{axes.down(bar.value):.1f}" width="{right - left - 1:.1f}" '
                f'height="{axes.down(0) - axes.down(bar.value):.1f}" fill="{colour}" fill-opacity="0.75">'
                f"<title>{escape(bar.title)}</title></rect>"
            )
            if math.isfinite(bar.low):
                middle = (left + right - 1) / 2
                axes.parts.append(
                    f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{axes.down(bar.low):.1f}" '
                    f'y2="{axes.down(bar.high):.1f}" stroke="#1b1f24"/>'
                )
    return _figure(axes, f"{y_name} by {x_name}", groups)


def reliability(bins: Sequence[tuple[int, float, float]]) -> str:
    """Accuracy by confidence, as bars beside the diagonal.  bins: of vgg.evaluation.predictions.calibration."""
    axes = Axes((0, 1), (0, 1), "confidence", "accuracy")
    width = 1 / len(bins)
    total = max(1, sum(count for count, _, _ in bins))
    for number, (count, _, accuracy) in enumerate(bins):
        if count:
            left, right = axes.across(number * width), axes.across((number + 1) * width)
            axes.parts.append(
                f'<rect x="{left + 1:.1f}" y="{axes.down(accuracy):.1f}" width="{right - left - 2:.1f}" '
                f'height="{axes.down(0) - axes.down(accuracy):.1f}" fill="{COLOURS[0]}" '
                f'fill-opacity="{0.25 + 0.75 * count / total:.2f}"><title>{count:,} images, accuracy '
                f"{100 * accuracy:.1f} %</title></rect>"
            )
    axes.parts.append(
        f'<line x1="{axes.across(0)}" y1="{axes.down(0)}" x2="{axes.across(1)}" y2="{axes.down(1)}" class="diagonal"/>'
    )
    return (
        f"<figure>{axes.svg('accuracy by confidence')}<figcaption>darker: more images; on the line, a network is as "
        "often right as it is sure</figcaption></figure>"
    )


def widened(low: float, high: float) -> tuple[float, float]:
    """The interval, not empty."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def ticks(low: float, high: float) -> list[float]:
    """About five round values in the interval."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]
