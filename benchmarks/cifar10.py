"""recipes/cifar10*.yaml from JPEGs to the paper's evaluation: python -m benchmarks.cifar10 TAR... --work DIR

Shard, train and evaluate by vgg/ alone: no tracking, no registry.  Stopped (SIGTERM, Ctrl-C) it saves and exits with
75; the same command goes on.  Prints top-1 over the recipe's scales, minutes and images per second.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine
from components.program import StopSignal
from vgg.checkpoint import Trained
from vgg.distributed import joined
from vgg.errors import Preempted
from vgg.evaluate import evaluate
from vgg.index import ShardSet
from vgg.params import load
from vgg.params.evaluate import EvaluateParams
from vgg.params.shard import ShardParams
from vgg.params.train import TrainParams
from vgg.shards import pack
from vgg.sources import Folder
from vgg.targets import Directory
from vgg.train import train

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SPLITS = {"train": "train", "test": "val", "val": "val"}
GOALS = {"cifar10": 0.93, "cifar10-bn": 0.94}  # top-1, as the recipes say
LINE_SECONDS = 20  # between two lines of progress


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.cifar10", description=__doc__)
    flags.add_argument("tars", type=Path, nargs="+", metavar="TAR", help="of {train,test}/<class>/<image>.jpg")
    flags.add_argument("--work", type=Path, required=True, help="a folder for shards and checkpoints; kept")
    flags.add_argument("--recipe", choices=GOALS, default="cifar10", help="of recipes/ (default cifar10)")
    flags.add_argument("--limit", type=int, help="images of a class and split, at most: to try the program")
    flags.add_argument("--epochs", type=int, help="instead of the recipe's")
    flags.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = flags.parse_args()
    stop = StopSignal()
    recipe = str(RECIPES / f"{args.recipe}.yaml")
    sharding = load(recipe, "shard", ShardParams)
    training = load(recipe, "train", TrainParams)
    evaluating = load(recipe, "evaluate", EvaluateParams)
    if args.epochs:
        training = training.model_copy(update={"epochs": args.epochs})
    shards = packed(args.tars, args.work, sharding, args.limit)
    with joined() as group:
        began = time.monotonic()
        try:
            train(training, shards, args.work / args.recipe, args.work, {}, group, Lines(), stop)
        except Preempted as stopped:
            spend(args.work / f"{args.recipe}.seconds.json", time.monotonic() - began)
            print(stopped, file=sys.stderr)
            sys.exit(stopped.exit_code)
        seconds = spend(args.work / f"{args.recipe}.seconds.json", time.monotonic() - began)
        began = time.monotonic()
        trained = Trained.open(args.work / args.recipe, evaluating.weights)
        found = evaluate(evaluating, trained, shards, group, lambda *_: None)
        evaluated = time.monotonic() - began
    num_images = training.epochs * len(shards.split("train"))
    figures = {
        "goal": GOALS[args.recipe],
        "top1": round(1 - found.metrics["top1_error"], 4),
        "mode": found.metrics["headline"],
        "modes": {name: round(1 - mode["top1_error"], 4) for name, mode in found.metrics["modes"].items()},
        "num_images": found.metrics["num_images"],
        "epochs": training.epochs,
        "train_minutes": round(seconds / 60, 2),
        "images_per_second": round(num_images / seconds, 1),
        "evaluate_minutes": round(evaluated / 60, 2),
        "machine": machine.describe(),
    }
    print(json.dumps(figures) if args.json else report(figures))


def packed(tars: list[Path], work: Path, sharding: ShardParams, limit: int | None) -> ShardSet:
    """The shards in the folder, made from the tars if they are not there."""
    if not (work / "shards/manifest.json").exists():
        counts: dict[str, int] = {}
        for tar in tars:
            for name, jpeg in machine.read_images(tar).items():
                split, image_class, file = Path(name).parts[-3:]
                place = work / "images" / SPLITS[split] / image_class
                counts[str(place)] = counts.get(str(place), 0) + 1
                if not limit or counts[str(place)] <= limit:
                    place.mkdir(parents=True, exist_ok=True)
                    (place / file).write_bytes(jpeg)
        pack(sharding, Folder(work / "images"), Directory(work / "shards"), "benchmark")
    return ShardSet(work / "shards")


def spend(file: Path, seconds: float) -> float:
    """Add to the time of a training that may be stopped and run again; returns the sum."""
    total = seconds + (json.loads(file.read_text()) if file.exists() else 0.0)
    file.write_text(json.dumps(total))
    return float(total)


class Lines:
    """Progress, a line now and then."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def progress(self, step: int, num_steps: int) -> None:
        if time.monotonic() > self._said + LINE_SECONDS:
            self._said = time.monotonic()
            print(f"step {step} of {num_steps}", file=sys.stderr, flush=True)

    def saved(self) -> None: ...

    def point(self, step: int, values: dict[str, float]) -> None:
        if "val/top1_error" in values:
            print(f"step {step}: validation top-1 {1 - values['val/top1_error']:.2%}", file=sys.stderr, flush=True)


def report(figures: dict[str, Any]) -> str:
    top1, met = f"{figures['top1']:.2%}", "met" if figures["top1"] >= figures["goal"] else "NOT MET"
    speed = f"{figures['train_minutes']} minutes, {figures['images_per_second']:,.0f} images/s"
    return "\n".join([
        figures["machine"],
        f"top-1 {top1} of {figures['num_images']:,} images, {figures['mode']} (at least {figures['goal']:.0%}: {met})",
        *(f"  {name}: {top1:.2%}" for name, top1 in figures["modes"].items()),
        f"{figures['epochs']} epochs in {speed}, validations counted in",
        f"evaluated in {figures['evaluate_minutes']} minutes",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
