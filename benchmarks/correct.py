"""Is what the other benchmarks time also right, on this device: python -m benchmarks.correct [step] [repeated] [learns]

step: one update of ours (compiled, bf16) beside torchvision's vgg16 in float64, same weights and images.
repeated: two deterministic trainings, in processes with empty compiler caches, give the same bytes.
    A third that is stopped half-way and run again does too (resumed).
learns: the loss of one batch falls when it is repeated.
Exits with 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torchvision.models import vgg16

from benchmarks import machine
from benchmarks.loader import TRAIN, shard
from vgg.augment import EIGENVALUES, EIGENVECTORS
from vgg.batches import Crops
from vgg.checkpoint import Trained
from vgg.distributed import joined
from vgg.errors import Preempted
from vgg.index import ShardSet
from vgg.params.train import TrainParams
from vgg.run import start
from vgg.stopping import Never
from vgg.stream import training_batches
from vgg.train import train, update
from vgg.warmup import warm_up

NUM_IMAGES, NUM_CLASSES = 96, 8
SMALL = {  # a training that is over in some seconds
    **TRAIN, "classifier_width": 256, "init": "kaiming", "standardise": True, "batch_size": 16, "epochs": 4,
    "deterministic": True, "checkpoint_steps": 7,
}  # fmt: skip
WORSE = 1.5  # ours may be so many times as far from float64 as torchvision's own autocast is
FAR = 0.2  # and no farther than this in any case: bf16 flips many a ReLU
FALLS = 0.5  # what is left of the loss, at most


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.correct", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("checks", nargs="*", metavar="CHECK", help=f"{', '.join(CHECKS)} (default all)")
    flags.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = flags.parse_args()
    if unknown := set(args.checks) - set(CHECKS):
        flags.error(f"no such check: {', '.join(unknown)}")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        drawn(Path(folder))
        for name in args.checks or CHECKS:
            began = time.monotonic()
            try:
                found |= elsewhere(CHECKS[name], Path(folder))
            except Exception as error:  # the others are still worth knowing
                found[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(json.dumps({**found, "machine": machine.describe()}) if args.json else report(found))
    sys.exit(not all(finding["ok"] for finding in found.values()))


def elsewhere(work: Callable[..., Any], *arguments: Any) -> Any:
    """The same call in a fresh process: deterministic mode cannot be left, and a compiler remembers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def drawn(folder: Path) -> ShardSet:
    """Shards of smooth random pictures, a colour a class."""
    random = np.random.default_rng(5)
    images = {}
    for number in range(NUM_IMAGES):
        coarse = random.integers(0, 256, (6, 8, 3)) // 2 + 16 * (number % NUM_CLASSES)
        file = io.BytesIO()
        Image.fromarray(coarse.astype(np.uint8)).resize((320, 240), Image.Resampling.BICUBIC).save(file, "JPEG")
        images[f"class-{number % NUM_CLASSES}/{number:03d}.jpg"] = file.getvalue()
    logging.getLogger("vgg").setLevel(logging.ERROR)  # that both splits hold the same images is meant
    return shard(images, folder)


def params(**changes: Any) -> TrainParams:
    size = 64 if torch.cuda.is_available() else 32
    sizes = {"input_size": size, "train_scale": [size, 2 * size]}
    return TrainParams.model_validate_json(json.dumps({**SMALL, **sizes, **changes}))


def opened(folder: Path) -> ShardSet:
    return ShardSet(folder / "shards")


def batch_of(shards: ShardSet, wanted: TrainParams) -> Crops:
    return next(training_batches(shards.split("train"), wanted, 0, 1, 0, 1, 0, False))


# ---- one step beside torchvision's


def step(folder: Path) -> dict[str, Any]:
    shards, on_gpu = opened(folder), torch.cuda.is_available()
    size = 224 if on_gpu else 64
    wanted = params(
        input_size=size, train_scale=[size, 2 * size], classifier_width=4096 if on_gpu else 512, dropout=0.0,
        batch_size=32 if on_gpu else 8, deterministic=False,
    )  # fmt: skip
    with joined() as group:
        run = start(wanted, shards, folder, group, len(shards.split("train")))
        if on_gpu:
            warm_up(run, Never())
        before = {name: tensor.double().clone() for name, tensor in run.model.state_dict().items()}
        crops = batch_of(shards, wanted)
        update(run, crops)
        loss = float(run.window.total[3] / run.window.total[0])
        ours = {}
        for name, parameter in run.model.named_parameters():  # the first momentum is gradient and decay
            buffer = run.optimiser.state[parameter]["momentum_buffer"].double()
            ours[name] = buffer - wanted.weight_decay * before[name]
            moved = before[name] - run.schedule.rate(0) * buffer
            if not torch.allclose(parameter.detach().double(), moved, rtol=1e-5, atol=1e-7):
                raise AssertionError(f"{name}: the update is not the rate times the momentum")
        device, precision = group.device, run.precision
    there = Crops(*(tensor.to(device) for tensor in crops))
    pixels = prepared(there, shards, wanted)
    exact_loss, exact = torchvisions(before, pixels, there.labels, size, torch.float64)
    plain_loss, plain = torchvisions(before, pixels, there.labels, size, precision)
    errors = {
        "gradient": (distance(ours, exact), distance(plain, exact)),
        "worst_tensor": (worst(ours, exact), worst(plain, exact)),
        "loss": (abs(loss / exact_loss - 1), abs(plain_loss / exact_loss - 1)),
    }
    ok = all(own <= WORSE * its + 1e-3 for own, its in errors.values()) and errors["gradient"][0] <= FAR
    rounded = {name: [round(own, 6), round(its, 6)] for name, (own, its) in errors.items()}
    return {"step": {"ok": ok and not math.isnan(loss), "precision": str(precision).split(".")[1], **rounded}}


