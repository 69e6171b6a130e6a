"""Parameters of localisation.  Letters and section numbers are those of arXiv 1409.1556, appendix A."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from vgg.params import Section
from vgg.params.train import Plateau, Steps, TrainParams

# of trainings whose record is not known (imported weights): those of §3.1
PAPER = {
    "init": "checkpoint", "crop": "scale", "decoder": "cpu", "colour_shift": 0.1, "standardise": False,
    "micro_batch_size": "auto", "gradient_compression": "none", "momentum": 0.9, "weight_decay": 0.0005,
    "precision": "auto", "deterministic": False, "checkpoint_steps": 1000, "keep_checkpoints": 2,
}  # fmt: skip
OVERRIDDEN = ("dropout", "train_scale", "flip", "epochs", "batch_size", "learning_rate", "schedule", "seed")


class LocaliseParams(Section):
    pixel_origin: Literal[0, 1] = Field(description="coordinate of the first pixel in the annotations")
    on_box_mismatch: Literal["fail", "scale", "drop"] = Field(
        description="what to do with an annotation of another image size: end, scale its boxes, or leave them out"
    )
    regression: Literal["single", "per_class"] = Field(
        description="single: one box for all classes (SCR); per_class: one for each (PCR), the paper's better one"
    )
    trainable: Literal["first_last", "fc", "all"] = Field(
        description="layers that are trained: fc6 and the new last one, all fully connected ones, or all"
    )
    min_visible: float = Field(
        ge=0, le=1, description="crops that show less than this share of the box are not trained on; not in the paper"
    )
    instances: Literal["drawn", "largest"] = Field(
        description="what a crop is for if the image has several boxes: one drawn for each crop, or the largest; not "
        "in the paper"
    )
    dropout: float = Field(
        ge=0, lt=1, description="of fc6 and fc7; paper: 0.5 for classification, not stated here, where it blurs boxes"
    )
    train_scale: int = Field(ge=32, le=4096, description="S, short side after rescaling, pixels; paper: 256 or 384")
    flip: bool = Field(description="mirror half of the crops; paper: true")
    epochs: int = Field(ge=1, le=10_000, description="maximum passes over the images with boxes; paper: 74")
    batch_size: int = Field(ge=1, le=1_048_576, description="global batch, images per step over all ranks; paper: 256")
    learning_rate: float = Field(gt=0, le=100, description="initial learning rate of SGD; paper: 0.001")
    schedule: Annotated[Plateau | Steps, Field(discriminator="rule")] = Field(
        description="schedule of the learning rate, by box_error: IoU below 0.5 with the class given"
    )
    seed: int = Field(ge=0, lt=2**32, description="seed of the last layer, order, crops, flips, dropout, instances")
    test_scales: list[Annotated[int, Field(ge=32, le=4096)]] = Field(
        min_length=1, description="Q, short sides of the test images, pixels; boxes of all of them are merged"
    )
    match: Literal["centre_iou", "overfeat_literal"] = Field(
        description="what pairs of boxes are merged first: centre distance / root of the mean area + 1 - IoU, or "
        "OverFeat's words, centre distance + intersection"
    )
    merge_threshold: float = Field(ge=0, description="no pair above this match is merged; not in the paper")
    fuse: list[str] = Field(
        description="outputs of other localisations, whose boxes are merged with these: folders or s3:// addresses"
    )
    blacklist: str | None = Field(
        description="file with the numbers, from 1 in the order of names, of validation images that do not count for "
        "localisation, as ILSVRC has had since 2013: a path or s3:// address; null: all count, 2012's rule"
    )
    classify: list[str] = Field(
        description="predictions of other evaluations, averaged with the network's for the five classes (§4.5)"
    )

    @field_validator("test_scales")
    @classmethod
    def _unique(cls, values: list[int]) -> list[int]:
        if len(set(values)) < len(values):
            raise ValueError(f"duplicate in {values}")
        return values

    def of_training(self, network: dict[str, Any], record: dict[str, Any] | None) -> TrainParams:
        """The parameters of the training: those of the classification network, with what this section says.

        network: its architecture.  record: the parameters of its training, if it was trained here.
        """
        fields = ("configuration", "batch_norm", "classifier_width", "input_size")
        own = {name: self.model_dump()[name] for name in OVERRIDDEN}
        fixed = {"init": "checkpoint", "crop": "scale"}
        return TrainParams.model_validate(
            {**PAPER, **(record or {}), **{name: network[name] for name in fields}, **own, **fixed}
        )
