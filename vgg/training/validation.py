"""Validation after every epoch: exact on any number of ranks, and interruptible."""

from __future__ import annotations

import logging
import math

import torch

from runtime.errors import Refused
from runtime.shards.loader import Feed, Loader
from runtime.shards.shardset import Split
from runtime.stopping import Stop
from vgg.data.stream import validation_batches
from vgg.evaluation.metrics import Counts
from vgg.training.reporting import Reporter, shown, warn_if_stuck
from vgg.training.run import Run

log = logging.getLogger("vgg.train")

STOP_BATCHES = 10  # interval, in batches, at which the ranks agree on stopping


@torch.no_grad()
def validate(run: Run, epoch: int, split: Split, loader: Loader, reporter: Reporter, stop: Stop) -> bool:
    """Validate on central crops of all images; updates the history, the schedule and the best step.

    epoch: completed passes over the training set, for the history.
    Returns False if a stop was requested; then nothing has changed, and the next start validates again.
    Raises Refused if the loss is not finite.
    """
    group, params, state = run.group, run.params, run.state
    for buffer in run.model.buffers():  # running statistics of batch norm: those of rank 0 are used
        group.broadcast_(buffer)
    run.model.eval()
    counts = Counts.zeros(group.device)
    batches = validation_batches(loader, split, params, run.objective.validation_crops)
    feed = Feed(batches, group.device, stop)
    largest_share, stopped = -(-len(split) // group.world_size), False
    num_batches = -(-largest_share // params.batch_size)
    for number in range(num_batches):  # equally many on every rank, because any() is collective
        fetched = not stopped and feed.fetch()
        stopped = stopped or stop()
        if number % STOP_BATCHES == 0 and group.any(stopped):
            break
        if fetched and not stopped:
            crops = feed.take()
            inputs = run.prepare(crops.images)
            with torch.autocast(group.device.type, run.precision, enabled=run.precision != torch.float32):
                outputs = run.model(inputs)
            counts.add(*run.objective.validate(outputs.float(), crops))
    run.objective.set_training(run.model)
    if group.any(stopped):
        return False
    errors = run.objective.errors
    values = Counts(group.sum_(counts.total)).values(errors)
    if values["num_images"] != len(split):
        raise AssertionError(f"validated {values['num_images']} of {len(split)} images")
    if not math.isfinite(values["loss"]):
        raise Refused(
            f"step {state.step}: the validation loss is not finite; training has diverged at learning rate "
            f"{run.schedule.rate(state.step - 1):g}. Earlier checkpoints are good. Lower train.learning_rate or "
            "lengthen the warm-up."
        )
    trained = Counts(group.sum_(run.epoch.total)).values(errors)
    run.epoch = Counts.zeros(group.device)
    row = {
        "step": state.step,
        "learning_rate": run.schedule.rate(state.step - 1),
        "train_loss": trained["loss"],
        f"train_{errors[0]}": trained[errors[0]],
        "val_loss": values["loss"],
        f"val_{errors[0]}": values[errors[0]],
        f"val_{errors[1]}": values[errors[1]],
    }
    state.history.append({"epoch": epoch, **row})
    state.validated_step = state.step
    run.schedule.validated(values[errors[0]])
    if values[errors[0]] < state.best_error or not state.best_step:
        state.best_error, state.best_step = values[errors[0]], state.step
    reporter.point(state.step, {f"val/{name}": values[name] for name in ("loss", *errors)})
    first, second = map(shown, errors)
    log.info(
        "epoch %d, step %d: train loss %.4f, %s error %.2f %%; val loss %.4f, %s %.2f %%, %s %.2f %%",
        epoch, state.step, trained["loss"], first, 100 * trained[errors[0]],
        values["loss"], first, 100 * values[errors[0]], second, 100 * values[errors[1]],
    )  # fmt: skip
    if len(state.history) == 1:
        warn_if_stuck(run, min(trained["loss"], values["loss"]), "after the first epoch")
    return True
