"""Is what the other benchmarks time also right, on this device: python -m benchmarks.correct [CHECK...]

decoders: tests/test_roi.py of what decodes where the network is.
step: one update of ours (compiled, bf16) beside torchvision's vgg16 in float64, same weights, images and dropout.
repeated: two deterministic trainings, in processes with empty compiler caches, give the same bytes.
    A third that is stopped half-way and run again does too (resumed).
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
import re
import subprocess
import sys
import tempfile
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
from vgg.model import Dropout
from vgg.params.train import TrainParams
from vgg.run import start
from vgg.stopping import Never
from vgg.stream import training_batches
from vgg.train import train, update
from vgg.warmup import warm_up

NUM_IMAGES, NUM_CLASSES = 96, 8
SMALL = {  # a training that is over in some seconds
    **TRAIN, "configuration": "A", "classifier_width": 256, "init": "kaiming", "standardise": True, "batch_size": 16,
    "epochs": 2, "deterministic": True, "checkpoint_steps": 5,
}  # fmt: skip
STOP_AFTER = 8  # times that training asks whether to stop: about half of its 12 steps
WORSE = 1.5  # ours may be so many times as far from float64 as torchvision's own autocast is
ONE_LOSS = 2**-8  # and the loss, one number that may be near by chance, by the last place of a bfloat16 more
FAR = 0.2  # and no farther than this in any case: bf16 flips many a ReLU


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.correct", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("checks", nargs="*", metavar="CHECK", help=f"{', '.join(CHECKS)} (default all)")
    flags.add_argument("--json", action="store_true", help="print the findings as JSON, a line each when it is known")
    args = flags.parse_args()
    if unknown := set(args.checks) - set(CHECKS):
        flags.error(f"no such check: {', '.join(unknown)}")
    found = machine.Figures(args.json)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.checks or CHECKS:
            try:
                CHECKS[name](Path(folder), found)
            except Exception as error:  # the others are still worth knowing
                found.know(**{name: {"ok": False, "error": f"{type(error).__name__}: {error}".split("\n")[0][:500]}})
    if not args.json:
        print(report(found))
    for name, finding in found.items():
        if not finding["ok"]:
            print(f"{name}: {finding.get('error', finding)}", file=sys.stderr)
    sys.exit(not all(finding["ok"] for finding in found.values()))


def fresh() -> ProcessPoolExecutor:
    """A process of its own, which begins to load: deterministic mode cannot be left, and a compiler remembers."""
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    process.submit(int)
    return process


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
    if not (folder / "shards/manifest.json").exists():
        drawn(folder)
    return ShardSet(folder / "shards")


def batch_of(shards: ShardSet, wanted: TrainParams) -> Crops:
    return next(training_batches(shards.split("train"), wanted, 0, 1, 0, 1, 0, False))


# ---- crops beside Pillow's


def decoders(_: Path, found: machine.Figures) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tests = ["-m", "pytest", "tests/test_roi.py", "-k", f"device and {device}", "-n", "4", "-vv", "--no-header"]
    counts = {"passed": 0, "failed": 0, "error": 0, "skipped": 0}
    command = [sys.executable, *tests, "-p", "no:cacheprovider"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        for line in running.stdout:
            if outcome := re.match(r"\[gw\d+\] .*(PASSED|FAILED|ERROR|SKIPPED) tests/", line):
                counts[outcome[1].lower()] += 1
            else:
                print(line, end="", file=sys.stderr)
            if outcome and sum(counts.values()) % 10 == 1:
                found.know(decoders={"ok": False, **counts})  # until they have ended
    ok = running.returncode == 0 and counts["passed"] == sum(counts.values()) > 0
    found.know(decoders={"ok": ok, **counts})


# ---- one step beside torchvision's


def step(folder: Path, found: machine.Figures) -> None:
    shards, on_gpu = opened(folder), torch.cuda.is_available()
    size = 224 if on_gpu else 64
    wanted = params(
        configuration="D", input_size=size, train_scale=[size, 2 * size], classifier_width=4096 if on_gpu else 512,
        batch_size=32 if on_gpu else 8, deterministic=False,
    )  # fmt: skip
    with joined() as group:
        run = start(wanted, shards, folder, group, len(shards.split("train")))
        regions = (run.prepare, run.model.features, run.model.classifier)
        if not on_gpu:  # where a run leaves them as they are
            for region in regions:
                region.compile(dynamic=False)
        warm_up(run, Never())
        # a region that the compiler passes over in silence would be right, and slow
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
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
    exact_loss, exact = torchvisions(before, pixels, there, torch.float64)
    plain_loss, plain = torchvisions(before, pixels, there, precision)
    errors = {
        "gradient": (distance(ours, exact), distance(plain, exact)),
        "worst_tensor": (worst(ours, exact), worst(plain, exact)),
        "loss": (abs(loss / exact_loss - 1), abs(plain_loss / exact_loss - 1)),
    }
    spare = {"loss": ONE_LOSS}
    ok = all(own <= WORSE * its + spare.get(name, 1e-3) for name, (own, its) in errors.items())
    ok = ok and errors["gradient"][0] <= FAR and not math.isnan(loss)
    rounded = {name: [round(own, 6), round(its, 6)] for name, (own, its) in errors.items()}
    found.know(step={
        "ok": ok and compiled >= len(regions), "compiled_regions": compiled, "of": len(regions),
        "precision": str(precision).split(".")[1], **rounded,
    })  # fmt: skip


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


class Keyed(nn.Module):
    """Our dropout with the keys of a batch, as torchvision's classifier calls it."""

    def __init__(self, p: float, layer: int, keys: torch.Tensor) -> None:
        super().__init__()
        self.dropout, self.keys = Dropout(p, layer), keys

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.dropout(outputs, self.keys)


def torchvisions(
    weights: dict[str, torch.Tensor], pixels: torch.Tensor, crops: Crops, precision: torch.dtype
) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients of torchvision's vgg16, eager: in float64, or in float32 under autocast.

    What it drops is what ours drops, eager too.
    """
    size, labels = pixels.shape[-1], crops.labels
    model: Any = vgg16(num_classes=NUM_CLASSES)
    model.avgpool = nn.Identity()  # at 224 pixels it does nothing
    for place, layer in ((2, 6), (5, 7)):
        model.classifier[place] = Keyed(model.classifier[place].p, layer, crops.dropout)
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


def repeated(folder: Path, found: machine.Figures) -> None:
    opened(folder)
    with fresh() as first, fresh() as second, fresh() as third, fresh() as again:
        runs = [first.submit(trained, folder, "first", 0), second.submit(trained, folder, "second", 0)]
        stopped = third.submit(trained, folder, "third", STOP_AFTER)
        one, other = (run.result() for run in runs)
        found.know(repeated={"ok": one == other, "weights": [one[0][:16], other[0][:16]]})
        halves = stopped.result()
        resumed = again.submit(trained, folder, "third", 0).result()
        found.know(resumed={"ok": not halves and one == resumed, "weights": [one[0][:16], resumed[0][:16]]})


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


def report(found: machine.Figures) -> str:
    lines = [machine.describe()]
    for name, finding in found.items():
        details = ", ".join(f"{key} {value}" for key, value in finding.items() if key != "ok")
        lines.append(f"{name}: {'ok' if finding['ok'] else 'FAILED'}; {details}")
    return "\n".join(lines)


CHECKS: dict[str, Callable[[Path, machine.Figures], None]] = {"decoders": decoders, "step": step, "repeated": repeated}

if __name__ == "__main__":
    main()
