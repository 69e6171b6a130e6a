"""Training VGG-16 beside torchvision's own loop, all taking turns: python -m benchmarks.train [--images TAR_OR_FOLDER]

Ours is vgg.train.update on a run of vgg.run.start: preparing, checks and counters are in it.  The reference is
torchvision's vgg16 trained as its references train a classifier: eager, autocast, default SGD, loss and accuracy read
every step; its images are floats already.  With --images the same run of ours is also fed by the loader, from shards.
Images per second, medians of rounds.  What matters most is measured first.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from benchmarks import machine, profiles
from benchmarks.loader import TRAIN, shard
from vgg import roi
from vgg.batches import PREFETCH, ROW, Crops, as_crops
from vgg.distributed import joined
from vgg.feed import Feed
from vgg.index import ShardSet
from vgg.model import VGG, Architecture
from vgg.params.train import TrainParams
from vgg.run import Run, start
from vgg.stopping import Never
from vgg.stream import training_batches
from vgg.train import update
from vgg.warmup import warm_up
from vgg.workers import num_workers

NUM_CLASSES = 1000
PAPERS_SIZE = 224
NUM_BATCHES = 4  # of each competitor's: one batch alone would be learnt by heart, and zeros multiply faster
SETTINGS = {"lr": 0.001, "momentum": 0.9, "weight_decay": 0.0005}  # a rate at which random pixels do not diverge
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
ROUNDS_SHARE = 0.65  # of --seconds: until then all take turns, afterwards come the profile and the shards
RATIOS = {
    "ratio": "reference",
    "ratio_channels_last": "reference_channels_last",
    "ratio_same_shapes": "reference_same_shapes",
}


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.train", description=__doc__)
    flags.add_argument("--json", action="store_true", help="print the figures as JSON, a line when something is known")
    flags.add_argument("--images", type=Path, help="a tar or folder of JPEGs, <class>/<image>: feed real shards too")
    flags.add_argument("--decoder", choices=("cpu", "device"), default="cpu", help="of those JPEGs (default cpu)")
    flags.add_argument("--input-size", type=int, help="pixels (default 224; 64 on a CPU)")
    flags.add_argument("--batch", type=int, help="images a step (default 256; 8 on a CPU)")
    flags.add_argument("--steps", type=int, help="of a turn (default 20; 4 on a CPU)")
    flags.add_argument("--rounds", type=int, default=5, help="of the competitors' turns, at most (default 5)")
    flags.add_argument("--seconds", type=float, default=math.inf, help="for all of it: fewer rounds, but one at least")
    flags.add_argument(
        "--one-core", action="store_true", help="CPU time on one pinned core: for a CPU that does other things too"
    )
    flags.add_argument("--profile", type=Path, metavar="FILE", help="write where the time of our steps goes")
    args = flags.parse_args()
    ends = machine.Ends(args.seconds)
    if args.one_core:
        on_one_core()
    with joined() as group, tempfile.TemporaryDirectory() as folder:
        defaults = (PAPERS_SIZE, 256, 20) if group.device.type == "cuda" else (64, 8, 4)
        chosen = (args.input_size, args.batch, args.steps)
        size, batch, steps = (given or default for given, default in zip(chosen, defaults, strict=True))
        run = start(train_params(size, batch, args.decoder), thousand_classes(folder), Path(folder), group, NUM_CLASSES)
        figures = machine.Figures(args.json)
        measure(run, steps, args, ends, figures)
        if args.profile:
            figures.know(shares=profiles.profile(Ours(run).step, group.device, args.profile))
        if args.images:
            real = shard(machine.read_images(args.images), Path(folder) / "real")
            from_shards(run, real, steps, args.rounds, ends, figures)
    if not args.json:
        print(report(figures))


def on_one_core() -> None:
    """Pin this process to a core and measure its CPU time, which other processes hardly change."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    Turn.clock = staticmethod(time.process_time)


