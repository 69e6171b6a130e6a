"""Training (arXiv 1409.1556 §3.1): SGD over random crops, resumable at any step, bit for bit.

Read `train` from top to bottom: open or continue a run, then a loop of validate, save, stop, update.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from vgg import checkpoint, roi
from vgg.batches import Crops
from vgg.checkpoint import Trained
from vgg.distributed import Group
from vgg.errors import Preempted, Refused, WrongParameters
from vgg.feed import Feed
from vgg.index import ShardSet, Split
from vgg.metrics import Counts
from vgg.params.train import TrainParams
from vgg.run import Run, connect, describe, find_run, restore, save, seen, settle, start
from vgg.saver import Saver
from vgg.schedule import Schedule
from vgg.stopping import Stop
from vgg.stream import training_batches, validation_batches
from vgg.trouble import keep_batch
from vgg.warmup import regroup, warm_up
from vgg.workers import num_workers

log = logging.getLogger("vgg.train")

STOP_BATCHES = 10  # batches of a validation between two agreements on stopping
LOG_STEPS = 20  # steps between two readings from the device, each a point of the curves
STUCK = 0.99  # a loss this near to ln(classes), as a share of it, has learnt nothing


class Watcher(Protocol):
    """Who is told how training goes.  Nothing it does may change a result."""

    def progress(self, step: int, num_steps: int) -> None: ...
    def point(self, step: int, values: dict[str, float]) -> None: ...
    def saved(self) -> None: ...  # a checkpoint is on disk; called by the thread that wrote it


def train(
    params: TrainParams,
    shards: ShardSet,
    directory: Path,
    initial: Path,
    code: dict[str, str],
    group: Group,
    watcher: Watcher,
    stop: Stop,
    accept_code_change: bool = False,
) -> dict[str, Any]:
    """Train to the end, from the newest good checkpoint in `directory` if there is one, and return the final state.

    initial: a finished checkpoint, read for init 'shallower' and 'checkpoint'.
    code: sha256 of every source file that has a say in the result; a run is not continued with other code unless
    accept_code_change.  stop: asked every step; when it says so the state is saved and Preempted raised.
    Raises Refused when the directory holds another unfinished run, or a loss or gradient is not finite.
    """
    if params.batch_size < group.world_size:
        raise WrongParameters(f"train.batch_size: {params.batch_size} is below the number of ranks, {group.world_size}")
    split, validation = shards.split("train"), shards.split("val")
    about = describe(params, shards, initial, code, group.device)
    earlier = find_run(directory, about, accept_code_change, group)
    if earlier is None and (directory / "manifest.json").exists():
        return Trained.open(directory).step.state  # this very run is finished
    run = start(params, shards, initial, group, len(split))
    if earlier is not None:
        restore(run, earlier)
        log.info("continuing %s at step %d", directory, run.state.step)
    if group.device.type == "cuda":  # on a CPU nothing is compiled, and memory does not end at a border
        warm_up(run, stop)
    connect(run)
    regroup(run)

    num_steps = math.ceil(params.epochs * len(split) / params.batch_size)
    workers, pin = num_workers(group.device, group.local_world_size), group.device.type == "cuda"
    log.info("%s", arithmetic(params, group, len(split), num_steps, run.schedule, run.precision))
    decoder = roi.DeviceDecoder(group.device) if params.decoder == "device" else None
    batches = training_batches(
        split, params, group.rank, group.world_size, run.state.step, num_steps, workers, pin, decoder
    )
    feed, saver = Feed(batches, group.device, stop), Saver(directory, about, params.keep_checkpoints, watcher.saved)
    state, saved_step = run.state, run.state.step if earlier else None
    stopping = group.any(stop() or (state.step < num_steps and not feed.fetch()))
    with contextlib.closing(saver):
        while True:
            if ends_epoch(state.step, params.batch_size, len(split)) and state.validated_step < state.step:
                stopping = stopping or not validate(run, validation, workers, pin, decoder, watcher, stop)
                saved_step = saved_step if stopping else None  # a checkpoint of before this validation lacks it
                if not stopping and len(state.history) == 1:
                    row = state.history[0]
                    warn_if_stuck(run, min(row["train_loss"], row["val_loss"]), "after the first epoch")
            is_last = (state.step >= num_steps and not stopping) or run.schedule.finished
            due = state.step > 0 and (state.step % params.checkpoint_steps == 0 or state.best_step == state.step)
            if saved_step != state.step and (due or is_last or stopping):
                stop_if_not_finite(run, split, directory)
                save(run, saver)
                saved_step = state.step
            if is_last or stopping:
                settle(run, saver)
            if is_last:
                break
            if stopping:
                raise Preempted(f"stopped at step {state.step} of {num_steps}; the state is saved. Run again to go on.")
            update(run, feed.take())
            state.step += 1
            fetched = feed.fetch()  # while the device computes
            if state.step % LOG_STEPS == 0:
                read_window(run, split, directory, feed, watcher)
            watcher.progress(state.step, num_steps)
            # every step is agreed on before it begins: no rank waits inside it for one that stops or has no data
            stopping = group.any(stop() or saver.failed() or (not fetched and state.step < num_steps))
    if group.is_first:
        checkpoint.finish(directory, state.step, state.best_step, about)
    group.barrier()
    return vars(state)


def update(run: Run, crops: Crops) -> None:
    """One step of SGD on this rank's share of the global batch.  The host never waits for the device here."""
    step, group = run.state.step, run.group
    numbers = crops.numbers.numpy()
    run.samples = (run.samples + seen(step, group.rank + group.world_size * np.arange(len(numbers)), numbers)) % 2**64
    for settings in run.optimiser.param_groups:
        settings["lr"] = run.schedule.rate(step)
    run.optimiser.zero_grad(set_to_none=True)
    parts = run.parts(crops)
    for number, part in enumerate(parts, 1):  # their gradients add up, and travel with those of the last
        alone = group.world_size == 1 or number == len(parts)
        with contextlib.nullcontext() if alone else run.replica.no_sync():  # type: ignore[operator]
            loss, scores = losses(run, part)
            loss.backward()  # type: ignore[no-untyped-call]
        run.window.add(scores, part.labels)
        run.epoch.add(scores, part.labels)
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    finite = torch.isfinite(nn.utils.get_total_norm(gradients, foreach=True))
    run.trouble_step.copy_(torch.where((run.trouble == 0) & ~finite, step, run.trouble_step))
    run.trouble.copy_(torch.maximum(run.trouble, (~finite).float()))
    run.optimiser.step()


