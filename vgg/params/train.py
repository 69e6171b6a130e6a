"""Parameters of training.  Section numbers are those of arXiv 1409.1556."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vgg.params import Section


class Plateau(Section):
    """Divide the rate by drop_factor when validation stops improving (§3.1); end after max_drops of them."""

    rule: Literal["plateau"]
    warmup_epochs: float = Field(ge=0, description="epochs over which the rate rises linearly from 0; paper: 0")
    drop_factor: float = Field(gt=1, description="what the rate is divided by; paper: 10")
    patience: int = Field(ge=1, description="epochs without improvement before a drop; not stated in the paper")
    min_improvement: float = Field(ge=0, lt=1, description="fall of top1_error (fraction) that counts as improvement")
    max_drops: int = Field(ge=0, description="drops before training ends; paper: 3")


class Steps(Section):
    """Divide the rate by drop_factor at fixed epochs."""

    rule: Literal["steps"]
    warmup_epochs: float = Field(ge=0, description="epochs over which the rate rises linearly from 0")
    drop_factor: float = Field(gt=1, description="what the rate is divided by")
    drop_epochs: list[Annotated[float, Field(gt=0)]] = Field(description="epochs at whose end the rate drops, rising")

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if sorted(set(self.drop_epochs)) != self.drop_epochs:
            raise ValueError("drop_epochs must rise")
        return self


class TrainParams(Section):
    configuration: Literal["A", "A-LRN", "B", "C", "D", "E"] = Field(description="column of Table 1; D is VGG-16")
    batch_norm: bool = Field(description="batch normalisation after every convolution; paper: none")
    classifier_width: int = Field(ge=1, le=65_536, description="outputs of fc6 and fc7; paper: 4096")
    input_size: int = Field(ge=32, le=1024, multiple_of=32, description="side of the training crop, pixels; paper: 224")
    init: Literal["glorot", "kaiming", "normal", "shallower", "checkpoint"] = Field(
        description="first weights: Glorot & Bengio, Kaiming He, N(0, 0.01), four convolutions and the classifier of a "
        "shallower net (§3.1), or all of the same net at another scale (§3.1, S=384); the last two read --initial"
    )
    crop: Literal["scale", "area"] = Field(
        description="of training: input_size out of the image rescaled to train_scale (paper, §3.1), or 8 to 100 % of "
        "its area at a ratio of 3/4 to 4/3, resized (torchvision's RandomResizedCrop; train_scale is validation's then)"
    )
    train_scale: (
        Annotated[int, Field(ge=32, le=4096)]
        | Annotated[list[Annotated[int, Field(ge=32, le=4096)]], Field(min_length=2, max_length=2)]
    ) = Field(
        description="S, short side after rescaling, pixels: a number, or [Smin, Smax] drawn for each image (§3.1)"
    )
    decoder: Literal["cpu", "device"] = Field(
        description="of JPEGs: processes on the CPU, or the GPU that trains (its engines; pixels differ a little)"
    )
    flip: bool = Field(description="mirror half of the crops; paper: true")
    colour_shift: float = Field(ge=0, le=1, description="deviation of the RGB shift's alpha (AlexNet §4.1); paper: 0.1")
    standardise: bool = Field(
        description="divide by the training set's deviation after subtracting its mean; paper: false"
    )
    dropout: float = Field(ge=0, lt=1, description="probability of dropping an output of fc6 and fc7; paper: 0.5")
    epochs: Annotated[int, Field(ge=1, le=10_000)] = Field(
        description="passes over the training set at most; paper: 74"
    )
    batch_size: int = Field(ge=1, le=1_048_576, description="global batch, images a step over all ranks; paper: 256")
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=1_048_576)] = Field(
        description="images that a rank computes at once, at most (memory; results change only in rounding, with batch "
        "norm in its statistics too); auto: its whole share, halved until it fits into the device"
    )
    gradient_compression: Literal["none", "bf16"] = Field(
        description="of what ranks send each other; bf16: half the bytes, for networks slower than NVLink"
    )
    learning_rate: float = Field(gt=0, le=100, description="first rate of SGD; paper: 0.01")
    momentum: float = Field(ge=0, lt=1, description="of SGD; paper: 0.9")
    weight_decay: float = Field(ge=0, lt=1, description="L2 multiplier added to the gradient; paper: 0.0005")
    schedule: Annotated[Plateau | Steps, Field(discriminator="rule")] = Field(description="how the rate falls")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        description="of convolutions and products; auto: bf16 where the hardware computes in it, else fp32"
    )
    deterministic: bool = Field(description="bit-identical runs on a GPU too, at a price in speed (a CPU always is)")
    seed: int = Field(ge=0, lt=2**32, description="of first weights, order, crops, flips, colour shift and dropout")
    checkpoint_steps: int = Field(ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(
        ge=2, le=1000, description="newest checkpoints kept while training; the best stays too"
    )

    @model_validator(mode="after")
    def _scale(self) -> Self:
        if isinstance(self.train_scale, list) and self.train_scale[0] > self.train_scale[1]:
            raise ValueError(f"train_scale: Smin {self.train_scale[0]} is above Smax {self.train_scale[1]}")
        if min(self.scale_range) < self.input_size:
            raise ValueError(f"train_scale: {min(self.scale_range)} is below input_size {self.input_size}")
        if self.crop == "area" and isinstance(self.train_scale, list):
            raise ValueError("train_scale: with crop 'area' it is the scale of validation alone: one number")
        return self

    @property
    def scale_range(self) -> tuple[int, int]:
        """(Smin, Smax), pixels."""
        if isinstance(self.train_scale, int):
            return self.train_scale, self.train_scale
        return self.train_scale[0], self.train_scale[1]

    @property
    def validation_scale(self) -> int:
        """Q of the validation during training: S, or 0.5 (Smin + Smax) for jitter (§4.1)."""
        return sum(self.scale_range) // 2