def measure(run: Run, steps: int, args: argparse.Namespace, ends: machine.Ends, figures: machine.Figures) -> None:
    device, size, batch = run.group.device, run.params.input_size, run.params.batch_size
    figures.know(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else machine.cpu(),
        kind=device.type, precision=str(run.precision).removeprefix("torch."), input_size=size, batch=batch,
        machine=machine.describe(),
    )  # fmt: skip
    warm_up(run, Never())
    ours = Ours(run)
    for _ in range(3):  # compilation, choice of algorithms, momentum
        ours.step()
    machine.forget_peak(device)
    ours.step()
    # before any other competitor has taken memory
    figures.know(peak_memory_mb=round(machine.peak_mb(device), 1))
    figures.know(matmul_tflops=round(matmul_tflops(device, run.precision), 3))

    competitors: dict[str, Turn] = {"ours": ours, "forward": Forward(run, ours.batches)}
    flops = 3 * forward_flops(run.model.architecture)

    def told(seconds: dict[str, float]) -> None:
        rates = {name: steps * batch / taken for name, taken in seconds.items()}
        tflops = flops * rates["ours"] / 1e12
        figures.know(
            **{name: round(rate, 2) for name, rate in rates.items()},
            **{name: round(rates["ours"] / rates[of], 3) for name, of in RATIOS.items() if of in rates},
            tflops=round(tflops, 3), matmul_share=round(tflops / figures["matmul_tflops"], 3),
        )  # fmt: skip

    with contextlib.ExitStack() as stack:
        for name, channels_last, same_shapes in REFERENCES:
            if not same_shapes or size != PAPERS_SIZE:
                reference = (size, batch, run.precision, channels_last, same_shapes)
                turn = Reference(device, *reference) if device.type == "cuda" else Elsewhere(args.one_core, reference)
                stack.callback(turn.close)
                competitors[name] = turn
        take_turns(competitors, args.rounds, steps, lambda: ends.left(ROUNDS_SHARE), told)
    expect_finite(run)


def from_shards(
    run: Run, real: ShardSet, steps: int, rounds: int, ends: machine.Ends, figures: machine.Figures
) -> None:
    """The same run fed from shards, taking turns with itself fed from memory."""
    fed, batch = FromShards(run, real), run.params.batch_size

    def told(seconds: dict[str, float]) -> None:
        if "real" in seconds:
            figures.know(
                real=round(steps * batch / seconds["real"], 2),
                real_share=round(seconds["ours"] / seconds["real"], 4),
                data_wait=round(statistics.median(fed.waits[1:]), 4),  # the first turn warms up
            )

    with contextlib.closing(fed):
        take_turns({"ours": Ours(run), "real": fed}, rounds, steps, ends.left, told)
    expect_finite(run)


def expect_finite(run: Run) -> None:
    if not math.isfinite(float(run.window.total[3])) or float(run.trouble):
        raise AssertionError("a step was not finite: no update was made then, so what was timed is not training")


