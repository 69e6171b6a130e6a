"""Parameters of registration: the gate that a model must pass to be registered."""

from __future__ import annotations

from pydantic import Field

from vgg.params import Section


class Gate(Section):
    max_top1_error: float = Field(ge=0, le=1, description="maximum headline top-1 error (fraction)")
    max_top5_error: float = Field(ge=0, le=1, description="maximum headline top-5 error (fraction)")
    max_regression: float = Field(ge=0, le=1, description="maximum top-1 error (fraction) above that of the champion")


class RegisterParams(Section):
    model_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="name in the MLflow registry")
    gate: Gate = Field(description="conditions for registering a version and making it the champion")
