"""The other evaluations of evaluate.fuse, verified and joined with the images of this one."""

from __future__ import annotations

from typing import Any

import numpy as np

from components.evaluate.report import SCHEMA
from components.stage import Stage
from runtime import manifest
from runtime.shards.shardset import ShardSet
from runtime.store.place import downloaded
from vgg.evaluation.fusion import Partner
from vgg.params.evaluate import EvaluateParams


def opened(stage: Stage[EvaluateParams], shards: ShardSet) -> list[Partner]:
    """Their digests become inputs of the stage.

    Raises Refused if one is damaged, not finished, or of other images or classes.
    """
    keys = np.asarray(shards.split("val").rows["key"])
    partners = []
    for number, address in enumerate(stage.params.fuse, 1):
        partner, _, digest = predictions_at(address)
        stage.inputs[f"fused_{number}"] = digest
        partners.append(partner.joined(keys, shards.classes_sha256))
    return partners


def predictions_at(address: str) -> tuple[Partner, dict[str, Any], str]:
    """A finished evaluation of one network (its last mode), the content of its manifest, and its digest."""
    directory = downloaded(address)
    content = manifest.read(directory, SCHEMA)
    mode = content["headline_of_network"]
    wanted = {"keys.npy", f"posteriors/{mode}.npy"}
    for entry in content["files"]:
        if entry["path"] in wanted:
            manifest.verify_file(directory, entry)
    keys, posteriors = (np.load(directory / name, mmap_mode="r", allow_pickle=False) for name in sorted(wanted))
    partner = Partner(f"{address} ({mode})", keys, content["classes_sha256"], posteriors)
    return partner, content, manifest.directory_digest(directory, content)
