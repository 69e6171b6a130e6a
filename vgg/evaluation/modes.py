"""The modes of an evaluation: by which crops, at which scales, and what is averaged (§3.2, §4).

The results of an image at one scale by one method are a Base; a Mode is the average of one or more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vgg.params.evaluate import EvaluateParams, Method

GRID = 5  # crops a side of the multi-crop evaluation
SENTENCES = {
    "centre_crop": "one crop of the network's input size from the centre",
    "dense": "the whole image, scores averaged over all positions",
    "multi_crop": f"a regular grid of {GRID} x {GRID} crops, posteriors averaged",
    "multi_crop_and_dense": "the average of the multi-crop and the dense evaluation",
    "fusion": "the average of several networks",
}


def mirrored(method: str, flip: bool) -> bool:
    """Whether results are averaged with those of the mirror images.  flip: of the parameters."""
    return flip and method != "centre_crop"


@dataclass(frozen=True)
class Base:
    """One method at one scale."""

    method: Method
    scale: int


@dataclass(frozen=True)
class Mode:
    """A result of an evaluation.  bases: averaged, those of equal methods first."""

    method: str
    scales: tuple[int, ...]
    mirror: bool
    bases: tuple[Base, ...]

    @property
    def name(self) -> str:
        if self.method == "fusion":
            return self.method
        return f"{self.method}_Q{'-'.join(map(str, self.scales))}{'_flip' if self.mirror else ''}"

    def protocol(self) -> dict[str, Any]:
        """As recorded with the metrics."""
        return {"method": self.method, "scales": list(self.scales), "mirror": self.mirror}


def sentence(protocol: dict[str, Any]) -> str:
    """What a mode is, for a report.  protocol: of a Mode."""
    text = SENTENCES[protocol["method"]]
    if len(protocol["scales"]) > 1:
        text += f", averaged over Q = {', '.join(map(str, protocol['scales']))}"
    elif protocol["scales"]:
        text += f", Q = {protocol['scales'][0]}"
    return text + (", each with its mirror image" if protocol["mirror"] else "")


def bases_of(params: EvaluateParams) -> list[Base]:
    """Everything that is computed, of every image."""
    return [Base(method, scale) for method in _ordered(params.methods) for scale in sorted(params.test_scales)]


def modes_of(params: EvaluateParams) -> list[Mode]:
    """The modes of these parameters; the last one is the headline."""
    scales, modes = sorted(params.test_scales), []
    methods = _ordered(params.methods)
    for method in methods:
        mirror = mirrored(method, params.flip)
        modes += [Mode(method, (scale,), mirror, (Base(method, scale),)) for scale in scales]
        if len(scales) > 1 and method != "centre_crop":
            modes.append(Mode(method, tuple(scales), mirror, tuple(Base(method, scale) for scale in scales)))
    if {"dense", "multi_crop"} <= set(methods):
        bases = tuple(Base(method, scale) for method in methods if method != "centre_crop" for scale in scales)
        modes.append(Mode("multi_crop_and_dense", tuple(scales), params.flip, bases))
    return modes


def _ordered(methods: Sequence[Method]) -> list[Method]:
    order: tuple[Method, ...] = ("centre_crop", "dense", "multi_crop")
    return [method for method in order if method in methods]
