"""Training VGG-16 beside torchvision's own loop, all taking turns: python -m benchmarks.train [--images TAR_OR_FOLDER]

Ours is update() of vgg.training.loop, with preparation, checks and counters.  The reference is torchvision's vgg16,
trained as its references train a classifier: eager, autocast, default SGD, loss and accuracy read every step; its
images are floats already.  With --images our run is also fed by the loader, from shards.
Images per second, medians of rounds.  The most important figures are measured first.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import machine, profiles
from benchmarks.competitors import (
    NUM_CLASSES,
    PAPERS_SIZE,
    SETTINGS,
    Forward,
    FromShards,
    Ours,
    Reference,
    ReferenceProcess,
    Turn,
    on_one_core,
    take_turns,
)
from benchmarks.flops import forward_flops, matmul_tflops
from benchmarks.loader import TRAIN, shard
from runtime.distributed import joined
from runtime.shards.shardset import ShardSet
from runtime.stopping import Never
from vgg.params.train import TrainParams
from vgg.training.run import Run, start
from vgg.training.task import Task, describe
from vgg.training.warmup import warm_up

NAMES = {
    "ours": "ours",
    "reference": "torchvision",
    "reference_channels_last": "torchvision, channels_last",
    "reference_same_shapes": "torchvision, its fc6 cut to our size",
    "real": "ours, fed from shards",
    "forward": "ours, forward only (centre crops)",
}
REFERENCES = (  # name, channels_last, same shapes as ours
    ("reference", False, False),
    ("reference_channels_last", True, False),
    ("reference_same_shapes", False, True),
)
ROUNDS_SHARE = 0.65  # of --seconds: for the turns; the rest is for the profile and the shards
RATIOS = {
    "ratio": "reference",
    "ratio_channels_last": "reference_channels_last",
    "ratio_same_shapes": "reference_same_shapes",
}


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.train", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--json", action="store_true", help="print figures as JSON, a line each as they are measured")
    flags.add_argument("--images", type=Path, help="a tar or folder of JPEGs, <class>/<image>: also train from shards")
    flags.add_argument("--decoder", choices=("cpu", "device"), default="cpu", help="for those JPEGs (default cpu)")
    flags.add_argument("--input-size", type=int, help="pixels (default 224; 64 on a CPU)")
    flags.add_argument("--batch", type=int, help="images a step (default 256; 8 on a CPU)")
    flags.add_argument("--steps", type=int, help="of a turn (default 20; 4 on a CPU)")
    flags.add_argument("--rounds", type=int, default=5, help="turns of every competitor, at most (default 5)")
    flags.add_argument("--seconds", type=float, default=math.inf, help="time limit: fewer rounds, but at least one")
    flags.add_argument(
        "--one-core", action="store_true", help="CPU time on one pinned core: for a CPU that does other work too"
    )
    flags.add_argument("--profile", type=Path, metavar="FILE", help="write a profile of our steps")
    args = flags.parse_args()
    limit = machine.TimeLimit(args.seconds)
    if args.one_core:
        on_one_core()
    with joined() as group, tempfile.TemporaryDirectory() as folder:
        defaults = (PAPERS_SIZE, 256, 20) if group.device.type == "cuda" else (64, 8, 4)
        chosen = (args.input_size, args.batch, args.steps)
        size, batch, steps = (given or default for given, default in zip(chosen, defaults, strict=True))
        params, classes = train_params(size, batch, args.decoder), thousand_classes(Path(folder))
        task = Task(params=params, shards=classes, directory=Path(folder), code={})
        run = start(task, describe(task, group.device), group)
        figures = machine.Figures(args.json)
        measure(run, steps, args, limit, figures)
        if args.profile:
            figures.add(shares=profiles.profile(Ours(run).step, group.device, args.profile))
        if args.images:
            real = shard(machine.read_images(args.images), Path(folder) / "real")
            from_shards(run, real, steps, args.rounds, limit, figures)
    if not args.json:
        print(report(figures))


def measure(run: Run, steps: int, args: argparse.Namespace, limit: machine.TimeLimit, figures: machine.Figures) -> None:
    device, size, batch = run.group.device, run.params.input_size, run.params.batch_size
    figures.add(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else machine.cpu(),
        kind=device.type, precision=str(run.precision).removeprefix("torch."), input_size=size, batch=batch,
        machine=machine.describe(),
    )  # fmt: skip
    warm_up(run, Never())
    ours = Ours(run)
    for _ in range(3):  # compilation, choice of algorithms, momentum
        ours.step()
    machine.reset_peak(device)
    ours.step()
    figures.add(peak_memory_mb=round(machine.peak_mb(device), 1))  # before another competitor takes memory
    figures.add(matmul_tflops=round(matmul_tflops(device, run.precision), 3))

    competitors: dict[str, Turn] = {"ours": ours, "forward": Forward(run, ours.batches)}
    flops = 3 * forward_flops(run.model.architecture)

    def add_rates(seconds: dict[str, float]) -> None:
        rates = {name: steps * batch / taken for name, taken in seconds.items()}
        tflops = flops * rates["ours"] / 1e12
        figures.add(
            **{name: round(rate, 2) for name, rate in rates.items()},
            **{name: round(rates["ours"] / rates[other], 3) for name, other in RATIOS.items() if other in rates},
            tflops=round(tflops, 3), matmul_share=round(tflops / figures["matmul_tflops"], 3),
        )  # fmt: skip

    with contextlib.ExitStack() as stack:
        for name, channels_last, same_shapes in REFERENCES:
            if not same_shapes or size != PAPERS_SIZE:
                reference = (size, batch, run.precision, channels_last, same_shapes)
                if device.type == "cuda":
                    competitors[name] = Reference(device, *reference)
                else:
                    competitors[name] = ReferenceProcess(args.one_core, reference)
                stack.callback(competitors[name].close)
        take_turns(competitors, args.rounds, steps, lambda: limit.left(ROUNDS_SHARE), add_rates)
    expect_finite(run)


def from_shards(
    run: Run, real: ShardSet, steps: int, rounds: int, limit: machine.TimeLimit, figures: machine.Figures
) -> None:
    """The same run fed from shards, taking turns with itself fed from memory."""
    fed, batch = FromShards(run, real), run.params.batch_size

    def add_rates(seconds: dict[str, float]) -> None:
        if "real" in seconds:
            figures.add(
                real=round(steps * batch / seconds["real"], 2),
                real_share=round(seconds["ours"] / seconds["real"], 4),
                data_wait=round(statistics.median(fed.waits[1:]), 4),  # the first turn warms up
            )

    with contextlib.closing(fed):
        take_turns({"ours": Ours(run), "real": fed}, rounds, steps, limit.left, add_rates)
    expect_finite(run)


def expect_finite(run: Run) -> None:
    if not math.isfinite(float(run.window.total[3])) or float(run.trouble):
        raise AssertionError("a step was not finite, so it made no update: what was timed is not training")


def train_params(size: int, batch: int, decoder: str) -> TrainParams:
    scale = [size * 256 // PAPERS_SIZE, size * 512 // PAPERS_SIZE]
    changes = {"input_size": size, "batch_size": batch, "decoder": decoder, "train_scale": scale}
    rates = {"learning_rate": SETTINGS["lr"], **{k: SETTINGS[k] for k in ("momentum", "weight_decay")}}
    return TrainParams.model_validate_json(json.dumps({**TRAIN, **changes, **rates}))


def thousand_classes(folder: Path) -> ShardSet:
    """Shards of a thousand classes with one image each: start() needs only the number of classes."""
    images = {}
    for number in range(NUM_CLASSES):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (number % 256, number // 256, 99)).save(file, "JPEG")
        images[f"{number:04d}/one.jpg"] = file.getvalue()
    return shard(images, folder / "thousand")


def targets(figures: dict[str, Any]) -> list[tuple[str, float | None, float, str]]:
    """(what, measured, goal, '>=' or '<'); the goals are for one H200, or for a CPU with AMX."""
    if figures["kind"] == "cuda":
        memory = figures["peak_memory_mb"] / 1024 if figures["batch"] == 256 else None
        return [
            ("images/s in training (aim 5,500)", figures["ours"], 4500, ">="),
            ("times torchvision", figures["ratio"], 1.3, ">="),
            ("images/s forward", figures["forward"], 13_000, ">="),
            ("from shards, of synthetic", figures.get("real_share"), 0.97, ">="),
            ("GB of memory for a batch of 256", memory, 20, "<"),
        ]
    return [("times torchvision", figures["ratio"], 1.6 if figures["input_size"] >= PAPERS_SIZE else 1.2, ">=")]


def report(figures: dict[str, Any]) -> str:
    rows = [("", "images/s", "ours is")]
    for name, text in NAMES.items():
        if rate := figures.get(name):
            compared = name.startswith("reference")
            rows.append((text, f"{rate:,.1f}", f"{figures['ours'] / rate:.2f} x" if compared else ""))
    setting = f"{figures['input_size']} pixels, {figures['batch']} images a step, {figures['precision']}"
    lines = [figures["machine"], f"{figures['device']}; {setting}", "", machine.table(rows), ""]
    lines.append(
        f"{figures['tflops']:,.2f} TFLOP/s, {100 * figures['matmul_share']:.0f} % of the "
        f"{figures['matmul_tflops']:,.2f} of large matrix products; {figures['peak_memory_mb'] / 1024:.1f} GB of memory"
    )
    if "real" in figures:
        lines.append(
            f"from shards: {100 * figures['real_share']:.1f} % of synthetic; "
            f"the loop waits {100 * figures['data_wait']:.1f} % of its time for data"
        )
    if "shares" in figures:
        lines.append(", ".join(f"{name} {100 * share:.1f} %" for name, share in figures["shares"].items()))
    for what, value, goal, relation in targets(figures):
        if value is not None:
            met = value >= goal if relation == ">=" else value < goal
            where = "one H200" if figures["kind"] == "cuda" else "a CPU with AMX"
            lines.append(f"{what}: {value:,.2f} (on {where} {relation} {goal:,}: {'met' if met else 'NOT MET'})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
