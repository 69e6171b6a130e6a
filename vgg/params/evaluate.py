"""Parameters of evaluation.  Section numbers are those of arXiv 1409.1556."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from vgg.params import Section


class EvaluateParams(Section):
    weights: Literal["last", "best"] = Field(
        description="of training: the last step's, or those of its best validation"
    )
    test_scales: list[Annotated[int, Field(ge=32, le=4096)]] = Field(
        min_length=1, description="Q, short sides of the test images, pixels (§3.2); all of them are averaged"
    )
    flip: bool = Field(description="average the posteriors of the image and its mirror image (§3.2); paper: true")
    softmax: Literal["after_mean", "per_position"] = Field(
        description="dense: softmax of the scores averaged over positions (§3.2), or average of softmaxes at positions"
    )
    ceil_pooling: bool = Field(description="round the size of pooled maps up in the dense net, as Caffe did")
    batch_pixels: int = Field(
        ge=1, description="pixels of images that are evaluated together (memory, never the result)"
    )

    @field_validator("test_scales")
    @classmethod
    def _different(cls, scales: list[int]) -> list[int]:
        if len(set(scales)) < len(scales):
            raise ValueError("a scale stands twice; it would count twice")
        return scales
