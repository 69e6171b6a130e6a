"""Stage 2 of 4: shards → a trained network.

Continues by itself from the newest good checkpoint; SIGTERM saves and exits with 75.  Several GPUs of one machine:
python -m components.launch 8 components.train …
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import program
from components.train import plan
from components.watched import Life, hang_seconds

if TYPE_CHECKING:
    from components.mirror import Folder
    from vgg.checkpoint import Trained
    from vgg.distributed import Group


def parser() -> argparse.ArgumentParser:
    flags = program.StageParser("train", __doc__)
    flags.add_argument("--shards", required=True, metavar="DIR", help="in: the shard stage's output")
    flags.add_argument(
        "--initial",
        required=True,
        metavar="DIR",
        help="in: finished checkpoint, read only for init 'shallower' and 'checkpoint'",
    )
    flags.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="out: checkpoints; manifest.json when finished"
    )
    flags.add_argument("--curves", required=True, metavar="FILE", help="out: loss and error of every epoch, CSV")
    flags.add_argument("--metrics", required=True, metavar="FILE", help="out: the last epoch, JSON; written last")
    program.add_executor_input(flags)
    flags.add_argument(
        "--finished", action="store_true", help="train nothing: verify the finished checkpoint and write the outputs"
    )
    flags.add_argument(
        "--accept-code-change", action="store_true", help="continue an unfinished run though its code has changed since"
    )
    plan.add_flags(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if plan.requested(args):
        plan.show(args)
        return
    from vgg.params import load
    from vgg.params.train import TrainParams

    params = load(args.params, "train", TrainParams)
    from components import closure, mirror, nodes, storage, tracking

    life = Life()
    stop = program.StopSignal(life.beat)
    # what a GPU's network was compiled to is found again after a restart, by a pod too if VGG_CACHE is a volume
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(storage.cache_folder() / "compiled"))
    from vgg.checkpoint import Trained
    from vgg.distributed import joined
    from vgg.train import train

    shards = storage.open_shards(args.shards)
    storage.expect(args.shards, shards.digest)
    code = closure.fingerprints("train")
    needs_initial = params.init in ("shallower", "checkpoint")
    initial = mirror.fetched(args.initial) if needs_initial else Path(args.initial)
    first = None
    if needs_initial:
        begun = Trained.open(initial)
        storage.expect(args.initial, begun.digest)
        first = begun.weights_sha256
    identity = {"train": params.model_dump(), "shards": shards.digest, "initial": first, "code": code}
    place = storage.resolve(args.checkpoint, identity)
    kept = mirror.at(place)
    if args.finished:
        trained = Trained.open(kept.fetch())
        expect_run(trained, {"train": params.model_dump(mode="json"), "initial": first, "code": code}, shards.digest)
        write_outputs(args, place, trained)
        return
    # whoever watches the ranks acts before the ranks give each other up
    with life.stacks_beside(kept.directory), joined(hang_seconds() + 60) as group:
        if not storage.is_remote(place):
            nodes.expect_shared(kept.directory, group)
        shards.verify(group.local_rank, group.local_world_size, lambda *_: stop.raise_if_received())
        if not group.is_first:
            program.log.setLevel("WARNING")  # what all know is said once
            bring(kept, group)
            train(params, shards, kept.directory, initial, code, group, Silent(life), stop, args.accept_code_change)
            return
        with kept.writing(), Watching(args, params, shards, tracking.key(identity, place), life, kept) as watching:
            bring(kept, group)
            train(params, shards, kept.directory, initial, code, group, watching, stop, args.accept_code_change)
            kept.send()
            trained = Trained.open(kept.directory)
            write_outputs(args, place, trained)
            watching.finished(args, trained)


def bring(kept: Folder, group: Group) -> None:
    """Have the checkpoints here, on every node the same: first where they are written, then elsewhere."""
    if group.is_first:
        kept.bring_checkpoints()
        kept.keep_checkpoints(only_add=True)  # what a store that was away has missed
    group.barrier()
    if group.local_rank == 0 and not group.is_first:
        kept.bring_checkpoints()
    group.barrier()


def expect_run(trained: Trained, wanted: dict[str, Any], data: str) -> None:
    """Raises Refused if a finished training is not of these parameters, data and code."""
    from vgg import checkpoint
    from vgg.errors import Refused

    run = trained.manifest["run"]
    there = {**{name: run.get(name) for name in wanted}, "data": run.get("data", {}).get("digest")}
    if changes := list(checkpoint.differences(there, {**wanted, "data": data})):
        listing = "\n".join(f"  {change}" for change in changes)
        raise Refused(f"{trained.directory}: is another training's:\n{listing}")


class Silent:
    """What the other ranks tell of their progress."""

    def __init__(self, life: Life) -> None:
        self.life = life

    def progress(self, *_: int) -> None:
        self.life.trains()

    def point(self, step: int, values: dict[str, float]) -> None: ...
    def saved(self) -> None: ...


class Watching:
    """Rank 0: the bar, the curves in MLflow, the checkpoints to where they are kept."""

    def __init__(self, args: argparse.Namespace, params: Any, shards: Any, key: str, life: Life, kept: Folder) -> None:
        from components import progress, provenance, tracking

        self.life, self.saved = life, kept.keep_checkpoints
        self.bar = progress.Progress("train", scale=params.batch_size, warm=True)
        self.tracker = tracking.Tracker("train", key, provenance.lineage(args.params))
        self.tracker.params({"train": params.model_dump(mode="json")})
        self.tracker.tags(
            provenance.tags(provenance.record("train", params.model_dump(mode="json"), {"shards": shards.digest}))
        )
        profile = {"num_images": len(shards.split("train")), "num_classes": len(shards.wnids)}
        self.tracker.dataset(shards.manifest["dataset"], args.shards, shards.digest, "train", profile)
        self.since = time.monotonic()
        self.steps, self.batch_size = 0, params.batch_size

    def __enter__(self) -> Watching:
        self.tracker.__enter__()
        self.bar.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.__exit__(*exception)
        self.tracker.__exit__(*exception)

    def progress(self, step: int, num_steps: int) -> None:
        self.life.trains()
        self.steps += 1
        self.bar(step, num_steps)

    def point(self, step: int, values: dict[str, float]) -> None:
        if "train/loss" in values:
            now = time.monotonic()
            values["perf/images_per_s"] = self.steps * self.batch_size / (now - self.since)
            values["perf/data_wait"] = values.pop("perf/data_wait_seconds") / (now - self.since)
            self.since, self.steps = now, 0
            self.bar.figures(loss=values["train/loss"], error=values["train/top1_error"])
        else:  # a validation: its time is not training's
            self.since, self.steps = time.monotonic(), 0
        self.tracker.point(step, values)

    def finished(self, args: argparse.Namespace, trained: Trained) -> None:
        last = trained.step.state["history"][-1]
        errors = {
            "final/val_top1_error": last["val_top1_error"],
            "best/val_top1_error": trained.step.state["best_error"],
        }
        self.tracker.metrics(errors)
        self.tracker.tags({"vgg.weights_sha256": trained.weights_sha256}, to="both")
        self.tracker.artifact(Path(args.curves), "curves")


def write_outputs(args: argparse.Namespace, place: str, trained: Trained) -> None:
    """The stage's outputs beside the checkpoint; the metrics last."""
    from components import storage
    from vgg import manifest
    from vgg.train import curves

    state = trained.step.state
    table = "\n".join(",".join(row) for row in curves(state)) + "\n"
    manifest.write_atomically(Path(args.curves), lambda file: file.write(table.encode()))
    metrics = {
        **state["history"][-1],
        "best_step": state["best_step"],
        "best_val_top1_error": state["best_error"],
        "samples": state["samples"],
        "weights_sha256": trained.weights_sha256,
    }
    manifest.write_json(Path(args.metrics), metrics)
    program.write_executor_output(
        args.executor_output,
        {"checkpoint": storage.address(place, trained.digest)},
        {"curves": (args.curves, {}), "metrics": (args.metrics, program.numbers(metrics))},
    )
    program.log.info("%s: step %d, weights %s", place, state["step"], trained.weights_sha256)


if __name__ == "__main__":
    program.run(main)
