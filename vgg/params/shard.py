"""Parameters of sharding."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vgg.params import Section


class ShardParams(Section):
    source: Literal["digits", "folder", "ilsvrc2012", "ilsvrc2010"] = Field(
        description="where images come from: the digits inside scikit-learn, <images>/{train,val}/<class>/*, or the "
        "official archives of a year as they lie in <images>"
    )
    check_md5: bool = Field(
        description="compare archives with their published md5 first (minutes; false: you have done it yourself)"
    )
    seed: int = Field(ge=0, lt=2**32, description="of the global permutation before packing")
    samples_per_shard: int = Field(
        ge=1, le=100_000, description="images a shard, at most; shards differ by at most one"
    )
    max_pixels: int = Field(
        ge=1, le=500_000_000, description="pixels an image may have; larger ones are refused undecoded"
    )
    on_bad_image: Literal["fail", "quarantine"] = Field(
        description="fail: one unusable file stops the stage; quarantine: leave it out and list it in the manifest"
    )
    max_quarantined: int = Field(ge=0, description="images that may be left out in all; one more stops the stage")