def train_params(size: int, batch: int, decoder: str) -> TrainParams:
    scale = [size * 256 // PAPERS_SIZE, size * 512 // PAPERS_SIZE]
    changes = {"input_size": size, "batch_size": batch, "decoder": decoder, "train_scale": scale}
    rates = {"learning_rate": SETTINGS["lr"], **{k: SETTINGS[k] for k in ("momentum", "weight_decay")}}
    return TrainParams.model_validate_json(json.dumps({**TRAIN, **changes, **rates}))


def thousand_classes(folder: str) -> ShardSet:
    """Shards of a thousand classes, an image each: what start() wants to see of them is their number."""
    images = {}
    for number in range(NUM_CLASSES):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (number % 256, number // 256, 99)).save(file, "JPEG")
        images[f"{number:04d}/one.jpg"] = file.getvalue()
    return shard(images, Path(folder) / "thousand")


# ---- the competitors


class Turn:
    """Steps that are timed.  lead: of them, not timed, at the beginning of every turn.  clock: in seconds."""

    lead = 1
    clock = staticmethod(time.perf_counter)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def step(self) -> None:
        raise NotImplementedError

    def seconds(self, steps: int) -> float:
        """How long so many steps take, the device's work counted in."""
        for _ in range(self.lead):
            self.step()
        machine.synchronise(self.device)
        began = self.clock()
        for _ in range(steps):
            self.step()
        machine.synchronise(self.device)
        return self.clock() - began

    def close(self) -> None:
        """End what it has started."""


def take_turns(
    competitors: dict[str, Turn],
    rounds: int,
    steps: int,
    left: Callable[[], float],
    told: Callable[[dict[str, float]], None],
) -> None:
    """Rounds in which every competitor has its turn of so many steps: one at least, more while there is time.

    left: seconds until no further round may begin.  told: hears after every turn how many seconds a turn of each takes,
    the median so far.
    """
    found: dict[str, list[float]] = {}
    longest = 0.0
    for number in range(rounds + 1):
        if number > 1 and left() < longest:
            break
        began = time.monotonic()
        for name, turn in competitors.items():
            if turn.device.type == "cuda":
                torch.cuda.empty_cache()  # what one leaves behind in the allocator, another may need
            taken = turn.seconds(steps if number else 2)
            if number:  # the first round warms up
                found.setdefault(name, []).append(taken)
                told({name: statistics.median(turns) for name, turns in found.items()})
        longest = max(longest, time.monotonic() - began) if number else 0.0


class Ours(Turn):
    """Our engine, on uint8 batches that lie on the device."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.group.device)
        self.run, size, batch = run, run.params.input_size, run.params.batch_size
        self.batches = []
        for _ in range(NUM_BATCHES):
            images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
            rows = np.frombuffer(np.random.bytes(batch * ROW.itemsize), ROW).copy()
            rows["label"], rows["number"] = np.random.randint(0, NUM_CLASSES, batch), np.arange(batch)
            rows["flip"], rows["colour"] = np.random.rand(batch) < 0.5, np.random.randn(batch, 3)
            crops = as_crops(images, rows)
            there = Crops(*(tensor.to(self.device) for tensor in crops))
            self.batches.append(there._replace(numbers=crops.numbers))  # those the host reads
        self._next = itertools.cycle(self.batches)

    def step(self) -> None:
        update(self.run, next(self._next))
        self.run.state.step += 1


class FromShards(Turn):
    """The same run fed as training feeds it: shards, as many decoding processes, copies behind the computation.

    waits: for data, a share of every turn's time.
    """

    def __init__(self, run: Run, shards: ShardSet) -> None:
        super().__init__(run.group.device)
        on_device = run.params.decoder == "device"
        workers = 0 if on_device else num_workers(self.device, 1)
        # the processes fill their queues while others take their turns: what waits there is used up first
        self.lead = 1 + workers * (PREFETCH + 1)
        self.run, self.waits = run, []
        self._batches: Any = training_batches(
            shards.split("train"), run.params, 0, 1, 0, 10**9, workers, self.device.type == "cuda",
            roi.DeviceDecoder(self.device) if on_device else None,
        )  # fmt: skip
        self._feed = Feed(self._batches, self.device, Never())
        self._feed.fetch()

    def step(self) -> None:
        update(self.run, self._feed.take())
        self.run.state.step += 1
        began = self.clock()
        self._feed.fetch()
        self._waited.append(self.clock() - began)

    def seconds(self, steps: int) -> float:
        self._waited: list[float] = []
        taken = super().seconds(steps)
        self.waits.append(sum(self._waited[-steps:]) / taken)
        return taken

    def close(self) -> None:
        self._batches.close()


class Forward(Turn):
    """Centre crops as validation sees them: no gradient, no dropout."""

    def __init__(self, run: Run, batches: list[Crops]) -> None:
        super().__init__(run.group.device)
        self.run, self._next = run, itertools.cycle(batches)

    @torch.no_grad()
    def step(self) -> None:
        run = self.run
        inputs = run.prepare(next(self._next).images)
        with torch.autocast(self.device.type, run.precision, enabled=run.precision != torch.float32):
            run.model(inputs)

    def seconds(self, steps: int) -> float:
        self.run.model.eval()
        try:
            return super().seconds(steps)
        finally:
            self.run.model.train()


class Reference(Turn):
    """torchvision's vgg16 and the step of its references/classification/train.py.

    same_shapes: without the pooling to 7 x 7, which makes its classifier larger than ours below 224 pixels.
    """

    def __init__(
        self,
        device: torch.device,
        size: int,
        batch: int,
        precision: torch.dtype,
        channels_last: bool = False,
        same_shapes: bool = False,
    ) -> None:
        super().__init__(device)
        self.precision = precision
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = vgg16()
        if same_shapes:
            model.avgpool, model.classifier[0] = nn.Identity(), nn.Linear(512 * (size // 32) ** 2, 4096)
        self.model = model.to(self.device, memory_format=layout)
        self.criterion = nn.CrossEntropyLoss()
        self.optimiser = torch.optim.SGD(self.model.parameters(), **SETTINGS)
        batches = []
        for _ in range(NUM_BATCHES):
            images = torch.randn(batch, 3, size, size).to(self.device).contiguous(memory_format=layout)
            batches.append((images, torch.randint(0, NUM_CLASSES, (batch,)).to(self.device)))
        self._next = itertools.cycle(batches)

    def step(self) -> None:
        images, labels = next(self._next)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            scores = self.model(images)
            loss = self.criterion(scores, labels)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        with torch.inference_mode():  # top-1 and top-5, each read from the device, as is the loss
            hits = scores.topk(5)[1].t() == labels[None]
            for count in (1, 5):
                (hits[:count].flatten().sum(dtype=torch.float32) * (100 / len(labels))).item()
        loss.item()


class Elsewhere(Turn):
    """A reference in a process of its own: on a CPU, what a process asks of its allocator is a part of its speed."""

    def __init__(self, one_core: bool, reference: tuple[Any, ...]) -> None:
        super().__init__(torch.device("cpu"))
        spawn = multiprocessing.get_context("spawn")
        self._pipe, there = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(there, one_core, reference), daemon=True)
        self._process.start()

    def seconds(self, steps: int) -> float:
        self._pipe.send(steps)
        taken: float = self._pipe.recv()
        return taken

    def close(self) -> None:
        self._pipe.send(0)
        self._process.join()


def _serve(pipe: Connection, one_core: bool, reference: tuple[Any, ...]) -> None:
    if one_core:
        on_one_core()
    turn = Reference(torch.device("cpu"), *reference)
    while steps := pipe.recv():
        pipe.send(turn.seconds(steps))


# ---- what the figures are measured against


def forward_flops(architecture: Architecture) -> int:
    """Of one image, a multiplication and an addition counted as two."""
    size = architecture.input_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        VGG(architecture).eval()(torch.empty(1, 3, size, size))
    return counter.get_total_flops()


def matmul_tflops(device: torch.device, precision: torch.dtype) -> float:
    """The fastest product of two large square matrices of random numbers, in the precision of training."""
    best = 0.0
    for side in (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 3072):
        a, b = (torch.randn(side, side, device=device).to(precision) for _ in range(2))
        out = torch.empty_like(a)
        taken = []
        for _ in range(3 + 10):
            machine.synchronise(device)
            began = Turn.clock()
            torch.mm(a, b, out=out)
            machine.synchronise(device)
            taken.append(Turn.clock() - began)
        best = max(best, 2 * side**3 / statistics.median(taken[3:]) / 1e12)
    return best


# ---- what is printed


def targets(figures: dict[str, Any]) -> list[tuple[str, float | None, float, str]]:
    """(what, measured, goal, '>=' or '<'); goals are those of one H200, or of a CPU with AMX."""
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
