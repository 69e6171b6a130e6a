"""Parameters of evaluation.  Section numbers are those of arXiv 1409.1556."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from vgg.params import Section


class EvaluateParams(Section):
    weights: Literal["last", "best"] = Field(description="weights of the last training step, or of the best validation")
    test_scales: list[Annotated[int, Field(ge=32, le=4096)]] = Field(
        min_length=1, description="Q, short sides of the test images, pixels (§3.2); results are averaged over them"
    )
    flip: bool = Field(description="average the posteriors of the image and its mirror image (§3.2); paper: true")
    softmax: Literal["after_mean", "per_position"] = Field(
        description="dense: softmax of the scores averaged over positions (§3.2), or mean of the softmax per position"
    )
    ceil_pooling: bool = Field(description="round the size of pooled maps up in the dense network, as Caffe did")
    batch_pixels: int = Field(
        ge=1, description="pixels of the images evaluated together (affects memory, not the result)"
    )

    @field_validator("test_scales")
    @classmethod
    def _unique(cls, scales: list[int]) -> list[int]:
        if len(set(scales)) < len(scales):
            raise ValueError(f"duplicate scale in {scales}")
        return scales
