"""recipes/cifar10*.yaml from JPEGs to the paper's evaluation: python -m benchmarks.cifar10 TAR... --work DIR

Shards, trains and evaluates with vgg/ alone: no tracking, no registry.  When stopped (SIGTERM, Ctrl-C) it saves and
exits with 75; the same command continues.  Prints top-1 over the recipe's scales, minutes and images per second.

With --seconds it ends within that time and reports what it reached: after a trial of two epochs, evaluated and timed,
it trains again for as many epochs as fit, with the recipe's schedule shortened in proportion.  If they do not fit after
all, the newest checkpoint is evaluated.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import machine
from runtime import checkpoint
from runtime.distributed import Group, joined
from runtime.errors import Preempted
from runtime.shards.shardset import ShardSet
from runtime.stopping import Never, Stop, StopSignal
from runtime.targets import Directory
from vgg.evaluation.evaluate import evaluate
from vgg.network.trained import Trained, shapes_of
from vgg.params import load
from vgg.params.evaluate import EvaluateParams
from vgg.params.shard import ShardParams
from vgg.params.train import Steps, TrainParams
from vgg.sharding.pack import pack
from vgg.sharding.sources import Folder
from vgg.training.loop import train
from vgg.training.run import start
from vgg.training.task import Task, describe
from vgg.training.warmup import warm_up

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SPLITS = {"train": "train", "test": "val", "val": "val"}
GOALS = {"cifar10": 0.93, "cifar10-bn": 0.94}  # top-1, as in the recipes
LINE_SECONDS = 20  # between two lines of progress
TRIAL_EPOCHS = 2  # the first compiles what validation needs; the second is timed
SLOWER = 1.08  # an epoch may take this many times as long as in the trial before time runs out


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.cifar10", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("tars", type=Path, nargs="+", metavar="TAR", help="with {train,test}/<class>/<image>.jpg")
    flags.add_argument("--work", type=Path, required=True, help="a folder for shards and checkpoints; not deleted")
    flags.add_argument("--recipe", choices=GOALS, default="cifar10", help="of recipes/ (default cifar10)")
    flags.add_argument("--limit", type=int, help="images of a class and split, at most: to try the program")
    flags.add_argument("--epochs", type=int, help="instead of the recipe's")
    flags.add_argument("--seconds", type=float, help="time limit: fewer epochs")
    flags.add_argument("--prepare", action="store_true", help="only shard, and fill the compiler's cache")
    flags.add_argument("--json", action="store_true", help="print figures as JSON, a line each as they are measured")
    args = flags.parse_args()
    start_time, stop, figures = time.monotonic(), StopSignal(), machine.Figures(args.json)
    recipe = str(RECIPES / f"{args.recipe}.yaml")
    training = load(recipe, "train", TrainParams)
    evaluating = load(recipe, "evaluate", EvaluateParams)
    if args.epochs:
        training = training.model_copy(update={"epochs": args.epochs})
    shards = packed(args.tars, args.work, load(recipe, "shard", ShardParams), args.limit)
    num_images = sum(len(shards.split(split)) for split in ("train", "val"))
    figures.add(recipe=args.recipe, goal=GOALS[args.recipe], machine=machine.describe(), sharded=num_images)
    figures.add(shard_seconds=round(time.monotonic() - start_time, 1))
    task = Task(params=training, shards=shards, directory=args.work / args.recipe, code={})
    with joined() as group:
        if args.prepare:
            warm_up(start(task, describe(task, group.device), group), Never())
            figures.add(prepare_seconds=round(time.monotonic() - start_time, 1))
            return
        if args.seconds:
            with tempfile.TemporaryDirectory(dir=args.work) as folder:
                task = replace(task, directory=Path(folder))
                in_time(task, evaluating, group, stop, start_time + args.seconds, figures)
        else:
            whole(task, evaluating, group, stop, figures)
    if not args.json:
        print(report(figures))


def whole(task: Task, evaluating: EvaluateParams, group: Group, stop: Stop, figures: machine.Figures) -> None:
    """The whole recipe, however long it takes and however often it is stopped."""
    spent, start_time = task.directory.with_name(f"{task.directory.name}.seconds"), time.monotonic()
    try:
        train(task, group, Lines(), stop)
    except Preempted as stopped:
        spend(spent, time.monotonic() - start_time)
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    seconds, epochs = spend(spent, time.monotonic() - start_time), task.params.epochs
    speed = epochs * len(task.shards.split("train")) / seconds
    figures.add(epochs=epochs, train_minutes=round(seconds / 60, 2), images_per_second=round(speed, 1))
    figures.add(**evaluated(evaluating, Trained.open(task.directory, evaluating.weights), task.shards, group))


def in_time(
    task: Task, evaluating: EvaluateParams, group: Group, stop: StopSignal, end: float, figures: machine.Figures
) -> None:
    """As much of the recipe as ends before `end`, by the clock of time.monotonic.  Works inside task.directory."""
    num_images = len(task.shards.split("train"))
    lines, start_time = Lines(), time.monotonic()
    epochs = min(TRIAL_EPOCHS, task.params.epochs)
    trial = replace(task, params=shortened(task.params, epochs), directory=task.directory / "trial")
    train(trial, group, lines, stop)
    trained = time.monotonic()
    epoch_seconds = lines.epochs[-1] - (lines.epochs[-2] if len(lines.epochs) > 1 else start_time)
    start_seconds = max(0.0, trained - start_time - len(lines.epochs) * epoch_seconds)
    results = evaluated(evaluating, Trained.open(trial.directory, evaluating.weights), task.shards, group)
    evaluate_seconds = time.monotonic() - trained
    figures.add(
        epochs=epochs, recipe_epochs=task.params.epochs, epoch_seconds=round(epoch_seconds, 3),
        train_minutes=round((trained - start_time) / 60, 2), images_per_second=round(num_images / epoch_seconds, 1),
        **results,
    )  # fmt: skip

    train_end = end - SLOWER * evaluate_seconds
    planned = that_fit(train_end - time.monotonic() - start_seconds, epoch_seconds, task.params.epochs)
    if planned <= epochs:
        return
    run = replace(task, params=shortened(task.params, planned), directory=task.directory / "run")
    print(f"{planned} epochs of {epoch_seconds:.2f} s fit, of the recipe's {task.params.epochs}", file=sys.stderr)
    start_time = time.monotonic()
    try:
        train(run, group, Lines(), Until(stop, train_end))
    except Preempted as stopped:
        if stop.received:
            raise
        print(stopped, file=sys.stderr)
        newest = checkpoint.newest(run.directory, shapes_of)
        if newest is None:
            return
        best = newest.state["best_step"] or newest.step
        Trained.finish(run.directory, newest.step, best, describe(run, group.device))
    seconds = time.monotonic() - start_time
    last = Trained.open(run.directory, "last")
    done = min(planned, last.step.step * run.params.batch_size / num_images)
    results = evaluated(evaluating, last, task.shards, group)
    figures.add(planned_epochs=planned, epochs=round(done, 2), train_minutes=round(seconds / 60, 2), **results)


def that_fit(seconds: float, epoch_seconds: float, most: int) -> int:
    """How many epochs fit into the time, with some to spare."""
    return max(0, min(most, math.floor(seconds / (epoch_seconds * SLOWER))))


def shortened(params: TrainParams, epochs: int) -> TrainParams:
    """The parameters for other epochs, with warm-up and drops of the rate at the same shares of them."""
    factor, rule = epochs / params.epochs, params.schedule
    changes: dict[str, object] = {"warmup_epochs": rule.warmup_epochs * factor}
    if isinstance(rule, Steps):
        changes["drop_epochs"] = [epoch * factor for epoch in rule.drop_epochs]
    return params.model_copy(update={"epochs": epochs, "schedule": rule.model_copy(update=changes)})


def evaluated(params: EvaluateParams, trained: Trained, shards: ShardSet, group: Group) -> dict[str, object]:
    start_time = time.monotonic()
    found = evaluate(params, trained, shards, group, lambda *_: None)
    assert found  # of the only rank
    metrics = found.metrics
    return {
        "top1": round(1 - metrics["top1_error"], 4),
        "mode": metrics["headline"],
        "modes": {name: round(1 - mode["top1_error"], 4) for name, mode in metrics["modes"].items()},
        "num_images": metrics["num_images"],
        "evaluate_minutes": round((time.monotonic() - start_time) / 60, 2),
    }


class Until:
    """A Stop: when time is over, or when the other one requests it."""

    def __init__(self, stop: StopSignal, end: float) -> None:
        self.stop, self.end, self.interrupts = stop, end, stop.interrupts

    def __call__(self) -> bool:
        return self.stop() or time.monotonic() > self.end


def packed(tars: list[Path], work: Path, sharding: ShardParams, limit: int | None) -> ShardSet:
    """The shards in the folder, packed from the tars unless they exist."""
    if not (work / "shards/manifest.json").exists():
        counts: dict[str, int] = {}
        for tar in tars:
            for name, jpeg in machine.read_images(tar).items():
                split, image_class, file = Path(name).parts[-3:]
                folder = work / "images" / SPLITS[split] / image_class
                counts[str(folder)] = counts.get(str(folder), 0) + 1
                if not limit or counts[str(folder)] <= limit:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / file).write_bytes(jpeg)
        pack(sharding, Folder(work / "images"), Directory(work / "shards"), "benchmark")
    return ShardSet(work / "shards")


def spend(file: Path, seconds: float) -> float:
    """Add to the time of a training that may be stopped and run again; returns the total."""
    total = seconds + (float(file.read_text(encoding="utf-8")) if file.exists() else 0.0)
    file.write_text(str(total), encoding="utf-8")
    return total


class Lines:
    """A Reporter that prints a line every LINE_SECONDS.  epochs: when each was trained and validated."""

    def __init__(self) -> None:
        self._printed = time.monotonic()
        self.epochs: list[float] = []

    def progress(self, step: int, num_steps: int) -> None:
        if time.monotonic() > self._printed + LINE_SECONDS:
            self._printed = time.monotonic()
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
        f"{figures['epochs']} epochs in {speed}, validations included",
        f"evaluated in {figures['evaluate_minutes']} minutes",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