def losses(run: Run, crops: Crops) -> tuple[torch.Tensor, torch.Tensor]:
    """These images' part of the loss of the global batch, and their scores, float32 (n, classes), detached."""
    inputs = run.prepare(crops.images, crops.flip, crops.colour)
    with torch.autocast(run.group.device.type, run.precision, enabled=run.precision != torch.float32):
        scores = run.replica(inputs, crops.dropout)
    scores = scores.float()
    # the mean over the global batch: DDP averages over ranks, whose shares may differ by one image
    loss = functional.cross_entropy(scores, crops.labels, reduction="sum")
    loss = loss * (run.group.world_size / run.params.batch_size)
    # a loss that is not finite makes every gradient so, and by their exchange those of every rank
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan), scores.detach()


def read_window(run: Run, split: Split, directory: Path, feed: Feed, watcher: Watcher) -> None:
    """Once in LOG_STEPS: read the counts from the device, check them, make a point of the curves."""
    stop_if_not_finite(run, split, directory)
    values = Counts(run.group.sum_(run.window.total)).values()
    run.window = Counts.zeros(run.group.device)
    step, rate = run.state.step, run.schedule.rate(run.state.step - 1)
    watcher.point(
        step,
        {
            "train/loss": values["loss"],
            "train/top1_error": values["top1_error"],
            "learning_rate": rate,
            "perf/data_wait_seconds": feed.waited_seconds,
        },
    )
    feed.waited_seconds = 0.0
    half_an_epoch = len(split) / run.params.batch_size / 2
    if half_an_epoch <= step < half_an_epoch + LOG_STEPS:
        warn_if_stuck(run, values["loss"], f"after half an epoch (step {step})")


def stop_if_not_finite(run: Run, split: Split, directory: Path) -> None:
    """Raises Refused if a loss or gradient was not finite, naming step, rate and images.  Its update was not made, on
    any rank; what is needed to compute it again is kept beside the checkpoints."""
    step = int(run.trouble_step)
    if step < 0:
        return
    kept = keep_batch(run, split, step, directory) if run.group.is_first else None
    kept, listing = next(found for found in run.group.gather(kept) if found)
    raise Refused(
        f"step {step}: loss or gradient is not finite (learning rate {run.schedule.rate(step):g}). No update was made; "
        f"the last checkpoint is good. Lower train.learning_rate or lengthen the warm-up. {kept} holds the batch and "
        f"the weights it met (python -m vgg.trouble {kept} computes it again); the batch was:\n{listing}"
    )


def ends_epoch(step: int, batch_size: int, num_images: int) -> bool:
    """Whether the update that led to `step` took the last image of an epoch."""
    return step > 0 and step * batch_size // num_images > (step - 1) * batch_size // num_images


