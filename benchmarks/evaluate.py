"""Evaluation of VGG-16 (random weights, 1000 classes): python -m benchmarks.evaluate --images TAR_OR_FOLDER

Dense at three scales, 256, 384 and 512, with mirror images, of a sample of the images, in one run:
ours: evaluate() of shards, everything included.
naive: a loop over images, scales and mirror images with Pillow and torchvision's modules, fc6 to fc8 as convolutions.
earlier: evaluate() of commit 86b8a54, if this is a clone that has it; with one centre crop and its mirror image.
multi_crop: ours, 150 crops an image, of --crop-images images.
shares: of the time of ours, measured in a run of its own in which the device is waited for after every part.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models import vgg16
from torchvision.transforms import functional as transforms

from benchmarks import machine
from benchmarks.competitors import NUM_CLASSES, PAPERS_SIZE
from benchmarks.loader import shard
from runtime import environment
from runtime.distributed import Group, joined
from runtime.shards.shardset import ShardSet
from vgg.evaluation import evaluate as evaluation
from vgg.evaluation.evaluate import Evaluation, evaluate
from vgg.network.dense import DenseVGG
from vgg.network.init import initialise
from vgg.network.model import VGG, Architecture, blank
from vgg.params import load
from vgg.params.evaluate import EvaluateParams

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes/imagenet-d-jitter.yaml"
EARLIER = "86b8a54"
MEAN = [123.7, 116.3, 103.5]
PIXELS = {"mean": MEAN, "std": [1.0, 1.0, 1.0]}
IMAGENET = 50_000  # validation images
SEED = 1
NAMES = {
    "ours": "ours",
    "naive": "a loop over images, scales and mirror images, torchvision",
    "earlier": f"ours at {EARLIER}",
    "multi_crop": "ours, 150 crops",
}


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.evaluate", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--images", type=Path, required=True, help="a tar or folder of JPEGs, <class>/<image>")
    flags.add_argument("--json", action="store_true", help="print figures as JSON, a line each as they are measured")
    flags.add_argument("--input-size", type=int, default=PAPERS_SIZE, help="pixels (default 224); scales in proportion")
    flags.add_argument(
        "--num-images", type=int, default=12, help="a sample of the images (default 12); more are repeated"
    )
    flags.add_argument("--naive-images", type=int, default=12, help="of the sample, for the others (default 12)")
    flags.add_argument("--crop-images", type=int, default=2, help="of the sample, for 150 crops (default 2)")
    flags.add_argument("--rounds", type=int, default=1, help="turns, at most (default 1)")
    flags.add_argument("--seconds", type=float, default=math.inf, help="time limit: fewer rounds, but at least one")
    args = flags.parse_args()
    limit, figures = machine.TimeLimit(args.seconds), machine.Figures(args.json)
    params = scaled(load(str(RECIPE), "evaluate", EvaluateParams), args.input_size)
    dense = params.model_copy(update={"methods": ["dense"]})
    crops = params.model_copy(update={"methods": ["multi_crop"]})
    sample = sampled(machine.read_images(args.images), args.num_images)
    with joined() as group, tempfile.TemporaryDirectory() as folder:
        figures.add(
            machine=machine.describe(), kind=group.device.type, input_size=args.input_size, scales=params.test_scales,
            images=len(sample),
        )  # fmt: skip
        model = blank(Architecture("D", False, 4096, NUM_CLASSES, args.input_size))
        initialise(model, "glorot", SEED)
        shards, few, fewest = (
            shard(dict([*sample.items()][:count]), Path(folder) / name)
            for name, count in (("all", len(sample)), ("few", args.naive_images), ("fewest", args.crop_images))
        )
        contest(model, dense, shards, few, group, args.rounds, limit, figures, Path(folder))
        figures.add(multi_crop=round(rate(lambda: evaluated(model, crops, fewest, group), fewest, group), 3))
        figures.add(shares=shares(model, dense, few, group))
    if not args.json:
        print(report(figures))


def scaled(params: EvaluateParams, size: int) -> EvaluateParams:
    """The recipe's parameters in proportion to the network's input size."""
    scales = [q * size // PAPERS_SIZE for q in params.test_scales]
    # on a CPU large batches are no faster and take memory
    pixels = params.batch_pixels if torch.cuda.is_available() else 1_500_000
    return params.model_copy(update={"test_scales": scales, "batch_pixels": pixels * size**2 // PAPERS_SIZE**2})


def sampled(images: dict[str, bytes], count: int) -> dict[str, bytes]:
    """So many of the images, in an order of their own; repeated under other names if there are fewer."""
    order = sorted(images)
    np.random.default_rng(SEED).shuffle(order)
    names = [order[number % len(order)] for number in range(count)]
    return {f"{n % 10}/{n:06d}.jpg": images[name] for n, name in enumerate(names)}


@dataclass(frozen=True)
class Untrained:
    """A network with random weights, for evaluate() in place of a Trained."""

    model: VGG
    manifest: dict[str, Any]
    directory: Path = Path("random weights")

    def network(self) -> VGG:
        return self.model


def evaluated(model: VGG, params: EvaluateParams, shards: ShardSet, group: Group) -> Evaluation:
    manifest = {
        "run": {"data": {"classes_sha256": shards.classes_sha256}},
        "network": model.architecture.as_dict(),
        "pixels": PIXELS,
    }
    untrained: Any = Untrained(model, manifest)
    found = evaluate(params, untrained, shards, group, lambda *_: None)
    assert found
    return found


def contest(
    model: VGG,
    params: EvaluateParams,
    shards: ShardSet,
    few: ShardSet,
    group: Group,
    rounds: int,
    limit: machine.TimeLimit,
    figures: machine.Figures,
    folder: Path,
) -> None:
    """Ours, the loop and the earlier commit in turn."""
    loop = Loop(model, params, group.device)
    old = earlier(folder)
    rates: dict[str, list[float]] = {"ours": [], "naive": [], "earlier": []}
    evaluated(model, params, few, group)  # loads libraries
    for number in range(rounds):
        if number and limit.left(0.5) < 0:
            break
        machine.reset_peak(torch.device("cpu"))
        rates["ours"].append(rate(lambda: evaluated(model, params, shards, group), shards, group))
        if not number:
            figures.add(peak_rss_mb=round(machine.peak_mb(torch.device("cpu")), 1))
        rates["naive"].append(rate(lambda: loop(few), few, group))
        if old:
            rates["earlier"].append(rate_of_earlier(old, params, few, model.architecture.input_size))
        figures.add(**{name: round(statistics.median(found), 3) for name, found in rates.items() if found})
        for name in ("naive", "earlier"):
            if name in figures:
                figures.add(**{f"ratio_{name}": round(figures["ours"] / figures[name], 2)})
    ours = evaluated(model, params, few, group)
    difference = np.abs(ours.posteriors(len(ours.modes) - 1).astype(np.float32) - loop(few)).max()
    figures.add(max_difference=float(f"{difference:.1e}"), minutes_50000=round(IMAGENET / figures["ours"] / 60, 1))


def rate(work: Callable[[], Any], shards: ShardSet, group: Group) -> float:
    """Validation images a second."""
    machine.synchronise(group.device)
    start = time.perf_counter()
    work()
    machine.synchronise(group.device)
    return len(shards.split("val")) / (time.perf_counter() - start)


class Loop:
    """The evaluation as one writes it first: an image, a scale, a mirror image at a time, in float32."""

    def __init__(self, model: VGG, params: EvaluateParams, device: torch.device) -> None:
        features = vgg16().features
        features.load_state_dict(model.features.state_dict())
        side = model.architecture.input_size // 32
        layers: list[nn.Module] = []
        for number, linear in enumerate(m for m in model.classifier if isinstance(m, nn.Linear)):
            kernel = side if number == 0 else 1
            layer = nn.Conv2d(linear.in_features // kernel**2, linear.out_features, kernel)
            layer.weight.data.copy_(linear.weight.data.view_as(layer.weight))
            assert layer.bias is not None
            layer.bias.data.copy_(linear.bias.data)
            layers += [layer, nn.ReLU(inplace=True)]
        self.network = nn.Sequential(features, *layers[:-1]).eval().to(device)
        self.params, self.device = params, device

    @torch.inference_mode()
    def __call__(self, shards: ShardSet) -> np.ndarray:
        """Posteriors, float32 (images, classes)."""
        split, found = shards.split("val"), []
        for number in range(len(split)):
            image = Image.open(io.BytesIO(split.read(number))).convert("RGB")
            views = []
            for scale in self.params.test_scales:
                pixels = transforms.pil_to_tensor(transforms.resize(image, [scale])).float()
                x = transforms.normalize(pixels, MEAN, [1.0, 1.0, 1.0])[None].to(self.device)
                views += [self.network(view).mean((2, 3)).softmax(1)[0] for view in (x, transforms.hflip(x))]
            found.append(torch.stack(views).mean(0).cpu().numpy())
        return np.stack(found)


def earlier(folder: Path) -> Path | None:
    """The tree of that commit; None where git does not have it."""
    tree, archive = folder / "earlier", folder / "earlier.tar"
    done = subprocess.run(["git", "archive", "-o", str(archive), EARLIER], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        print(f"earlier: not measured, git does not have commit {EARLIER} here", file=sys.stderr)
        return None
    tree.mkdir()
    subprocess.run(["tar", "-xf", str(archive), "-C", str(tree)], check=True)
    return tree


# run with the earlier tree as its folder: scales, batch_pixels, input size, shards
EARLIER_PROGRAM = """
import sys, time, types
from pathlib import Path
import torch
from vgg.distributed import joined
from vgg.evaluate import evaluate
from vgg.index import ShardSet
from vgg.model import Architecture, blank, initialise
from vgg.params.evaluate import EvaluateParams
scales, pixels, size, folder = sys.argv[1:]
params = EvaluateParams(weights="last", test_scales=[int(q) for q in scales.split(",")], flip=True,
                        softmax="after_mean", ceil_pooling=False, batch_pixels=int(pixels))
