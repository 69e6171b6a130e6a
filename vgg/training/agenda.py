"""Decides what the training loop does next: validate, save, stop or end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vgg.params.train import TrainParams
from vgg.training.run import Run


def num_steps_of(params: TrainParams, num_images: int) -> int:
    """Number of steps of a training, unless its schedule ends it earlier."""
    return math.ceil(params.epochs * num_images / params.batch_size)


def ends_epoch(step: int, batch_size: int, num_images: int) -> bool:
    """Whether the update from `step` - 1 to `step` used the last image of an epoch."""
    return step > 0 and step * batch_size // num_images > (step - 1) * batch_size // num_images


@dataclass
class Agenda:
    """The decisions; they are the same on every rank.

    num_images: of the training set.  saved_step: the step whose complete state is saved or being written; None if no
    checkpoint exists or the newest is incomplete.  stopping: whether any rank has to stop.
    """

    run: Run
    num_images: int
    num_steps: int
    saved_step: int | None
    stopping: bool = False

    def validation_is_due(self) -> bool:
        """False while stopping: the next start validates."""
        state, params = self.run.state, self.run.params
        is_due = ends_epoch(state.step, params.batch_size, self.num_images) and state.validated_step < state.step
        return is_due and not self.stopping

    @property
    def epoch(self) -> int:
        """Number of passes over the training set that are complete."""
        params = self.run.params
        return min(self.run.state.step * params.batch_size // self.num_images, params.epochs)

    def validated(self, completed: bool) -> None:
        """Record the end of a validation.  completed: False if it was stopped."""
        if completed:
            self.saved_step = None  # a checkpoint written before this validation lacks its results
        else:
            self.stopping = True

    def must_save(self) -> bool:
        """Whether this state has to be saved: it is due, the last one, or the ranks stop."""
        state = self.run.state
        is_due = state.step > 0 and (
            state.step % self.run.params.checkpoint_steps == 0 or state.best_step == state.step
        )
        return self.saved_step != state.step and (is_due or self.ends() or self.stopping)

    def saved(self) -> None:
        self.saved_step = self.run.state.step

    def needs_data(self) -> bool:
        """Whether another step follows."""
        return self.run.state.step < self.num_steps

    def ends(self) -> bool:
        """Whether training is complete."""
        return (not self.needs_data() and not self.stopping) or self.run.schedule.finished

    def agree_on_stop(self, wanted: bool) -> None:
        """Stop if any rank wants to; collective."""
        self.stopping = self.run.group.any(wanted)
