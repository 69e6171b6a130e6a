"""The other evaluations of evaluate.fuse, verified and joined with the images of this one."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from components.evaluate import report
from components.stage import Stage
from runtime import manifest
from runtime.shards.shardset import ShardSet
from runtime.store.place import downloaded
from vgg.evaluation.fusion import Partner
from vgg.params.evaluate import EvaluateParams

log = logging.getLogger("vgg")


def opened(
    stage: Stage[EvaluateParams], shards: ShardSet, weights_sha256: str
) -> tuple[list[Partner], list[dict[str, Any]]]:
    """The evaluations, and what network each is of.  Their digests become inputs of the stage.

    weights_sha256: of the network that is evaluated.
    Raises Refused if one is damaged, not finished, or of other images or classes.
    """
    keys = np.asarray(shards.split("val").rows["key"])
    partners, networks, weights = [], [], {weights_sha256}
    for number, address in enumerate(stage.params.fuse, 1):
        partner, content, digest = predictions_at(address)
        if content["inputs"]["weights_sha256"] in weights:
            log.warning("evaluate.fuse: %s is of weights that are in this fusion already; they count twice", address)
        weights.add(content["inputs"]["weights_sha256"])
        stage.inputs[f"fused_{number}"] = digest
        partners.append(partner.joined(keys, shards.classes_sha256))
        networks.append(network(content["metrics"], content["headline_of_network"]))
    return partners, networks


def network(metrics: dict[str, Any], mode: str) -> dict[str, Any]:
    """A network of a fusion, for its metrics.  mode: that of its evaluation which is averaged."""
    method = metrics["modes"][mode]["protocol"]["method"]
    return {**metrics["training"], "method": method, "weights_sha256": metrics["weights_sha256"]}


def predictions_at(address: str) -> tuple[Partner, dict[str, Any], str]:
    """A finished evaluation of one network (its last mode), the content of its manifest, and its digest."""
    directory = downloaded(address)
    content = report.read(directory)
    mode = content["headline_of_network"]
    names = ("keys.npy", f"posteriors/{mode}.npy")
    keys, posteriors = (np.load(directory / name, mmap_mode="r", allow_pickle=False) for name in names)
    partner = Partner(f"{address} ({mode})", keys, content["classes_sha256"], posteriors)
    return partner, content, manifest.directory_digest(directory, content)
