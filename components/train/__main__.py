"""Stage 2 of 4: shards → a trained network.

Continues automatically from the newest valid checkpoint.  On SIGTERM it saves a checkpoint and exits with 75.
Several GPUs of one machine:  python -m components.launch 8 components.train …
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from components import program

if TYPE_CHECKING:
    from components.stage import Stage
    from vgg.network.trained import Trained
    from vgg.params.train import TrainParams


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
    program.add_dvc_metrics(flags)
    program.add_executor_input(flags)
    flags.add_argument(
        "--finished", action="store_true", help="train nothing: verify the finished checkpoint and write the outputs"
    )
    flags.add_argument(
        "--accept-code-change", action="store_true", help="continue an unfinished run although its code has changed"
    )
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    from components.stage import Stage
    from components.train.outputs import download_checkpoints
    from components.train.reporter import Reporter, reporting
    from runtime import environment
    from runtime.cores import usable_cores
    from runtime.ranks import nodes
    from runtime.ranks.watched import Heartbeat
    from runtime.stopping import StopSignal
    from runtime.store import storage
    from runtime.store.place import output_at
    from vgg.params.train import TrainParams

    stage = Stage("train", args, TrainParams)
    heartbeat = Heartbeat()
    stop = StopSignal(heartbeat.beat)
    from runtime.distributed import joined  # torch, seconds in which a stop is noted already
    from vgg.network.trained import Trained
    from vgg.training.loop import train
    from vgg.training.task import Task

    shards, initial = stage.open_shards(), open_initial(stage)
    location = stage.location(args.checkpoint)
    output = output_at(location)
    if args.finished:
        trained = Trained.open(output.download())
        expect_same_run(trained, stage)
        write_outputs(stage, location, trained)
        return
    # the collective timeout is longer than VGG_HANG_SECONDS, so that the launcher detects a hang first
    with heartbeat.saving_stacks(output.directory), joined(environment.HANG_SECONDS.get() + 60) as group:
        if group.device.type == "cuda":  # compiled networks are found again after a restart,
            # by other pods too if VGG_CACHE is a volume
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(storage.cache_folder() / "compiled"))
        elif group.is_first:
            warn_of_load(usable_cores())
        if not storage.is_remote(location):
            nodes.expect_shared(output.directory, group)
        shards.verify(group.local_rank, group.local_world_size, lambda *_: stop.raise_if_received())
        task = Task(
            params=stage.params, shards=shards, directory=output.directory, code=stage.code, initial=initial,
            accept_code_change=args.accept_code_change,
        )  # fmt: skip
        with output.writing() if group.is_first else contextlib.nullcontext():
            with reporting(stage, task, location, heartbeat, output, group) as reporter:
                download_checkpoints(output, group)
                finished = train(task, group, reporter, stop)
                if finished and isinstance(reporter, Reporter):
                    output.upload()
                    write_outputs(stage, location, finished)
                    reporter.finished(finished)


def warn_of_load(cores: int) -> None:
    """Threads wait for each other after every operation, so one whose core is taken by another program holds all."""
    import torch

    load = os.getloadavg()[0]
    if load > 1.5 * cores and torch.get_num_threads() > 1:
        program.log.warning(
            "other programs compete for the cores (load %.0f on %d): training may be several times slower. "
            "OMP_NUM_THREADS=1 helps then; it changes the last bits of sums", load, cores,
        )  # fmt: skip


def open_initial(stage: Stage[TrainParams]) -> Trained | None:
    """The finished training of --initial, if training starts from its weights."""
    from runtime import manifest
    from runtime.errors import Refused
    from runtime.store import storage
    from runtime.store.place import downloaded
    from vgg.network.trained import Trained

    if stage.params.init not in ("shallower", "checkpoint"):
        return None
    directory = downloaded(stage.args.initial)
    if not (directory / manifest.NAME).exists():
        raise Refused(
            f"{stage.args.initial}: no finished training, and train.init {stage.params.init!r} starts from one. "
            f"Copy it there: cp -r models/vgg/. {stage.args.initial}/"
        )
    initial = Trained.open(directory)
    storage.expect(stage.args.initial, initial.digest)
    stage.inputs["initial"] = initial.weights_sha256
    return initial


def expect_same_run(trained: Trained, stage: Stage[TrainParams]) -> None:
    """Raises Refused if a finished training has other parameters, data, first weights or code."""
    from runtime import checkpoint
    from runtime.errors import Refused
    from runtime.wording import listing

    run = trained.manifest["run"]
    expected = {
        "train": stage.params.model_dump(mode="json"), "initial": stage.inputs.get("initial"),
        "code": stage.code, "data": stage.inputs["shards"],
    }  # fmt: skip
    recorded = {**{name: run.get(name) for name in expected}, "data": run.get("data", {}).get("digest")}
    if changes := list(checkpoint.differences(recorded, expected)):
        raise Refused(f"{trained.directory}: belongs to another training:\n{listing(changes)}", changes)


def write_outputs(stage: Stage[TrainParams], location: str, trained: Trained) -> None:
    """Write the outputs besides the checkpoint, the metrics last."""
    from components.train.outputs import write_curves
    from runtime.store import storage

    args, state = stage.args, trained.step.state
    write_curves(args.curves, trained)
    metrics = {
        **state["history"][-1],
        "best_step": state["best_step"],
        "best_val_top1_error": state["best_error"],
        "samples": state["samples"],
        "weights_sha256": trained.weights_sha256,
    }
    stage.write_dvc_metrics(metrics, "train_loss", "val_loss", "val_top1_error")
    stage.finish(metrics, {"checkpoint": storage.address(location, trained.digest)}, {"curves": (args.curves, {})})
    program.log.info("%s: step %d, weights %s", location, state["step"], trained.weights_sha256)


if __name__ == "__main__":
    program.run(main)
