"""Parameters of evaluation.  Section numbers are those of arXiv 1409.1556."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from vgg.params import Section

Method = Literal["centre_crop", "dense", "multi_crop"]


class EvaluateParams(Section):
    weights: Literal["last", "best"] = Field(description="weights of the last training step, or of the best validation")
    methods: list[Method] = Field(
        min_length=1,
        description="centre_crop: one crop, as most publications evaluate; dense: the whole image (§3.2); "
        "multi_crop: a grid of 5 x 5 crops (§3.2). dense and multi_crop together are also averaged (§4.3)",
    )
    test_scales: list[Annotated[int, Field(ge=32, le=4096)]] = Field(
        min_length=1, description="Q, short sides of the test images, pixels (§3.2); results are averaged over them"
    )
    flip: bool = Field(
        description="dense and multi_crop: average with the mirror image (§3.2); paper: true. A centre crop is one crop"
    )
    average: Literal["posteriors", "scores"] = Field(
        description="over mirror images, crops, scales and methods: of the posteriors (§3.2, §4.2), or of the class "
        "scores before the softmax"
    )
    softmax: Literal["after_mean", "per_position"] = Field(
        description="dense: softmax of the scores averaged over positions (§3.2), or mean of the softmax per position"
    )
    filter: Literal["bilinear", "bicubic"] = Field(
        description="resizes the images, antialiased; the paper does not state it"
    )
    ceil_pooling: bool = Field(description="round the size of pooled maps up in the dense network, as Caffe did")
    fuse: list[str] = Field(
        description="outputs of other evaluations of the same images, averaged with this one (§4.4): folders or "
        "s3:// addresses; [] for none"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        description="precision of convolutions and matrix products; auto: bf16 if the hardware supports it, else fp32"
    )
    batch_pixels: int = Field(
        ge=1, description="pixels of the images evaluated together (affects memory, not the result)"
    )

    @field_validator("test_scales", "methods")
    @classmethod
    def _unique(cls, values: list[object]) -> list[object]:
        if len(set(values)) < len(values):
            raise ValueError(f"duplicate in {values}")
        return values

    @model_validator(mode="after")
    def _scores_are_averaged_before_the_softmax(self) -> EvaluateParams:
        if self.average == "scores" and self.softmax == "per_position":
            raise ValueError("average: scores has no softmax per position; set softmax: after_mean")
        return self


def at_one_scale(scale: int, flip: bool) -> EvaluateParams:
    """The paper's test at a single scale (§4.1): dense.  scale: Q, pixels."""
    return EvaluateParams(
        weights="last", methods=["dense"], test_scales=[scale], flip=flip, average="posteriors", softmax="after_mean",
        filter="bilinear", ceil_pooling=False, fuse=[], precision="auto", batch_pixels=1_000_000,
    )  # fmt: skip
