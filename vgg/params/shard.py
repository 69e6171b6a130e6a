"""Parameters of sharding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from vgg.params import Section

EMBEDDED = ("digits", "digit-scenes")  # sources that need no files


class ShardParams(Section):
    source: Literal[
        "digits",
        "digit-scenes",
        "folder",
        "ilsvrc2012",
        "ilsvrc2010",
        "kaggle",
        "tiny-imagenet",
        "huggingface",
    ] = Field(
        description="source of the images: the digits in scikit-learn, scenes of these with boxes, "
        "<images>/{train,val}/<class>/*, the published archives of a year in <images>, or there the unpacked download "
        "of Kaggle's ILSVRC, Tiny ImageNet, or parquet files of Hugging Face"
    )
    check_md5: bool = Field(
        description="first compare archives with their published md5 (minutes; false: already done)"
    )
    seed: int = Field(ge=0, lt=2**32, description="seed of the global permutation before packing")
    samples_per_shard: int = Field(
        ge=1, le=100_000, description="maximum images per shard; shards differ by at most one"
    )
    max_pixels: int = Field(
        ge=1, le=500_000_000, description="maximum pixels of an image; larger ones are rejected before decoding"
    )
    on_bad_image: Literal["fail", "quarantine"] = Field(
        description="fail: one unusable file stops the stage; quarantine: leave it out and list it in the manifest"
    )
    max_quarantined: int = Field(
        ge=0, description="quarantine: maximum images left out in total; one more stops the stage"
    )

    def without_effect(self) -> Iterator[str]:
        if self.on_bad_image == "fail" and self.max_quarantined > 0:
            yield f"max_quarantined: {self.max_quarantined} has no effect with on_bad_image: fail"
