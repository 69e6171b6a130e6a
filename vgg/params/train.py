"""Parameters of training.  Section numbers are those of arXiv 1409.1556."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from runtime.wording import counted
from vgg.params import Section


class Plateau(Section):
    """Divide the learning rate by drop_factor when validation stops improving (§3.1); stop after max_drops."""

    rule: Literal["plateau"] = Field(description="plateau: drop when validation stops improving (§3.1)")
    warmup_epochs: float = Field(
        ge=0, description="epochs over which the learning rate rises linearly from 0; paper: 0"
    )
    drop_factor: float = Field(gt=1, description="divisor of the learning rate at a drop; paper: 10")
    patience: int = Field(ge=1, description="epochs without improvement before a drop; not stated in the paper")
    min_improvement: float = Field(
        ge=0, lt=1, description="decrease of top1_error (fraction) that counts as improvement"
    )
    max_drops: int = Field(ge=0, description="drops before training stops; paper: 3")


class Steps(Section):
    """Divide the learning rate by drop_factor at fixed epochs."""

    rule: Literal["steps"] = Field(description="steps: drop at fixed epochs")
    warmup_epochs: float = Field(ge=0, description="epochs over which the learning rate rises linearly from 0")
    drop_factor: float = Field(gt=1, description="divisor of the learning rate at a drop")
    drop_epochs: list[Annotated[float, Field(gt=0)]] = Field(
        description="epochs after which the learning rate drops, ascending"
    )

    @field_validator("drop_epochs")
    @classmethod
    def _ascending(cls, epochs: list[float]) -> list[float]:
        if sorted(set(epochs)) != epochs:
            raise ValueError(f"must be ascending, not {epochs}")
        return epochs


class TrainParams(Section):
    configuration: Literal["A", "A-LRN", "B", "C", "D", "E"] = Field(description="column of Table 1; D is VGG-16")
    batch_norm: bool = Field(description="batch normalisation after every convolution; paper: none")
    classifier_width: int = Field(ge=1, le=65_536, description="outputs of fc6 and fc7; paper: 4096")
    input_size: int = Field(ge=32, le=1024, multiple_of=32, description="side of the training crop, pixels; paper: 224")
    init: Literal["glorot", "kaiming", "normal", "shallower", "checkpoint"] = Field(
        description="initial weights: Glorot & Bengio, Kaiming He, N(0, 0.01), four convolutions and the classifier of "
        "a shallower network (§3.1), or all of the same network at another scale (§3.1, S=384); the last two read "
        "--initial"
    )
    crop: Literal["scale", "area"] = Field(
        description="training crop: input_size from the image rescaled to train_scale (paper, §3.1), or 8 to 100 % of "
        "its area at a ratio of 3/4 to 4/3, resized (torchvision's RandomResizedCrop; then only validation uses "
        "train_scale)"
    )
    train_scale: (
        Annotated[int, Field(ge=32, le=4096)]
        | Annotated[list[Annotated[int, Field(ge=32, le=4096)]], Field(min_length=2, max_length=2)]
    ) = Field(
        description="S, short side after rescaling, pixels: a number, or [Smin, Smax], drawn for each image (§3.1)"
    )
    decoder: Literal["cpu", "device"] = Field(
        description="JPEG decoder: processes on the CPU, or the GPU that trains (its engines; pixels differ slightly)"
    )
    flip: bool = Field(description="mirror half of the crops; paper: true")
    colour_shift: float = Field(ge=0, le=1, description="std of the RGB shift's alpha (AlexNet §4.1); paper: 0.1")
    standardise: bool = Field(
        description="divide by the training set's standard deviation after subtracting its mean; paper: false"
    )
    dropout: float = Field(ge=0, lt=1, description="probability of dropping an output of fc6 and fc7; paper: 0.5")
    epochs: Annotated[int, Field(ge=1, le=10_000)] = Field(
        description="maximum passes over the training set; paper: 74"
    )
    batch_size: int = Field(ge=1, le=1_048_576, description="global batch, images per step over all ranks; paper: 256")
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=1_048_576)] = Field(
        description="maximum images that a rank computes at once (memory; results change only by rounding, and by the "
        "statistics of batch norm); auto: the rank's whole share, halved until it fits into the device"
    )
    gradient_compression: Literal["none", "bf16"] = Field(
        description="compression of gradients sent between ranks; bf16: half the bytes, for links slower than NVLink"
    )
    learning_rate: float = Field(gt=0, le=100, description="initial learning rate of SGD; paper: 0.01")
    momentum: float = Field(ge=0, lt=1, description="momentum of SGD; paper: 0.9")
    weight_decay: float = Field(ge=0, lt=1, description="L2 multiplier added to the gradient; paper: 0.0005")
    schedule: Annotated[Plateau | Steps, Field(discriminator="rule")] = Field(
        description="schedule of the learning rate"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        description="precision of convolutions and matrix products; auto: bf16 if the hardware supports it, else fp32"
    )
    deterministic: bool = Field(description="bit-identical runs on a GPU too, at lower speed (on a CPU always)")
    seed: int = Field(
        ge=0, lt=2**32, description="seed of initial weights, order, crops, flips, colour shift and dropout"
    )
    checkpoint_steps: int = Field(ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(
        ge=2, le=1000, description="newest checkpoints kept during training; the best is kept too"
    )

    @field_validator("train_scale")  # not of the model: reported together with mistakes in other fields
    @classmethod
    def _valid_scale(cls, scale: int | list[int], info: ValidationInfo) -> int | list[int]:
        smallest, largest = (scale, scale) if isinstance(scale, int) else scale
        input_size = info.data.get("input_size", 0)  # missing if invalid itself
        mistakes = [
            (smallest > largest, f"Smin {smallest} is above Smax {largest}"),
            (min(smallest, largest) < input_size, f"{min(smallest, largest)} is below input_size {input_size}"),
            (
                info.data.get("crop") == "area" and isinstance(scale, list),
                "with crop 'area' it is only the scale of validation: must be one number",
            ),
        ]
        if found := [message for wrong, message in mistakes if wrong]:
            raise ValueError("; ".join(found))
        return scale

    def without_effect(self) -> Iterator[str]:
        rule, training = self.schedule, f"training ends after {counted(self.epochs, 'epoch')}"
        if rule.warmup_epochs >= self.epochs:
            yield f"schedule.warmup_epochs: {rule.warmup_epochs:g}: {training}, so the rate never reaches learning_rate"
        if isinstance(rule, Steps):
            late = ", ".join(f"{epoch:g}" for epoch in rule.drop_epochs if epoch >= self.epochs)
            if late:
                yield f"schedule.drop_epochs: {late} without effect: {training}"

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
