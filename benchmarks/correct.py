"""Checks that what the other benchmarks time is also right, on this device: python -m benchmarks.correct [CHECK...]

decoders: tests/vgg/test_roi.py, the tests of decoding on this device.
step: one update of ours (compiled, bf16) beside torchvision's vgg16 in float64, same weights, images and dropout.
repeated: two deterministic trainings, in processes with empty compiler caches, give the same bytes.
    So does a third one that is stopped half-way and run again (resumed).
Exits with 1 if a check fails.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import machine
from benchmarks.exact import distance, loss_and_gradients, prepared, worst
from benchmarks.loader import TRAIN, shard
from runtime.distributed import joined
from runtime.errors import Preempted
from runtime.shards.batches import Crops
from runtime.shards.loader import Loader
from runtime.shards.shardset import ShardSet
from runtime.stopping import Never
from vgg.data.stream import training_batches
from vgg.network.trained import Trained
from vgg.params.train import TrainParams
from vgg.training.loop import train, update
from vgg.training.run import start
from vgg.training.task import Task, describe
from vgg.training.warmup import warm_up

NUM_IMAGES, NUM_CLASSES = 96, 8
SMALL = {  # a training of some seconds
    **TRAIN, "configuration": "A", "classifier_width": 256, "init": "kaiming", "standardise": True, "batch_size": 16,
    "epochs": 2, "deterministic": True, "checkpoint_steps": 5,
}  # fmt: skip
STOP_AFTER = 8  # calls of stop(): about half of the 12 steps
WORSE = 1.5  # our distance from float64 may be this many times that of torchvision's own autocast
ONE_LOSS = 2**-8  # the loss, one number that may be near by chance, may differ by a last place of bfloat16 more
FAR = 0.2  # the largest distance in any case: bf16 flips many ReLUs


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.correct", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("checks", nargs="*", metavar="CHECK", help=f"{', '.join(CHECKS)} (default all)")
    flags.add_argument("--json", action="store_true", help="print results as JSON, a line each as they are known")
    args = flags.parse_args()
    if unknown := set(args.checks) - set(CHECKS):
        flags.error(f"no such check: {', '.join(unknown)}")
    results = machine.Figures(args.json)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.checks or CHECKS:
            try:
                CHECKS[name](Path(folder), results)
            except Exception as error:  # run the other checks all the same
                results.add(**{name: {"ok": False, "error": f"{type(error).__name__}: {error}".split("\n")[0][:500]}})
    if not args.json:
        print(report(results))
    for name, result in results.items():
        if not result["ok"]:
            print(f"{name}: {result.get('error', result)}", file=sys.stderr)
    sys.exit(not all(result["ok"] for result in results.values()))


def new_process() -> ProcessPoolExecutor:
    """A new process, started at once: deterministic mode cannot be switched off, and a compiler keeps its results."""
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    process.submit(int)
    return process


def draw(folder: Path) -> ShardSet:
    """Shards of smooth random pictures, a colour a class."""
    random = np.random.default_rng(5)
    images = {}
    for number in range(NUM_IMAGES):
        coarse = random.integers(0, 256, (6, 8, 3)) // 2 + 16 * (number % NUM_CLASSES)
        file = io.BytesIO()
        Image.fromarray(coarse.astype(np.uint8)).resize((320, 240), Image.Resampling.BICUBIC).save(file, "JPEG")
        images[f"class-{number % NUM_CLASSES}/{number:03d}.jpg"] = file.getvalue()
    logging.getLogger("vgg").setLevel(logging.ERROR)  # both splits hold the same images on purpose
    return shard(images, folder)


def params_with(**changes: Any) -> TrainParams:
    size = 64 if torch.cuda.is_available() else 32
    sizes = {"input_size": size, "train_scale": [size, 2 * size]}
    return TrainParams.model_validate_json(json.dumps({**SMALL, **sizes, **changes}))


def shards_in(folder: Path) -> ShardSet:
    if not (folder / "shards/manifest.json").exists():
        draw(folder)
    return ShardSet(folder / "shards")


# ---- crops beside Pillow's


def decoders(_: Path, results: machine.Figures) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tests = ["-m", "pytest", "tests/vgg/test_roi.py", "-k", f"device and {device}", "-n", "4", "-vv", "--no-header"]
    counts = {"passed": 0, "failed": 0, "error": 0, "skipped": 0}
    command = [sys.executable, *tests, "-p", "no:cacheprovider"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", errors="backslashreplace") as running:
        assert running.stdout
        for line in running.stdout:
            if outcome := re.match(r"\[gw\d+\] .*(PASSED|FAILED|ERROR|SKIPPED) tests/", line):
                counts[outcome[1].lower()] += 1
            else:
                print(line, end="", file=sys.stderr)
            if outcome and sum(counts.values()) % 10 == 1:
                results.add(decoders={"ok": False, **counts})  # until the tests have ended
    ok = running.returncode == 0 and counts["passed"] == sum(counts.values()) > 0
    results.add(decoders={"ok": ok, **counts})


# ---- one step beside torchvision's


def step(folder: Path, results: machine.Figures) -> None:
    shards, on_gpu = shards_in(folder), torch.cuda.is_available()
    size = 224 if on_gpu else 64
    params = params_with(
        configuration="D", input_size=size, train_scale=[size, 2 * size], classifier_width=4096 if on_gpu else 512,
        batch_size=32 if on_gpu else 8, deterministic=False,
    )  # fmt: skip
    task = Task(params=params, shards=shards, directory=folder, code={})
    with joined() as group:
        run = start(task, describe(task, group.device), group)
        regions = (run.prepare, run.model.features, run.model.classifier)
        if not on_gpu:  # start() compiles for a GPU only
            for region in regions:
                region.compile(dynamic=False)
        warm_up(run, Never())
        # a region that the compiler skips silently gives right results, but slowly
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        before = {name: tensor.double().clone() for name, tensor in run.model.state_dict().items()}
        crops = next(training_batches(Loader(), shards.split("train"), params, range(1)))
        update(run, crops)
        loss = float(run.window.total[3] / run.window.total[0])
        ours = {}
        for name, parameter in run.model.named_parameters():  # the first momentum is gradient plus weight decay
            buffer = run.optimiser.momentum[parameter].double()
            ours[name] = buffer - params.weight_decay * before[name]
            moved = before[name] - run.schedule.rate(0) * buffer
            if not torch.allclose(parameter.detach().double(), moved, rtol=1e-5, atol=1e-7):
                raise AssertionError(f"{name}: the update is not the rate times the momentum")
        device, precision = group.device, run.precision
    on_device = Crops(*(tensor.to(device) for tensor in crops))
    pixels = prepared(on_device, shards, params)
    exact_loss, exact = loss_and_gradients(before, pixels, on_device, NUM_CLASSES, torch.float64)
    plain_loss, plain = loss_and_gradients(before, pixels, on_device, NUM_CLASSES, precision)
    errors = {
        "gradient": (distance(ours, exact), distance(plain, exact)),
        "worst_tensor": (worst(ours, exact), worst(plain, exact)),
        "loss": (abs(loss / exact_loss - 1), abs(plain_loss / exact_loss - 1)),
    }
    spare = {"loss": ONE_LOSS}
    ok = all(own <= WORSE * its + spare.get(name, 1e-3) for name, (own, its) in errors.items())
    ok = ok and errors["gradient"][0] <= FAR and not math.isnan(loss)
    rounded = {name: [round(own, 6), round(its, 6)] for name, (own, its) in errors.items()}
    results.add(step={
        "ok": ok and compiled >= len(regions), "compiled_regions": compiled, "of": len(regions),
        "precision": str(precision).split(".")[1], **rounded,
    })  # fmt: skip


# ---- trainings that must give the same bytes


def repeated(folder: Path, results: machine.Figures) -> None:
    shards_in(folder)
    with new_process() as first, new_process() as second, new_process() as third, new_process() as again:
        runs = [first.submit(digests, folder, "first", 0), second.submit(digests, folder, "second", 0)]
        stopped = third.submit(digests, folder, "third", STOP_AFTER)
        one, other = (run.result() for run in runs)
        results.add(repeated={"ok": one == other, "weights": [one[0][:16], other[0][:16]]})
        half_way = stopped.result()
        resumed = again.submit(digests, folder, "third", 0).result()
        results.add(resumed={"ok": not half_way and one == resumed, "weights": [one[0][:16], resumed[0][:16]]})


def digests(folder: Path, name: str, stop_after: int) -> list[str]:
    """sha256 of weights and momentum of a deterministic training; empty if it was stopped."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"cache-{name}")
    task = Task(params=params_with(), shards=shards_in(folder), directory=folder / name, code={})
    stop = StopAfter(stop_after) if stop_after else Never()
    with joined() as group, contextlib.suppress(Preempted):
        train(task, group, Silent(), stop)
        path = Trained.open(task.directory).step.path
        files = [path / f"{kind}.safetensors" for kind in ("weights", "momentum")]
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return []


class StopAfter(Never):
    """Requests a stop after this many calls."""

    def __init__(self, calls: int) -> None:
        self._left = calls

    def __call__(self) -> bool:
        self._left -= 1
        return self._left < 0


class Silent:
    """A Reporter that reports nothing."""

    def progress(self, *_: Any) -> None: ...
    def saved(self) -> None: ...
    def point(self, *_: Any) -> None: ...


def report(results: machine.Figures) -> str:
    lines = [machine.describe()]
    for name, result in results.items():
        details = ", ".join(f"{key} {value}" for key, value in result.items() if key != "ok")
        lines.append(f"{name}: {'ok' if result['ok'] else 'FAILED'}; {details}")
    return "\n".join(lines)


CHECKS: dict[str, Callable[[Path, machine.Figures], None]] = {"decoders": decoders, "step": step, "repeated": repeated}

if __name__ == "__main__":
    main()
