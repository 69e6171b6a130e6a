"""Tables 8 and 9 of the paper (arXiv 1409.1556 v6): localisation errors in %, validation images of ILSVRC-2012."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from components.evaluate.published import is_of

SCALE_OF_TABLE_8 = 384  # S; the central crop, and the class is given
TABLE_8 = {  # by regression and trainable: of net D
    ("single", "fc"): 36.4,
    ("per_class", "fc"): 34.3,
    ("per_class", "all"): 33.1,
}
TABLE_9 = {  # by S and Q: net D, per class, all layers; five guesses, their classes by the paper's best classifiers
    (256, (256,)): 29.5,
    (384, (384,)): 28.2,
    (384, (352, 384)): 27.5,
}


class Row(NamedTuple):
    """A row that can be compared.  ours: a fraction, with its interval.  theirs: in %."""

    what: str
    ours: float
    interval: list[float]
    theirs: float


def rows(metrics: dict[str, Any], params: dict[str, Any], network: dict[str, Any]) -> Iterator[Row]:
    """Those of the paper that are of this network and protocol, on these images.

    metrics: of the stage.  params: its section.  network: architecture of the classification network.
    """
    same = (network["configuration"], network["batch_norm"], network["input_size"]) == ("D", False, 224)
    if not same or not is_of(metrics["dataset"], metrics["num_images"]) or metrics["num_blacklisted"]:
        return
    scale, kind = params["train_scale"], (params["regression"], params["trainable"])
    if scale == SCALE_OF_TABLE_8 and kind in TABLE_8:
        found = metrics["class_given"]["centre_crop"]
        yield Row("Table 8: central crop, the class given", found["error"], found["interval"], TABLE_8[kind])
    test_scales = tuple(sorted(params["test_scales"]))
    if kind == ("per_class", "all") and not params["fuse"] and (scale, test_scales) in TABLE_9:
        found, at = metrics["localisation"]["merged"], ", ".join(map(str, test_scales))
        what = f"Table 9: top-5 localisation error, Q = {at}"
        yield Row(what, found["top5_error"], found["top5_interval"], TABLE_9[scale, test_scales])
