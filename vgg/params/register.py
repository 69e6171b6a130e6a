"""Parameters of registration: the gate that a model must pass to become the champion."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vgg.params import Section


class Gate(Section):
    max_top1_error: float = Field(ge=0, le=1, description="maximum headline top-1 error (fraction)")
    max_top5_error: float = Field(ge=0, le=1, description="maximum headline top-5 error (fraction)")
    max_regression: float = Field(
        ge=0, le=1, description="maximum top-1 error (fraction) above the champion's, at the upper confidence bound"
    )
    confidence: float = Field(
        ge=0.5, lt=1, description="of that one-sided bound; 0.5 compares the measured errors as they are"
    )
    incomparable_champion: Literal["refuse", "reevaluate"] = Field(
        description="if the champion has no predictions for these images: refuse the model, or evaluate the champion "
        "on them, with its own parameters (takes as long as the evaluate stage)"
    )


class RegisterParams(Section):
    model_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="name in the MLflow registry")
    exports: list[Literal["pt2", "onnx"]] = Field(
        description="graphs beside the weights, which they share: model.pt2 (torch.export), model.onnx; [] for none"
    )
    gate: Gate = Field(description="conditions for registering a version and making it the champion")