def prepared(crops: Crops, shards: ShardSet, wanted: TrainParams) -> torch.Tensor:
    """The network's input in float64, written down a second time."""
    device = crops.images.device
    mean, std, values = (
        torch.tensor(v, dtype=torch.float64, device=device) for v in (shards.mean, shards.std, EIGENVALUES)
    )
    vectors = torch.tensor(EIGENVECTORS, dtype=torch.float64, device=device)
    found = []
    for image, flip, colour in zip(crops.images, crops.flip, crops.colour, strict=True):
        pixels = image.double().flip(1) if flip else image.double()
        shift = vectors @ (wanted.colour_shift * colour.double() * values)
        found.append(((pixels + shift - mean) / std).permute(2, 0, 1))
    return torch.stack(found)


def torchvisions(
    weights: dict[str, torch.Tensor], pixels: torch.Tensor, labels: torch.Tensor, size: int, precision: torch.dtype
) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients of torchvision's vgg16, eager: in float64, or in float32 under autocast."""
    model: Any = vgg16(num_classes=NUM_CLASSES, dropout=0.0)
    model.avgpool = nn.Identity()  # at 224 pixels it does nothing
    model.classifier[0] = nn.Linear(512 * (size // 32) ** 2, weights["classifier.0.weight"].shape[0])
    model.classifier[3] = nn.Linear(model.classifier[0].out_features, model.classifier[0].out_features)
    model.classifier[6] = nn.Linear(model.classifier[0].out_features, NUM_CLASSES)
    model.load_state_dict(weights)
    kind = torch.float64 if precision == torch.float64 else torch.float32
    model, device = model.to(pixels.device, kind).train(), pixels.device.type
    with torch.autocast(device, precision) if precision == torch.bfloat16 else nullcontext():
        scores = model(pixels.to(kind))
    loss = functional.cross_entropy(scores if kind == torch.float64 else scores.float(), labels)
    loss.backward()
    return loss.item(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Of all tensors together, relative."""
    apart = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    return math.sqrt(apart / sum(float(tensor.square().sum()) for tensor in exact.values()))


def worst(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    return max(distance({name: found[name]}, {name: exact[name]}) for name in exact)


# ---- trainings that must give the same bytes


def repeated(folder: Path) -> dict[str, Any]:
    first, second = (elsewhere(trained, folder, name, 0) for name in ("first", "second"))
    stopped = elsewhere(trained, folder, "third", 12)
    third = elsewhere(trained, folder, "third", 0)
    return {
        "repeated": {"ok": first == second, "weights": [first[0][:16], second[0][:16]]},
        "resumed": {"ok": not stopped and first == third, "weights": [first[0][:16], third[0][:16]]},
    }


def trained(folder: Path, name: str, stop_after: int) -> list[str]:
    """sha256 of the weights and the momentum of a deterministic training; nothing if it was stopped."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"cache-{name}")
    wanted, directory = params(), folder / name
    stop = After(stop_after) if stop_after else Never()
    with joined() as group, contextlib.suppress(Preempted):
        train(wanted, opened(folder), directory, folder, {}, group, Quiet(), stop)
        path = Trained.open(directory).step.path
        files = [path / f"{kind}.safetensors" for kind in ("weights", "momentum")]
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return []


class After(Never):
    """Asks to stop when it has been asked so many times."""

    def __init__(self, times: int) -> None:
        self._left = times

    def __call__(self) -> bool:
        self._left -= 1
        return self._left < 0


class Quiet:
    """A watcher that tells nobody."""

    def progress(self, *_: Any) -> None: ...
    def saved(self) -> None: ...
    def point(self, *_: Any) -> None: ...


# ---- a batch learnt by heart


def learns(folder: Path) -> dict[str, Any]:
    shards, wanted = opened(folder), params(deterministic=False, colour_shift=0.0, learning_rate=0.005)
    with joined() as group:
        run = start(wanted, shards, folder, group, len(shards.split("train")))
        if group.device.type == "cuda":
            warm_up(run, Never())
        crops, losses = batch_of(shards, wanted), []
        for _ in range(60):
            run.window.total.zero_()
            update(run, crops)
            run.state.step += 1
            losses.append(float(run.window.total[3] / run.window.total[0]))
    first, last = losses[0], sum(losses[-5:]) / 5
    return {"learns": {"ok": last <= FALLS * first, "loss": [round(first, 4), round(last, 4)]}}


def report(found: dict[str, Any]) -> str:
    lines = [machine.describe()]
    for name, finding in found.items():
        details = ", ".join(f"{key} {value}" for key, value in finding.items() if key != "ok")
        lines.append(f"{name}: {'ok' if finding['ok'] else 'FAILED'}; {details}")
    return "\n".join(lines)


CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {"step": step, "repeated": repeated, "learns": learns}

if __name__ == "__main__":
    main()
