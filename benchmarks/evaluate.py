"""Dense evaluation of VGG-16 (random weights, 1000 classes): python -m benchmarks.evaluate --images TAR_OR_FOLDER

dense: Views of vgg.evaluation.evaluate with the parameters of recipes/imagenet-d-256.yaml: a centre crop and whole
images at Q = 224, 256, 288, each also mirrored, from images in memory.  decoded: evaluate() of shards, decoding
included.  reference: torchvision's vgg16 and one centre crop, as its references evaluate: eager, float32, images in
memory.
Uses the images of the most common size, repeated, so that batches are as large as with 50,000 images.
"""

from __future__ import annotations

import argparse
import collections
import io
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.models import vgg16

from benchmarks import machine
from benchmarks.competitors import NUM_CLASSES, PAPERS_SIZE
from benchmarks.loader import shard
from runtime.distributed import Group, joined
from runtime.shards.shardset import ShardSet
from vgg.evaluation.evaluate import Views, evaluate, short_side
from vgg.network.init import initialise
from vgg.network.model import VGG, Architecture, blank
from vgg.params import load
from vgg.params.evaluate import EvaluateParams

RECIPE = Path(__file__).resolve().parents[1] / "recipes/imagenet-d-256.yaml"
PIXELS = {"mean": [123.7, 116.3, 103.5], "std": [1.0, 1.0, 1.0]}
IN_MEMORY_SHARE = 0.5  # of --seconds: for images in memory; the rest is for shards
NAMES = {
    "dense": "ours, centre crop and dense at three scales, mirrored",
    "decoded": "ours, decoding included",
    "reference": "torchvision, one centre crop",
}


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.evaluate", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--images", type=Path, required=True, help="a tar or folder of JPEGs, <class>/<image>")
    flags.add_argument("--json", action="store_true", help="print figures as JSON, a line each as they are measured")
    flags.add_argument("--input-size", type=int, default=PAPERS_SIZE, help="pixels (default 224); scales in proportion")
    flags.add_argument("--batches", type=int, default=4, help="evaluated from shards (default 4)")
    flags.add_argument("--rounds", type=int, default=5, help="turns, at most (default 5)")
    flags.add_argument("--seconds", type=float, default=math.inf, help="time limit: fewer rounds, but at least one")
    args = flags.parse_args()
    limit, figures = machine.TimeLimit(args.seconds), machine.Figures(args.json)
    params = scaled(load(str(RECIPE), "evaluate", EvaluateParams), args.input_size)
    images, (height, width) = most_common_size(machine.read_images(args.images))
    batch = max(1, params.batch_pixels // (max(height * width, *areas(params, height, width))))
    with joined() as group, tempfile.TemporaryDirectory() as folder:
        figures.add(
            machine=machine.describe(), kind=group.device.type, input_size=args.input_size, batch=batch,
            image=[width, height], scales=params.test_scales,
        )  # fmt: skip
        network = Architecture("D", False, 4096, NUM_CLASSES, args.input_size)
        model = blank(network)
        initialise(model, "glorot", 1)
        in_memory(model, params, images, batch, group.device, args.rounds, limit, figures)
        from_shards(model, params, images, batch * args.batches, Path(folder), group, args.rounds, limit, figures)
    if not args.json:
        print(report(figures))


def scaled(params: EvaluateParams, size: int) -> EvaluateParams:
    """The recipe's parameters in proportion to the network's input size."""
    scales = [q * size // PAPERS_SIZE for q in params.test_scales]
    pixels = params.batch_pixels * size**2 // PAPERS_SIZE**2
    return params.model_copy(update={"test_scales": scales, "batch_pixels": pixels})


def most_common_size(images: dict[str, bytes]) -> tuple[list[bytes], tuple[int, int]]:
    """The images of the most common size, and that size: height, width."""
    sizes = {name: Image.open(io.BytesIO(data)).size[::-1] for name, data in images.items()}
    [(size, _)] = collections.Counter(sizes.values()).most_common(1)
    return [images[name] for name, other in sizes.items() if other == size], size


def areas(params: EvaluateParams, height: int, width: int) -> list[int]:
    """Pixels of an image at every scale."""
    return [math.prod(short_side(height, width, scale)) for scale in params.test_scales]


def in_memory(
    model: VGG,
    params: EvaluateParams,
    images: list[bytes],
    batch: int,
    device: torch.device,
    rounds: int,
    limit: machine.TimeLimit,
    figures: machine.Figures,
) -> None:
    size = model.architecture.input_size
    decoded = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in images[:batch]]
    pixels = torch.from_numpy(np.stack([*itertools.islice(itertools.cycle(decoded), batch)])).to(device)
    height, width = pixels.shape[1:3]
    views, reference = Views(params, model, PIXELS, device), vgg16().eval().to(device)
    crops = torch.randn(batch, 3, size, size).to(device)

    def dense() -> int:
        views.posteriors(pixels)
        return len(pixels)

    @torch.inference_mode()
    def torchvisions() -> int:
        reference(crops)
        return len(crops)

    machine.reset_peak(device)
    dense()
    figures.add(peak_memory_mb=round(machine.peak_mb(device), 1))
    # pixels of an image that the network sees, mirror images included, in multiples of a crop's
    seen = (size**2 + sum(areas(params, height, width))) * (2 if params.flip else 1) / size**2
    rates: dict[str, list[float]] = {"dense": [], "reference": []}
    torchvisions()
    for number in range(rounds):
        if number and limit.left(IN_MEMORY_SHARE) < 0:
            break
        for name, work in (("dense", dense), ("reference", torchvisions)):
            rates[name].append(images_per_second(work, device))
            figures.add(**{name: round(statistics.median(rates[name]), 2)})
        share = statistics.median(rates["dense"]) * seen / statistics.median(rates["reference"])
        figures.add(crops_seen=round(seen, 2), share_of_reference=round(share, 3))


def images_per_second(work: Callable[[], int], device: torch.device, seconds: float = 2) -> float:
    machine.synchronise(device)
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < seconds:
        count += work()
        machine.synchronise(device)
    return count / (time.perf_counter() - start)


@dataclass(frozen=True)
class Untrained:
    """A network with random weights, for evaluate() in place of a Trained."""

    model: VGG
    manifest: dict[str, Any]
    directory: Path = Path("random weights")

    def network(self) -> VGG:
        return self.model


def from_shards(
    model: VGG,
    params: EvaluateParams,
    images: list[bytes],
    count: int,
    folder: Path,
    group: Group,
    rounds: int,
    limit: machine.TimeLimit,
    figures: machine.Figures,
) -> None:
    repeated = itertools.islice(itertools.cycle(images), count)
    shards: ShardSet = shard({f"{n % 10}/{n:05d}.jpg": data for n, data in enumerate(repeated)}, folder)
    manifest = {
        "run": {"data": {"classes_sha256": shards.classes_sha256}},
        "network": model.architecture.as_dict(),
        "pixels": PIXELS,
    }
    trained: Any = Untrained(model, manifest)
    taken: list[float] = []
    for number in range(rounds):
        if number and limit.left() < max(taken):
            break
        start = time.perf_counter()
        evaluate(params, trained, shards, group, lambda *_: None)
        taken.append(time.perf_counter() - start)
        figures.add(decoded=round(count / statistics.median(taken), 2))


def report(figures: dict[str, Any]) -> str:
    rows = [("", "images/s"), *((text, f"{figures[name]:,.1f}") for name, text in NAMES.items())]
    width, height = figures["image"]
    setting = f"{figures['kind']}; images of {width} x {height}, {figures['batch']} at once, Q = {figures['scales']}"
    return "\n".join([
        figures["machine"], setting, "", machine.table(rows), "",
        f"ours sees {figures['crops_seen']:.1f} times the pixels of a crop: pixel for pixel "
        f"{figures['share_of_reference']:.2f} x torchvision; {figures['peak_memory_mb'] / 1024:.1f} GB of memory",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