model = blank(Architecture("D", False, 4096, 1000, int(size)))
initialise(model, "glorot", 1)
shards = ShardSet(Path(folder))
manifest = {"run": {"data": {"classes_sha256": shards.classes_sha256}}, "network": {"input_size": int(size)},
            "pixels": {"mean": [123.7, 116.3, 103.5], "std": [1.0, 1.0, 1.0]}}
trained = types.SimpleNamespace(network=lambda: model, manifest=manifest, directory=Path("random"))
with joined() as group:
    images, kernel = (torch.zeros(shape, device=group.device) for shape in ((1, 3, 64, 64), (8, 3, 3, 3)))
    torch.nn.functional.conv2d(images, kernel)  # loads libraries
    start = time.perf_counter()
    evaluate(params, trained, shards, group, lambda *_: None)
    print(len(shards.split("val")) / (time.perf_counter() - start))
"""


def rate_of_earlier(tree: Path, params: EvaluateParams, shards: ShardSet, input_size: int) -> float:
    scales = ",".join(map(str, params.test_scales))
    given = [scales, str(params.batch_pixels), str(input_size), str(shards.directory)]
    done = subprocess.run(
        [sys.executable, "-c", EARLIER_PROGRAM, *given], cwd=tree, check=True, stdout=subprocess.PIPE, timeout=3600
    )
    return float(done.stdout)


def shares(model: VGG, params: EvaluateParams, shards: ShardSet, group: Group) -> dict[str, float]:
    """Shares of the time of evaluate() in one process, which also decodes."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def work(*args: Any, **kwargs: Any) -> Any:
            with clocked(spent, name, group.device):
                return function(*args, **kwargs)

        return work

    def timed_parts(name: str, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def work(*args: Any, **kwargs: Any) -> Iterator[Any]:
            parts = function(*args, **kwargs)
            while True:
                with clocked(spent, name, group.device):
                    part = next(parts, None)
                if part is None:
                    return
                yield part

        return work

    patches = [
        mock.patch.object(evaluation, "image_of", timed("decoding", evaluation.image_of)),
        mock.patch.object(evaluation, "resize", timed("resizing", evaluation.resize)),
        mock.patch.object(DenseVGG, "maps", timed("convolutions", DenseVGG.maps)),
        mock.patch.object(DenseVGG, "hidden", timed_parts("fc", DenseVGG.hidden)),
        mock.patch.object(DenseVGG, "scores", timed("fc", DenseVGG.scores)),
    ]
    start = time.perf_counter()
    with ExitStack() as stack:
        for patch in [*patches, mock.patch.dict(os.environ, {environment.WORKERS.name: "0"})]:
            stack.enter_context(patch)
        evaluated(model, params, shards, group)
    total = time.perf_counter() - start
    found = {name: round(seconds / total, 3) for name, seconds in spent.items()}
    return {**found, "waiting and the rest": round(1 - sum(found.values()), 3)}


@contextmanager
def clocked(spent: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    start = time.perf_counter()
    yield
    machine.synchronise(device)
    spent[name] += time.perf_counter() - start


def report(figures: dict[str, Any]) -> str:
    rows = [("", "images/s", "ours is")]
    for name, text in NAMES.items():
        if name in figures:
            ratio = f"{figures[f'ratio_{name}']:.2f} x" if f"ratio_{name}" in figures else ""
            rows.append((text, f"{figures[name]:,.2f}", ratio))
    return "\n".join([
        figures["machine"],
        f"{figures['kind']}; {figures['images']} images, network of {figures['input_size']} px, "
        f"Q = {figures['scales']}",
        "", machine.table(rows), "",
        "shares of its time: " + ", ".join(f"{name} {share:.1%}" for name, share in figures["shares"].items()),
        f"posteriors at most {figures['max_difference']} from the loop's; {figures['peak_rss_mb']:,.0f} MB resident; "
        f"50,000 images would take {figures['minutes_50000']:,.1f} minutes",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
