"""Evaluation (§3.2, §4): centre crops, the dense network at every scale Q, and the average over scales.

Each image is decoded once and resized to every scale.  Its posteriors are averaged over the mirror image, if
parameters say so, and then over scales.  Batches contain images of one size, because padding would change scores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from runtime.distributed import Group
from runtime.errors import Refused
from runtime.shards.shardset import ShardSet, Split
from vgg.data.augment import Prepare
from vgg.data.images import image_of
from vgg.data.windows import centre_window
from vgg.evaluation.metrics import ranks_of_labels
from vgg.network.dense import DenseVGG
from vgg.network.model import VGG
from vgg.network.trained import Trained
from vgg.params.evaluate import EvaluateParams

log = logging.getLogger("vgg.evaluate")

TOP = 5


@dataclass
class Evaluation:
    """The result of an evaluation.

    metrics: of every mode under "modes"; those of the headline mode also at the top level.
    predictions: rows of row_type, one per image, in the order of the index.
    modes: names of the modes; the last one is the headline.
    """

    metrics: dict[str, Any]
    predictions: np.ndarray
    modes: list[str] = field(default_factory=list)


def evaluate(
    params: EvaluateParams,
    trained: Trained,
    shards: ShardSet,
    group: Group,
    report: Callable[[int, int], None],
) -> Evaluation:
    """Evaluate every validation image exactly once, in every mode.

    The ranks take whole batches in turn, so batches and scores are identical, bit for bit, for any number of ranks.
    report: called with (images done, total images) of this rank.
    Raises Refused if the checkpoint was trained on other classes, a test scale is below the network's input size, or a
    score is not finite.
    """
    if trained.manifest["run"]["data"]["classes_sha256"] != shards.classes_sha256:
        raise Refused(
            f"{trained.directory} was trained on other classes than those of {shards.address}. "
            "Train on these shards, or evaluate on the others."
        )
    input_size = trained.manifest["network"]["input_size"]
    if too_small := [q for q in params.test_scales if q < input_size]:
        raise Refused(f"evaluate.test_scales: {too_small} are below the network's input size of {input_size} pixels")
    split = shards.split("val")
    max_pixels = shards.manifest["parameters"]["max_pixels"]
    views = Views(params, trained.network(), trained.manifest["pixels"], group.device)
    predictions = []
    batches = list(batches_of_one_size(sizes_of(split), params.test_scales, params.batch_pixels))
    batches = batches[group.rank :: group.world_size]
    done, share = 0, sum(map(len, batches))
    for numbers in batches:
        images = [torch.from_numpy(np.array(image_of(split, int(n), max_pixels))) for n in numbers]
        posteriors = views.posteriors(torch.stack(images).to(group.device))
        labels = torch.from_numpy(split.rows["label"][numbers].astype(np.int64)).to(group.device)
        predictions.append(_rows(numbers, labels, posteriors, split))
        done += len(numbers)
        report(done, share)
    own_rows = np.concatenate([np.zeros(0, row_type(len(views.modes))), *predictions])
    rows = np.concatenate(group.gather(own_rows))
    rows = rows[np.argsort(rows["number"])]
    if not np.array_equal(rows["number"], np.arange(len(split))):
        raise AssertionError(f"evaluated {len(rows)} images of {len(split)}")
    return Evaluation(_metrics(views.modes, rows), rows, views.modes)


def row_type(num_modes: int) -> np.dtype[Any]:
    """Type of a prediction: number, label; per mode the TOP best classes, their probabilities, rank and loss.

    rank: of the label; 0 is a top-1 hit.  loss: nats.  Unused entries of classes are -1.
    """
    mode = np.dtype([("classes", "<i4", (TOP,)), ("probabilities", "<f4", (TOP,)), ("rank", "<i4"), ("loss", "<f4")])
    return np.dtype([("number", "<u4"), ("label", "<u4"), ("modes", mode, (num_modes,))])


class Views:
    """The network in every mode: centre crop, dense at each scale, and, last, the headline: dense over all scales.

    pixels: "mean" and "std" of R, G, B, 0-255, that were used in training.
    """

    def __init__(
        self, params: EvaluateParams, model: VGG, pixels: dict[str, list[float]], device: torch.device
    ) -> None:
        self.params = params
        self.model = model.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dense = DenseVGG(self.model, params.ceil_pooling, params.softmax == "per_position").eval()
        self.prepare = Prepare(pixels["mean"], pixels["std"]).to(device)
        self.input_size = model.architecture.input_size
        scales = sorted(params.test_scales)
        self.centre_scale = scales[len(scales) // 2]
        suffix = "_flip" if params.flip else ""
        self.modes = [f"centre_Q{self.centre_scale}{suffix}", *(f"dense_Q{q}{suffix}" for q in scales)]
        if len(scales) > 1:
            self.modes.append("dense_Q" + "-".join(map(str, scales)) + suffix)
        self.scales = scales

    @torch.inference_mode()
    def posteriors(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Class probabilities, float32 (n, classes), for every mode.  images: of one size, uint8 (n, h, w, 3)."""
        height, width = images.shape[1:3]
        central = centre_crop(images, self.centre_scale, self.input_size)
        found = [self._averaged(central, lambda x: self.model(x).float().softmax(1))]
        for scale in self.scales:
            resized = resize(images, *short_side(height, width, scale))
            found.append(self._averaged(resized, self.dense))
        if len(self.scales) > 1:
            found.append(torch.stack(found[1:]).mean(0))
        return found

    @torch.inference_mode()
    def headline(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class probabilities in the headline mode, float32 (n, classes), and embeddings (n, classifier_width).

        An embedding is fc7 after its ReLU, averaged as the probabilities are: over positions, the mirror image (if
        params.flip is set) and scales.  images: of one size, uint8 (n, h, w, 3).
        """
        height, width = images.shape[1:3]
        scales = []
        for scale in self.scales:
            prepared = self.prepare(resize(images, *short_side(height, width, scale)))
            views = [prepared, prepared.flip(-1)] if self.params.flip else [prepared]
            scales.append(
                [torch.stack(found).mean(0) for found in zip(*map(self.dense.with_embedding, views), strict=True)]
            )
        posteriors, embeddings = (torch.stack(found).mean(0) for found in zip(*scales, strict=True))
        return posteriors, embeddings

    def _averaged(self, images: torch.Tensor, net: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Posteriors of images, averaged with those of the mirror images if params.flip is set."""
        prepared = self.prepare(images)
        posteriors = net(prepared)
        return (posteriors + net(prepared.flip(-1))) / 2 if self.params.flip else posteriors


def centre_crop(images: torch.Tensor, scale: int, size: int) -> torch.Tensor:
    """The central size x size crops of images of one size, rescaled to short side `scale`: uint8 (n, size, size, 3)."""
    height, width = images.shape[1:3]
    window = centre_window(width, height, scale, size)
    return resize(images[:, window.top : window.bottom, window.left : window.right], size, size)


def short_side(height: int, width: int, scale: int) -> tuple[int, int]:
    """(height, width) after isotropic rescaling to short side `scale`, pixels."""
    short = min(height, width)
    return max(scale, round(height * scale / short)), max(scale, round(width * scale / short))


def resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize uint8 (n, h, w, 3) to uint8 (n, height, width, 3), antialiased bilinear."""
    if images.shape[1:3] == (height, width):
        return images
    planes = images.permute(0, 3, 1, 2)
    if planes.device.type == "cuda":  # CUDA has no uint8 kernel
        planes = planes.float()
    planes = functional.interpolate(planes, (height, width), mode="bilinear", antialias=True, align_corners=False)
    if planes.is_floating_point():
        planes = planes.round().clamp(0, 255).to(torch.uint8)
    return planes.permute(0, 2, 3, 1)


def sizes_of(split: Split) -> np.ndarray:
    """Height and width of every image, int64 (n, 2)."""
    return np.stack([split.rows["height"], split.rows["width"]], -1).astype(np.int64)


def batches_of_one_size(sizes: np.ndarray, test_scales: list[int], batch_pixels: int) -> Iterator[np.ndarray]:
    """Image numbers in batches of equal height and width, within batch_pixels at any scale; every image once.

    sizes: height and width of every image, int64 (n, 2).
    """
    for height, width in np.unique(sizes, axis=0):
        same = np.flatnonzero((sizes == (height, width)).all(1))
        resized = np.prod(short_side(int(height), int(width), max(test_scales)))
        batch_size = max(1, batch_pixels // int(max(resized, height * width)))
        for first in range(0, len(same), batch_size):
            yield same[first : first + batch_size]


def _rows(numbers: np.ndarray, labels: torch.Tensor, posteriors: list[torch.Tensor], split: Split) -> np.ndarray:
    rows = np.zeros(len(numbers), row_type(len(posteriors)))
    rows["number"], rows["label"] = numbers, labels.cpu().numpy()
    for mode, probabilities in enumerate(posteriors):
        if not torch.isfinite(probabilities).all():
            raise Refused(
                f"{split.where(int(numbers[0]))} or its batch: a score is not finite. The weights cannot be used."
            )
        # stable, so that equal probabilities are ordered by class, as in ranks_of_labels
        best = torch.sort(probabilities, dim=1, descending=True, stable=True)
        count = min(TOP, probabilities.shape[1])
        rows["modes"]["classes"][:, mode] = -1
        rows["modes"]["classes"][:, mode, :count] = best.indices[:, :count].cpu().numpy()
        rows["modes"]["probabilities"][:, mode, :count] = best.values[:, :count].cpu().numpy()
        rows["modes"]["rank"][:, mode] = ranks_of_labels(probabilities, labels).cpu().numpy()
        own = probabilities.gather(1, labels[:, None]).squeeze(1)
        rows["modes"]["loss"][:, mode] = -own.clamp_min(torch.finfo(torch.float32).tiny).log().cpu().numpy()
    return rows


def _metrics(modes: list[str], rows: np.ndarray) -> dict[str, Any]:
    results = {}
    for number, mode in enumerate(modes):
        ranks = rows["modes"]["rank"][:, number]
        results[mode] = {
            "num_images": len(rows),
            "top1_error": int((ranks >= 1).sum()) / len(rows),
            "top5_error": int((ranks >= TOP).sum()) / len(rows),
            "loss": float(rows["modes"]["loss"][:, number].astype(np.float64).mean()),
        }
    return {"headline": modes[-1], **results[modes[-1]], "modes": results}