@torch.no_grad()
def validate(
    run: Run,
    split: Split,
    workers: int,
    pin: bool,
    decoder: roi.DeviceDecoder | None,
    watcher: Watcher,
    stop: Stop,
) -> bool:
    """The central crops of all validation images: a row of the history, the plateau rule's input, the best step.

    Returns False, with nothing changed, if it was asked to stop; the next start validates again.
    """
    group, params, state = run.group, run.params, run.state
    for buffer in run.model.buffers():  # batch norm's running statistics: rank 0's are the network's
        group.broadcast_(buffer)
    run.model.eval()
    counts = Counts.zeros(group.device)
    batches = validation_batches(
        split, params.validation_scale, params.input_size, params.batch_size,
        group.rank, group.world_size, workers, pin, decoder,
    )  # fmt: skip
    feed = Feed(batches, group.device, stop)
    largest_share, stopped = -(-len(split) // group.world_size), False
    num_batches = -(-largest_share // params.batch_size)
    for number in range(num_batches):  # as many on every rank, also where one has no image left: they agree on stopping
        there = not stopped and feed.fetch()
        stopped = stopped or stop()
        if number % STOP_BATCHES == 0 and group.any(stopped):
            break
        if there and not stopped:
            crops = feed.take()
            inputs = run.prepare(crops.images)
            with torch.autocast(group.device.type, run.precision, enabled=run.precision != torch.float32):
                scores = run.model(inputs)
            counts.add(scores, crops.labels)
    run.model.train()
    if group.any(stopped):
        return False
    values = Counts(group.sum_(counts.total)).values()
    if values["num_images"] != len(split):
        raise AssertionError(f"validated {values['num_images']} of {len(split)} images")
    if not math.isfinite(values["loss"]):
        raise Refused(
            f"step {state.step}: the validation loss is not finite; training has diverged at learning rate "
            f"{run.schedule.rate(state.step - 1):g}. Earlier checkpoints are good. Lower train.learning_rate or "
            "lengthen the warm-up."
        )
    trained = Counts(group.sum_(run.epoch.total)).values()
    run.epoch = Counts.zeros(group.device)
    row = {
        "step": state.step,
        "learning_rate": run.schedule.rate(state.step - 1),
        "train_loss": trained["loss"],
        "train_top1_error": trained["top1_error"],
        "val_loss": values["loss"],
        "val_top1_error": values["top1_error"],
        "val_top5_error": values["top5_error"],
    }
    state.history.append({"epoch": len(state.history) + 1, **row})
    state.validated_step = state.step
    run.schedule.validated(values["top1_error"])
    if values["top1_error"] < state.best_error or not state.best_step:
        state.best_error, state.best_step = values["top1_error"], state.step
    watcher.point(state.step, {f"val/{name}": values[name] for name in ("loss", "top1_error", "top5_error")})
    log.info(
        "epoch %d, step %d: train loss %.4f, top-1 error %.2f %%; val loss %.4f, top-1 %.2f %%, top-5 %.2f %%",
        len(state.history), state.step, trained["loss"], 100 * trained["top1_error"],
        values["loss"], 100 * values["top1_error"], 100 * values["top5_error"],
    )  # fmt: skip
    return True


def warn_if_stuck(run: Run, loss: float, when: str) -> None:
    """Deep nets with small first weights stay at ln(classes) for ever: say so, with what causes it."""
    chance = math.log(run.model.architecture.num_classes)
    if STUCK < loss / chance < 2 - STUCK:
        log.warning(
            "the loss (%.4f) is stuck at ln(classes) = %.4f %s: with init %r and learning rate %g this network may "
            "never start to learn. Init 'glorot', 'kaiming' or 'shallower', or a warm-up of one epoch, is the usual "
            "cure.", loss, chance, when, run.params.init, run.params.learning_rate,
        )  # fmt: skip


def arithmetic(
    params: TrainParams, group: Group, num_images: int, num_steps: int, schedule: Schedule, precision: torch.dtype
) -> str:
    """The numbers of the run, so that a reader can check them by hand."""
    share = params.batch_size / group.world_size
    return (
        f"{num_images:,} images · {params.batch_size} a step ({share:g} × {group.world_size} ranks, "
        f"{group.device.type}, {str(precision).removeprefix('torch.')}) · "
        f"{num_images / params.batch_size:,.1f} steps an epoch · "
        f"{params.epochs} epochs = {num_steps:,} steps\n{schedule.describe()}"
    )


def curves(state: dict[str, Any]) -> Iterator[list[str]]:
    """The history as rows of a CSV, header first."""
    rows = state["history"]
    if rows:
        yield list(rows[0])
        for row in rows:
            yield [f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values()]
