"""Parameters of registration: the gate a model passes before anyone may call it champion."""

from __future__ import annotations

from pydantic import Field

from vgg.params import Section


class Gate(Section):
    max_top1_error: float = Field(ge=0, le=1, description="headline top-1 error (fraction) at most")
    max_top5_error: float = Field(ge=0, le=1, description="headline top-5 error (fraction) at most")
    max_regression: float = Field(ge=0, le=1, description="top-1 error (fraction) it may have above the champion's")


class RegisterParams(Section):
    model_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="name in the MLflow registry")
    gate: Gate = Field(description="what a version must pass to be made, and to become champion")
