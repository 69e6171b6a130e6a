"""Reports of a running training: a progress bar and MLflow; on other ranks than the first, heartbeats only."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from components import program

if TYPE_CHECKING:
    from components.stage import Stage
    from runtime.distributed import Group
    from runtime.ranks.watched import Heartbeat
    from runtime.targets import Output
    from vgg.network.trained import Trained
    from vgg.training.task import Task


def reporting(
    stage: Stage[Any], task: Task, location: str, heartbeat: Heartbeat, output: Output, group: Group,
    made: str = "checkpoint",
) -> Silent:  # fmt: skip
    """The reporter of this rank; only rank 0 reports and logs."""
    if group.is_first:
        return Reporter(stage, task, location, heartbeat, output, made)
    program.log.setLevel("WARNING")
    return Silent(heartbeat)


class Silent:
    """Reports only heartbeats: a vgg.training.reporting.Reporter."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None: ...

    def progress(self, step: int, num_steps: int) -> None:  # noqa: ARG002
        self.heartbeat.training()

    def point(self, step: int, values: dict[str, float]) -> None: ...
    def saved(self) -> None: ...


class Reporter(Silent):
    """The reporter of rank 0: progress bar, curves in MLflow, uploads of checkpoints.

    made: name of the output in the stage's records.
    """

    def __init__(
        self,
        stage: Stage[Any],
        task: Task,
        location: str,
        heartbeat: Heartbeat,
        output: Output,
        made: str = "checkpoint",
    ) -> None:
        from components.progress import Progress
        from components.tracking import names

        super().__init__(heartbeat)
        self.made = made
        self.stage, self.location, self.output, self.curves = stage, location, output, Path(stage.args.curves)
        self.steps, self.batch_size, self.errors = 0, task.params.batch_size, task.objective.errors
        self.bar = Progress(stage.name, scale=self.batch_size, warm=True)
        self.tracker = stage.tracked(location)
        if stage.name == "train":  # which names the pipeline's run
            self.tracker.name(names.title(task.shards.manifest["dataset"], task.params.model_dump()))
        stage.track_shards(self.tracker, task.shards, "train", "train")
        self.since = time.monotonic()

    def __enter__(self) -> Self:
        self.tracker.__enter__()
        self.bar.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.__exit__(*exception)
        self.tracker.__exit__(*exception)

    def saved(self) -> None:
        self.tracker.journal.sync()  # a resumed run does not compute earlier points again
        self.output.upload_checkpoints()

    def progress(self, step: int, num_steps: int) -> None:
        self.heartbeat.training()
        self.steps += 1
        self.bar(step, num_steps)

    def point(self, step: int, values: dict[str, float]) -> None:
        from components.tracking import names

        if "train/loss" in values:
            now = time.monotonic()
            values[names.SPEED] = self.steps * self.batch_size / (now - self.since)
            values[names.DATA_WAIT] = 100 * values.pop("perf/data_wait_seconds") / (now - self.since)
            self.since, self.steps = now, 0
            self.bar.figures(loss=values["train/loss"], error=values[f"train/{self.errors[0]}"])
        else:  # a validation, whose time does not count as training
            self.since, self.steps = time.monotonic(), 0
        self.tracker.point(step, names.curves(values))

    def finished(self, trained: Trained) -> None:
        from components.tracking import names

        last = trained.step.state["history"][-1]
        error = f"val_{self.errors[0]}"
        errors = {f"final_{error}": last[error], f"best_{error}": trained.step.state["best_error"]}
        self.tracker.metrics(names.results(errors))
        # the parent's are those of the classification network, which is what is registered
        to = "both" if self.stage.name == "train" else "child"
        self.tracker.tags({"vgg.weights_sha256": trained.weights_sha256}, to)
        self.stage.made(self.tracker, self.made, self.location, trained.digest)
        self.tracker.artifact(self.curves, "curves", to="both")
