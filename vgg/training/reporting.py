"""Reports of a running training: points of curves, warnings, and a summary of its numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Protocol

from runtime.shards.loader import Feed
from runtime.wording import counted
from vgg.evaluation.metrics import Counts
from vgg.params.train import TrainParams
from vgg.training.run import Run
from vgg.training.task import share_of

log = logging.getLogger("vgg.train")

LOG_STEPS = 20  # interval at which counts are read from the device, each time for a point of the curves
STUCK = 0.99  # a loss whose ratio to ln(classes) is between this and 2 - this counts as stuck


class Reporter(Protocol):
    """Receives the progress of a training.  Must not influence results."""

    def progress(self, step: int, num_steps: int) -> None: ...
    def point(self, step: int, values: dict[str, float]) -> None: ...
    def saved(self) -> None: ...  # a checkpoint is on disk; called by the thread that wrote it


def read_window(run: Run, num_images: int, feed: Feed, reporter: Reporter) -> None:
    """Read the counts from the device and report a point of the curves; called every LOG_STEPS."""
    error = run.objective.errors[0]
    values = Counts(run.group.sum_(run.window.total)).values(run.objective.errors)
    run.window = Counts.zeros(run.group.device)
    step, rate = run.state.step, run.schedule.rate(run.state.step - 1)
    reporter.point(
        step,
        {
            "train/loss": values["loss"],
            f"train/{error}": values[error],
            "learning_rate": rate,
            "perf/data_wait_seconds": feed.waited_seconds,
        },
    )
    feed.waited_seconds = 0.0
    half_an_epoch = num_images / run.params.batch_size / 2
    if half_an_epoch <= step < half_an_epoch + LOG_STEPS:
        warn_if_stuck(run, values["loss"], f"after half an epoch (step {step})")


def shown(error: str) -> str:
    """top1_error as people say it: top-1."""
    return error.removesuffix("_error").replace("top", "top-").replace("_", " ")


def warn_if_stuck(run: Run, loss: float, when: str) -> None:
    """Warn if the loss stays at ln(classes), as in deep nets with small initial weights.  when: for the message."""
    params, chance = run.params, run.objective.chance(run.model)
    if chance is None or not (run.group.is_first and STUCK < loss / chance < 2 - STUCK):
        return
    remedies = [f"init {name!r}" for name in ("glorot", "kaiming", "shallower") if name != params.init]
    remedies += [] if params.schedule.warmup_epochs else ["a warm-up of one epoch"]
    log.warning(
        "the loss (%.4f) is stuck at ln(classes) = %.4f %s: with init %r and learning rate %g this network may never "
        "learn. Usual remedies: %s, or another learning rate.",
        loss, chance, when, params.init, params.learning_rate, ", ".join(remedies),
    )  # fmt: skip


def without_effect(params: TrainParams, device: str, num_ranks: int, num_images: int) -> Iterator[str]:
    """A line for every parameter that has no effect on this device, number of ranks or data, or not the expected one.

    device: "cpu" or "cuda".  num_images: of the training set.
    """
    share = share_of(params, num_ranks)
    if params.batch_size > num_images:
        yield f"batch_size: {params.batch_size} is more than the {num_images} images: a step uses some of them again"
    if params.micro_batch_size != "auto" and params.micro_batch_size > share:
        yield f"micro_batch_size: {params.micro_batch_size} has no effect; a rank computes {share} images a step"
    if params.gradient_compression != "none" and num_ranks == 1:
        yield "gradient_compression: has no effect on one rank"
    if device == "cpu" and params.decoder == "device":
        yield "decoder: 'device' has no effect without a GPU; images are decoded on the CPU"
    if device == "cpu" and params.deterministic:
        yield "deterministic: has no effect on a CPU, which is always deterministic"


def arithmetic(run: Run, num_images: int, num_steps: int) -> str:
    """A summary of the run: images, batch size, steps, epochs, schedule."""
    params, group = run.params, run.group
    share, on_cpu = params.batch_size / group.world_size, group.device.type == "cpu"
    unmeasured = on_cpu and params.micro_batch_size == "auto"
    note = "\nmicro_batch_size: on a CPU, 'auto' does not measure memory" if unmeasured else ""
    return (
        f"{num_images:,} images · {params.batch_size} a step ({share:g} × {counted(group.world_size, 'rank')}, "
        f"{group.device.type}, {str(run.precision).removeprefix('torch.')}) · "
        f"{num_images / params.batch_size:,.1f} steps an epoch · "
        f"{counted(params.epochs, 'epoch')} = {counted(num_steps, 'step')}\n{run.schedule.describe()}{note}"
    )


def curves(state: dict[str, Any]) -> Iterator[list[str]]:
    """The rows of the history for a CSV file, header first.  state: of a checkpoint."""
    rows = state["history"]
    if rows:
        yield list(rows[0])
        for row in rows:
            yield [f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values()]
