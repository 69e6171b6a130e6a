"""Training (arXiv 1409.1556 §3.1): SGD on random crops, resumable at any step, bit for bit.

`train` starts or continues a run, then loops over validate, save, stop, update.
"""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import torch
from torch import nn

from runtime.distributed import Group
from runtime.errors import Preempted, WrongParameters
from runtime.saver import Saver
from runtime.shards.batches import Crops
from runtime.shards.loader import Feed, Loader
from runtime.stopping import Stop
from vgg.data import roi
from vgg.data.stream import training_batches
from vgg.network.trained import Trained
from vgg.training.agenda import Agenda, num_steps_of
from vgg.training.objective import Measured
from vgg.training.reporting import LOG_STEPS, Reporter, arithmetic, read_window, without_effect
from vgg.training.run import Run, connect, restore, samples_digest, save, settle, start
from vgg.training.task import Continue, Finished, Task, describe, find_run
from vgg.training.trouble import stop_if_not_finite
from vgg.training.validation import validate
from vgg.training.warmup import regroup, warm_up

log = logging.getLogger("vgg.train")


def train(task: Task, group: Group, reporter: Reporter, stop: Stop) -> Trained | None:
    """Train to the end, from the newest good checkpoint of the task's directory, if any.

    Returns the trained network on rank 0; on other ranks None, unless training was already finished.
    stop: called at every step; if it returns True, the state is saved and Preempted is raised.
    Raises WrongParameters if a rank would have no image, and Refused if the directory contains another unfinished run
    or a loss or gradient is not finite.
    """
    params, split, objective = task.params, task.split("train"), task.objective
    if params.batch_size < group.world_size:
        raise WrongParameters(f"train.batch_size: {params.batch_size} is below the number of ranks, {group.world_size}")
    metadata = describe(task, group.device)
    found = find_run(task.directory, metadata, task.accept_code_change, group)
    if isinstance(found, Finished):
        return found.trained
    run = start(task, metadata, group)
    if isinstance(found, Continue):
        restore(run, found.step)
        log.info("continuing %s at step %d", task.directory, run.state.step)
    if group.device.type == "cuda":  # on a CPU nothing is compiled, and memory is not measured
        warm_up(run, stop)
    connect(run)
    regroup(run)

    num_steps = num_steps_of(params, len(split))
    log.info("%s", arithmetic(run, len(split), num_steps))
    if group.is_first:
        for line in without_effect(params, group.device.type, group.world_size, len(split)):
            log.warning("train.%s", line)
    loader = Loader.of(group, roi.DeviceDecoder(group.device) if params.decoder == "device" else None)
    steps = range(run.state.step, num_steps)
    feed = Feed(training_batches(loader, split, params, steps, objective.training_crops), group.device, stop)
    saver = Saver(task.directory, metadata, params.keep_checkpoints, reporter.saved)
    agenda = Agenda(run, len(split), num_steps, saved_step=run.state.step if isinstance(found, Continue) else None)
    with contextlib.closing(saver), contextlib.closing(feed):
        agenda.agree_on_stop(stop() or (agenda.needs_data() and not feed.fetch()))
        while True:
            if agenda.validation_is_due():
                agenda.validated(validate(run, agenda.epoch, task.split("val"), loader, reporter, stop))
            if agenda.must_save():
                stop_if_not_finite(run, split, task.directory)
                save(run, saver)
                agenda.saved()
            if agenda.ends() or agenda.stopping:
                break
            update(run, feed.take())
            run.state.step += 1
            has_data = feed.fetch() or not agenda.needs_data()  # the device computes meanwhile
            if run.state.step % LOG_STEPS == 0:
                stop_if_not_finite(run, split, task.directory)
                read_window(run, len(split), feed, reporter)
            reporter.progress(run.state.step, num_steps)
            # the ranks agree on every step before it starts, so that none waits in it for one that stops or has no data
            agenda.agree_on_stop(stop() or saver.failed() or not has_data)
        settle(run, saver)
        if not agenda.ends():
            raise Preempted(f"stopped at step {run.state.step} of {num_steps}; the state is saved. Run again.")
    trained = Trained.finish(task.directory, run.state.step, run.state.best_step, metadata) if group.is_first else None
    group.barrier()
    return trained


def update(run: Run, crops: Crops) -> None:
    """One step of SGD on this rank's share of the global batch.  The host does not wait for the device."""
    step, group = run.state.step, run.group
    numbers = crops.numbers.numpy()
    positions = group.rank + group.world_size * np.arange(len(numbers))
    run.samples = (run.samples + samples_digest(step, positions, numbers)) % 2**64
    run.optimiser.forget_gradients()
    parts = run.parts(crops)
    for number, part in enumerate(parts, 1):  # gradients accumulate and are exchanged with the last part
        local = group.world_size == 1 or number == len(parts)
        with contextlib.nullcontext() if local else run.replica.no_sync():  # type: ignore[operator]
            loss, measured = losses(run, part)
            loss.backward()  # type: ignore[no-untyped-call]
        run.window.add(*measured)
        run.epoch.add(*measured)
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    finite = torch.isfinite(nn.utils.get_total_norm(gradients, foreach=True))
    run.trouble_step.copy_(torch.where((run.trouble == 0) & ~finite, step, run.trouble_step))
    run.trouble.copy_(torch.maximum(run.trouble, (~finite).float()))
    run.optimiser.step(run.schedule.rate(step))


def losses(run: Run, crops: Crops) -> tuple[torch.Tensor, Measured]:
    """The contribution of these images to the loss of the global batch, float32 (), and what is counted of them."""
    inputs = run.prepare(crops.images, crops.flip, crops.colour)
    with torch.autocast(run.group.device.type, run.precision, enabled=run.precision != torch.float32):
        outputs = run.replica(inputs, crops.dropout)
    measured = run.objective.measure(outputs.float(), crops)
    # the mean over the global batch; DDP averages over ranks, whose shares may differ by one image
    loss = measured.loss * (run.group.world_size / run.params.batch_size)
    # a loss that is not finite makes all gradients NaN, by their exchange on every rank
    loss = loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
    return loss, measured
