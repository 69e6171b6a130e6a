"""recipes/cifar10*.yaml from JPEGs to the paper's evaluation: python -m benchmarks.cifar10 TAR... --work DIR

Shard, train and evaluate by vgg/ alone: no tracking, no registry.  Stopped (SIGTERM, Ctrl-C) it saves and exits with
75; the same command goes on.  Prints top-1 over the recipe's scales, minutes and images per second.

With --seconds it ends in time and says how far it came: after two epochs that are evaluated and timed, it trains anew
for as many as fit, the recipe's schedule shortened alike.  Should they not fit after all, what there is is evaluated.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import machine
from components.program import StopSignal
from vgg import checkpoint
from vgg.checkpoint import Trained
from vgg.distributed import Group, joined
from vgg.errors import Preempted
from vgg.evaluate import evaluate
from vgg.index import ShardSet
from vgg.params import load
from vgg.params.evaluate import EvaluateParams
from vgg.params.shard import ShardParams
from vgg.params.train import Steps, TrainParams
from vgg.run import describe, start
from vgg.shards import pack
from vgg.sources import Folder
from vgg.stopping import Never, Stop
from vgg.targets import Directory
from vgg.train import train
from vgg.warmup import warm_up

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SPLITS = {"train": "train", "test": "val", "val": "val"}
GOALS = {"cifar10": 0.93, "cifar10-bn": 0.94}  # top-1, as the recipes say
LINE_SECONDS = 20  # between two lines of progress
TRIAL_EPOCHS = 2  # the first compiles what validation needs; the second is timed
SLOWER = 1.08  # than in the trial: epochs may be so many times, before time runs out


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.cifar10", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("tars", type=Path, nargs="+", metavar="TAR", help="of {train,test}/<class>/<image>.jpg")
    flags.add_argument("--work", type=Path, required=True, help="a folder for shards and checkpoints; kept")
    flags.add_argument("--recipe", choices=GOALS, default="cifar10", help="of recipes/ (default cifar10)")
    flags.add_argument("--limit", type=int, help="images of a class and split, at most: to try the program")
    flags.add_argument("--epochs", type=int, help="instead of the recipe's")
    flags.add_argument("--seconds", type=float, help="for all of it: fewer epochs")
    flags.add_argument("--prepare", action="store_true", help="only shard, and fill the compiler's cache")
    flags.add_argument("--json", action="store_true", help="print the figures as JSON, a line when something is known")
    args = flags.parse_args()
    began, stop, figures = time.monotonic(), StopSignal(), machine.Figures(args.json)
    recipe = str(RECIPES / f"{args.recipe}.yaml")
    training = load(recipe, "train", TrainParams)
    evaluating = load(recipe, "evaluate", EvaluateParams)
    if args.epochs:
        training = training.model_copy(update={"epochs": args.epochs})
    shards = packed(args.tars, args.work, load(recipe, "shard", ShardParams), args.limit)
    counted = {split: len(shards.split(split)) for split in ("train", "val")}
    figures.know(recipe=args.recipe, goal=GOALS[args.recipe], machine=machine.describe(), sharded=sum(counted.values()))
    figures.know(shard_seconds=round(time.monotonic() - began, 1))
    with joined() as group:
        if args.prepare:
            warm_up(start(training, shards, args.work, group, counted["train"]), Never())
            figures.know(prepare_seconds=round(time.monotonic() - began, 1))
            return
        if args.seconds:
            with tempfile.TemporaryDirectory(dir=args.work) as folder:
                in_time(training, evaluating, shards, Path(folder), group, stop, began + args.seconds, figures)
        else:
            whole(training, evaluating, shards, args.work, group, stop, figures)
    if not args.json:
        print(report(figures))


def whole(
    training: TrainParams,
    evaluating: EvaluateParams,
    shards: ShardSet,
    work: Path,
    group: Group,
    stop: Stop,
    figures: machine.Figures,
) -> None:
    """The recipe, however long it takes and however often it is stopped."""
    name, began = figures["recipe"], time.monotonic()
    try:
        train(training, shards, work / name, work, {}, group, Lines(), stop)
    except Preempted as stopped:
        spend(work / f"{name}.seconds", time.monotonic() - began)
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    seconds = spend(work / f"{name}.seconds", time.monotonic() - began)
    speed = training.epochs * len(shards.split("train")) / seconds
    figures.know(epochs=training.epochs, train_minutes=round(seconds / 60, 2), images_per_second=round(speed, 1))
    figures.know(**evaluated(evaluating, Trained.open(work / name, evaluating.weights), shards, group))


def in_time(
    training: TrainParams,
    evaluating: EvaluateParams,
    shards: ShardSet,
    folder: Path,
    group: Group,
    stop: StopSignal,
    end: float,
    figures: machine.Figures,
) -> None:
    """As much of the recipe as ends before `end`, by the clock of time.monotonic."""
    num_images = len(shards.split("train"))
    lines, began = Lines(), time.monotonic()
    trial = shortened(training, min(TRIAL_EPOCHS, training.epochs))
    train(trial, shards, folder / "trial", folder, {}, group, lines, stop)
    trained = time.monotonic()
    epoch_seconds = lines.epochs[-1] - (lines.epochs[-2] if len(lines.epochs) > 1 else began)
    start_seconds = max(0.0, trained - began - len(lines.epochs) * epoch_seconds)
    found = evaluated(evaluating, Trained.open(folder / "trial", evaluating.weights), shards, group)
    evaluate_seconds = time.monotonic() - trained
    figures.know(
        epochs=trial.epochs, recipe_epochs=training.epochs, epoch_seconds=round(epoch_seconds, 3),
        train_minutes=round((trained - began) / 60, 2), images_per_second=round(num_images / epoch_seconds, 1), **found,
    )  # fmt: skip

    train_end = end - SLOWER * evaluate_seconds
    epochs = that_fit(train_end - time.monotonic() - start_seconds, epoch_seconds, training.epochs)
    if epochs <= trial.epochs:
        return
    planned = shortened(training, epochs)
    print(f"{epochs} epochs of {epoch_seconds:.2f} s fit, of the recipe's {training.epochs}", file=sys.stderr)
    directory, began = folder / "run", time.monotonic()
    try:
        train(planned, shards, directory, folder, {}, group, Lines(), Until(stop, train_end))
    except Preempted as stopped:
        if stop.received:
            raise
        print(stopped, file=sys.stderr)
        newest = checkpoint.newest(directory)
        if newest is None:
            return
        about = describe(planned, shards, folder, {}, group.device)
        checkpoint.finish(directory, newest.step, newest.state["best_step"] or newest.step, about)
    seconds = time.monotonic() - began
    last = Trained.open(directory, "last")
    done = min(epochs, last.step.step * planned.batch_size / num_images)
    found = evaluated(evaluating, last, shards, group)
    figures.know(planned_epochs=epochs, epochs=round(done, 2), train_minutes=round(seconds / 60, 2), **found)


def that_fit(seconds: float, epoch_seconds: float, most: int) -> int:
    """How many epochs, with some time to spare."""
    return max(0, min(most, math.floor(seconds / (epoch_seconds * SLOWER))))


def shortened(params: TrainParams, epochs: int) -> TrainParams:
    """The parameters with other epochs, warm-up and drops of the rate at the same shares of them."""
    factor, rule = epochs / params.epochs, params.schedule
    changes: dict[str, object] = {"warmup_epochs": rule.warmup_epochs * factor}
    if isinstance(rule, Steps):
        changes["drop_epochs"] = [epoch * factor for epoch in rule.drop_epochs]
    return params.model_copy(update={"epochs": epochs, "schedule": rule.model_copy(update=changes)})


def evaluated(params: EvaluateParams, trained: Trained, shards: ShardSet, group: Group) -> dict[str, object]:
    began = time.monotonic()
    found = evaluate(params, trained, shards, group, lambda *_: None)
    return {
        "top1": round(1 - found.metrics["top1_error"], 4),
        "mode": found.metrics["headline"],
        "modes": {name: round(1 - mode["top1_error"], 4) for name, mode in found.metrics["modes"].items()},
        "num_images": found.metrics["num_images"],
        "evaluate_minutes": round((time.monotonic() - began) / 60, 2),
    }


class Until:
    """Asks to stop when time is over, or when somebody else does."""

    def __init__(self, stop: StopSignal, end: float) -> None:
        self.stop, self.end, self.interrupts = stop, end, stop.interrupts

    def __call__(self) -> bool:
        return self.stop() or time.monotonic() > self.end


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
    total = seconds + (float(file.read_text()) if file.exists() else 0.0)
    file.write_text(str(total))
    return total


class Lines:
    """Progress, a line now and then.  epochs: when each was trained and validated."""

    def __init__(self) -> None:
        self._said = time.monotonic()
        self.epochs: list[float] = []

    def progress(self, step: int, num_steps: int) -> None:
        if time.monotonic() > self._said + LINE_SECONDS:
            self._said = time.monotonic()
            print(f"step {step} of {num_steps}", file=sys.stderr, flush=True)

    def saved(self) -> None: ...

    def point(self, step: int, values: dict[str, float]) -> None:
        if "val/top1_error" in values:
            self.epochs.append(time.monotonic())
            print(f"step {step}: validation top-1 {1 - values['val/top1_error']:.2%}", file=sys.stderr, flush=True)


def report(figures: machine.Figures) -> str:
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
