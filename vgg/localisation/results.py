"""The numbers of a localisation: Table 8's (class given), Table 9's (five guesses), and what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.shards.shardset import ShardSet
from vgg.localisation import metric
from vgg.localisation.boxes import whole_pixels
from vgg.localisation.dense import MODES
from vgg.localisation.instances import Instances

GIVEN = ("centre_crop", *MODES)  # of row_type()["given"]
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Results:
    """Of all validation images, in the order of the index.

    guesses: int64 (n, 5), -1 for none.  boxes: (modes, n, 5, 4), whole pixels.  given: (1 + modes, n, 4), of the true
    class.  guess_ious: (modes, n, 5).  given_ious: (1 + modes, n).  In the order of MODES and GIVEN.
    counted: bool (n,), the images that count for localisation: all that are not blacklisted.
    """

    labels: NDArray[np.int64]
    guesses: NDArray[np.int64]
    boxes: NDArray[np.float64]
    given: NDArray[np.float64]
    guess_ious: NDArray[np.float64]
    given_ious: NDArray[np.float64]
    counted: NDArray[np.bool_]

    @classmethod
    def of(
        cls, rows: NDArray[np.void], true: Instances, shards: ShardSet, blacklisted: NDArray[np.bool_] | None = None
    ) -> Results:
        """rows: of localise().  true: the boxes of the validation images.  Boxes are scored as they are written.

        blacklisted: bool (n,), images that do not count for localisation.
        """
        index = shards.split("val").rows
        width, height = (index[side].astype(np.int64) for side in ("width", "height"))
        boxes = [whole_pixels(each, width[:, None], height[:, None]) for each in rows["boxes"].swapaxes(0, 1)]
        given = [whole_pixels(each, width, height) for each in rows["given"].swapaxes(0, 1)]
        return cls(
            rows["label"].astype(np.int64), rows["classes"].astype(np.int64), np.stack(boxes), np.stack(given),
            np.stack([metric.best_ious(true.first, true.boxes, each) for each in boxes]),
            np.stack([metric.best_ious(true.first, true.boxes, each[:, None])[:, 0] for each in given]),
            np.ones(len(rows), bool) if blacklisted is None else ~blacklisted,
        )  # fmt: skip

    def metrics(self, num_classes: int) -> dict[str, Any]:
        """Errors are fractions.  The headline is that of the merged boxes.

        Blacklisted images count for classification, but not for localisation, as in the devkit.
        """
        modes = {}
        for mode, ious in zip(MODES, self.guess_ious, strict=True):
            summary = metric.summary(metric.counts(metric.judge(self.labels, self.guesses, ious), ~self.counted))
            modes[mode] = summary["localisation"]
            classification = summary["classification"]
        given = {}
        for mode, ious in zip(GIVEN, self.given_ious, strict=True):
            found = metric.class_given(metric.class_counts(self.labels, ious, num_classes, ~self.counted))
            quantiles = {f"{q:g}": float(np.quantile(ious[self.counted], q)) for q in QUANTILES}
            given[mode] = {**found, "mean_iou": float(ious[self.counted].mean()), "iou_quantiles": quantiles}
        return {
            "num_images": len(self.labels),
            "num_blacklisted": int((~self.counted).sum()),
            "top1_localisation_error": modes[MODES[-1]]["top1_error"],
            "top5_localisation_error": modes[MODES[-1]]["top5_error"],
            "top5_classification_error": classification["top5_error"],
            "class_given_error": given[MODES[-1]]["error"],
            "centre_crop_error": given[GIVEN[0]]["error"],
            "mean_iou": given[MODES[-1]]["mean_iou"],
            "classification": classification,
            "localisation": modes,
            "class_given": given,
        }


def floors(train: Instances, val: Instances, shards: ShardSet, counted: NDArray[np.bool_]) -> dict[str, float]:
    """Errors, the class given, of networks that have learnt nothing: the whole image, and the mean box of training.

    counted: bool (n,), the validation images that count.
    """
    sizes = {
        name: np.stack([shards.split(name).rows[side] for side in ("width", "height")], 1).astype(np.float64)
        for name in ("train", "val")
    }
    counts = np.diff(train.first)
    mean = (train.boxes / np.tile(np.repeat(sizes["train"], counts, 0), 2)).mean(0)
    whole = np.tile(sizes["val"], 2)
    found = {"whole_image": whole * np.array([0, 0, 1, 1]), "mean_box": whole * mean}
    return {
        name: float((metric.best_ious(val.first, val.boxes, boxes[:, None])[counted] < metric.THRESHOLD).mean())
        for name, boxes in found.items()
    }
