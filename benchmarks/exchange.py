"""Our exchange of gradients between real processes, beside its prediction: python -m benchmarks.exchange [--json]

Every rank runs update() of vgg.training.loop with the DDP that connect() makes, over gloo.  The network is replaced by
one with its parameters (and DDP's limit of a bucket) divided by --divide, whose passes sleep: the times of
benchmarks.scaling for an H100, times --slower.  The network namespace of the ranks, which is theirs alone, sends no
faster than the cluster's network divided by both.  So a step lasts --slower times as long as on the cluster; bytes,
buckets and sleeps keep their proportions.  Predicted: the step without an exchange, as measured, and what the model
says is not hidden; both take turns, and the shortest of each counts, because other work on the machine only adds.
--agreement: the time in which all ranks agree to go on, before every step.
Needs Linux, ip, tc and unshare, as root or with user namespaces.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks import machine
from benchmarks.gradients import LIMITS, MIB, Layer, Pass, exposed, grouped, layers, ring_seconds
from benchmarks.scale import INPUTS, NETWORK
from benchmarks.scaling import passes
from benchmarks.train import thousand_classes, train_params
from runtime.distributed import Group, joined
from runtime.shards.batches import Crops
from vgg.training.loop import update
from vgg.training.run import Run, connect, start
from vgg.training.sgd import SGD
from vgg.training.task import Task, describe
from vgg.training.warmup import regroup

GBITS = (100, 400, 3200)  # out of a node of the cluster that is imitated
CLASSES, SIDE = 1000, 32  # outputs, pixels of the images, which nobody looks at
QUEUE_SECONDS = 5  # of what waits to be sent: nothing is dropped


class Region(torch.autograd.Function):
    """Sleeps as long as some layers compute, and returns gradients of their parameters."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, times: tuple[float, float], made: Any, *_: torch.Tensor
    ) -> torch.Tensor:
        ctx.seconds, ctx.made = times[1], made
        time.sleep(times[0])
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        time.sleep(ctx.seconds)
        return outputs[0], None, None, *ctx.made


class Sleeping(nn.Module):
    """The network of these passes.  regions: the classifier, and the convolutions, at once."""

    def __init__(self, done: Pass, regions: bool) -> None:
        super().__init__()
        forward_share = done.forward / (done.computed - done.forward)
        self.parts: list[tuple[tuple[float, float], list[nn.Parameter], list[torch.Tensor]]] = []
        self.all = nn.ParameterList()
        groups: list[list[tuple[Layer, float]]] = []
        for layer, seconds in reversed(done.backward):
            if not (regions and groups and groups[-1][-1][0].linear == layer.linear):
                groups.append([])
            groups[-1].append((layer, seconds))
        for group in groups:
            seconds = sum(taken for _, taken in group)
            sizes = [size for layer, _ in group for size in reversed(layer.parameters)]
            parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
            self.all.extend(parameters)
            self.parts.append(((forward_share * seconds, seconds), parameters, [torch.zeros(size) for size in sizes]))

    def forward(self, images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        outputs = torch.zeros(len(images), CLASSES)
        for times, parameters, made in self.parts:
            outputs = Region.apply(outputs, times, made, *parameters)
        return outputs


def smaller(size: int, divide: int) -> int:
    return max(1, size // divide)


def imitated(args: argparse.Namespace) -> Pass:
    """The passes of one rank, slower, over parameters that are smaller."""
    done = passes(layers(NETWORK), INPUTS, args.share, exchanged=False)
    backward = tuple(
        (
            dataclasses.replace(layer, parameters=tuple(smaller(n, args.divide) for n in layer.parameters)),
            args.slower * t,
        )
        for layer, t in done.backward
    )
    return Pass(args.slower * done.forward, backward)


def a_run(group: Group, folder: Path) -> Run:
    """A run of the real network, at step 0, whose update() takes a batch of an image for every rank."""
    params = train_params(SIDE, group.world_size, "cpu").model_copy(update={"classifier_width": 1})
    task = Task(params=params, shards=thousand_classes(folder), directory=folder, code={})
    return start(task, describe(task, group.device), group)


def sleeping(run: Run, done: Pass, regions: bool, compression: str) -> Run:
    """The same run with a network that sleeps."""
    model = Sleeping(done, regions)
    optimiser = SGD(model.parameters(), momentum=0.9, weight_decay=0.0005, skip=run.trouble)
    params = run.params.model_copy(update={"gradient_compression": compression})
    return dataclasses.replace(run, params=params, model=model, replica=model, optimiser=optimiser)  # type: ignore[arg-type]


def crops() -> Crops:
    zeros = torch.zeros(1, dtype=torch.int64)
    images = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)
    return Crops(images, zeros, zeros, zeros.bool(), torch.zeros(1, 3), zeros, torch.zeros(1, 4))


def seconds_of_steps(run: Run, steps: int) -> list[float]:
    """Of the slowest rank, for every step; the first is not counted."""
    found = []
    for _ in range(1 + steps):
        run.group.barrier()
        began = time.perf_counter()
        update(run, crops())
        found.append(max(run.group.gather(time.perf_counter() - began)))
    return found[1:]


def measure(group: Group, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """On every rank: the rows, one for every network, way of computing and compression."""
    logging.disable(logging.WARNING)  # the images are all alike
    done = imitated(args)
    with tempfile.TemporaryDirectory() as folder:
        real = a_run(group, Path(folder))
    for regions, compression in ((True, "none"), (True, "bf16"), (False, "none")):
        run, without = (sleeping(real, done, regions, compression) for _ in range(2))
        cap = LIMITS[1] // args.divide
        small = functools.partial(nn.parallel.DistributedDataParallel, bucket_cap_mb=cap / MIB)
        with mock.patch.object(nn.parallel, "DistributedDataParallel", small):
            connect(run)
        regroup(run)
        sent = grouped(done.ready(regions), compression == "bf16", (cap,))
        for gbit in args.gbit:
            bandwidth = cluster_bytes(gbit) / args.divide / args.slower
            limit(group, bandwidth)
            pairs = [(seconds_of_steps(without, 1)[0], seconds_of_steps(run, 1)[0]) for _ in range(args.steps)]
            alone, seen = min(alone for alone, _ in pairs), [seen for _, seen in pairs]
            transfers = [(at, ring_seconds(size, group.world_size, bandwidth)) for at, size in sent]
            predicted = alone + exposed(transfers, done.computed)
            whole = sum(taken for _, taken in transfers)
            yield {
                "ranks": group.world_size, "gbit": gbit, "regions": regions, "compression": compression,
                "buckets": [round(size) for _, size in sent], "alone": alone, "transfers": whole,
                "predicted": predicted, "seen": min(seen), "median": statistics.median(seen), "most": max(seen),
                "ratio": min(seen) / predicted, "without_overlap": alone + whole,
            }  # fmt: skip
        expect_buckets(run, [size for _, size in grouped(done.ready(regions), limits=(cap,))], regions)


def agreement(group: Group, times: int = 300) -> float:
    """Median seconds of Group.any, which every step has."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        group.any(False)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def cluster_bytes(gbit: float) -> float:
    """Bytes/s of a rank, if a node has one and its network carries all it can."""
    return gbit / 8 * 1e9


def expect_buckets(run: Run, predicted: list[float], regions: bool) -> None:
    """Raises AssertionError if DDP groups the gradients otherwise; a bias may be in the bucket beside.

    In a region only the classifier's two buckets count: the order of convolutions that are there at once is open.
    """
    text = str(run.replica._get_ddp_logging_data()["rebuilt_bucket_sizes"])  # type: ignore[operator]
    found = [float(size) for size in text.split(",")]
    compared = slice(2 if regions else None)
    near = [abs(a - b) < 0.001 * b for a, b in zip(found[compared], predicted[compared], strict=True)]
    if not all(near) or sum(found) != sum(predicted):
        raise AssertionError(f"DDP has buckets of {found} bytes, the model of {predicted}")


def limit(group: Group, bandwidth: float) -> None:
    """Have every rank send at `bandwidth`, bytes/s: they share the loopback device."""
    if group.is_first:
        rate = f"{round(8 * bandwidth * group.world_size / 1000)}kbit"
        shaping = ["rate", rate, "burst", "512kb", "latency", f"{QUEUE_SECONDS}s"]
        subprocess.run(["tc", "qdisc", "replace", "dev", "lo", "root", "tbf", *shaping], check=True, timeout=60)
    group.barrier()


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.exchange", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--json", action="store_true", help="print the figures as JSON, a line for every row")
    flags.add_argument("--agreement", action="store_true", help="measure the agreement on going on, and nothing else")
    flags.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="processes (default 2 and 4)")
    flags.add_argument("--gbit", type=float, nargs="+", default=GBITS, help="networks (default 100, 400, 3200)")
    flags.add_argument("--share", type=int, default=32, help="images of a rank (default 32)")
    flags.add_argument("--divide", type=int, default=64, help="parameters and buckets (default by 64)")
    flags.add_argument("--slower", type=float, default=100, help="than a GPU (default 100 times)")
    flags.add_argument("--steps", type=int, default=7, help="of every row (default 7)")
    flags.add_argument("--seconds", type=float, default=1800, help="time limit of a number of ranks (default 1800)")
    args = flags.parse_args()
    if os.environ.get("RANK"):
        torch.set_num_threads(1)
        with joined() as group, contextlib.suppress(BrokenPipeError):
            rows = (
                [{"ranks": group.world_size, "agreement": agreement(group)}] if args.agreement else measure(group, args)
            )
            for row in rows:
                if group.is_first:
                    print(json.dumps(row), flush=True)
        return
    if not args.json:
        print(
            f"{machine.describe()}\n{args.share} images a rank, ms of the cluster\n\n{'' if args.agreement else TITLE}"
        )
    for ranks in args.ranks:
        for row in processes(ranks, args.seconds):
            print(json.dumps(row) if args.json else line(row, args.slower), flush=True)


def processes(ranks: int, seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of this many ranks, in a network namespace that ends with them."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "29500"]
    inside = " ".join(["ip link set lo up && exec timeout", str(seconds), '"$@"'])
    command = ["unshare", "--map-root-user", "--net", "sh", "-c", inside, "sh", *run, "-m", "benchmarks.exchange"]
    with subprocess.Popen(
        [*command, *sys.argv[1:]], stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as started:
        assert started.stdout
        for text in started.stdout:
            yield json.loads(text)
    if started.returncode:
        raise SystemExit(f"the processes ended with {started.returncode}; see their messages above")


TITLE = f"{'ranks':>5} {'Gbit/s':>7} {'backward':>9} {'sent':>5} {'alone':>7} {'transfer':>9} {'no overlap':>11}"
TITLE += f" {'predicted':>10} {'seen':>7} {'median':>7} {'most':>7} {'seen/predicted':>15}"


def line(row: dict[str, Any], slower: float) -> str:
    if "agreement" in row:
        return f"{row['ranks']} ranks agree in {1e6 * row['agreement']:,.0f} us"
    ms = {name: 1000 * value / slower for name, value in row.items() if isinstance(value, float)}
    how = "2 regions" if row["regions"] else "by layer"
    return (
        f"{row['ranks']:5} {row['gbit']:7g} {how:>9} {'bf16' if row['compression'] == 'bf16' else 'fp32':>5} "
        f"{ms['alone']:7.2f} {ms['transfers']:9.2f} {ms['without_overlap']:11.2f} {ms['predicted']:10.2f} "
        f"{ms['seen']:7.2f} {ms['median']:7.2f} {ms['most']:7.2f} {row['ratio']:15.3f}"
    )


if __name__ == "__main__":
    main()
