"""Learning rate schedules: the paper's plateau rule (§3.1), or drops at fixed epochs."""

from __future__ import annotations

from typing import Any

from runtime.wording import counted
from vgg.params.train import Plateau, Steps


class Schedule:
    """The learning rate of every step.  state(): the counters of the plateau rule, for checkpoints."""

    def __init__(self, rule: Plateau | Steps, learning_rate: float, steps_per_epoch: float) -> None:
        self.rule, self.learning_rate, self.steps_per_epoch = rule, learning_rate, steps_per_epoch
        self.best_error, self.epochs_without, self.drops = 1.0, 0, 0

    def rate(self, step: int) -> float:
        """Learning rate of the update from `step` to `step + 1`."""
        rule, epoch = self.rule, step / self.steps_per_epoch
        warmup_steps = rule.warmup_epochs * self.steps_per_epoch
        rising = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        drops = sum(epoch >= end for end in rule.drop_epochs) if isinstance(rule, Steps) else self.drops
        return self.learning_rate * rising / float(rule.drop_factor) ** drops

    def validated(self, top1_error: float) -> None:
        """Update the plateau rule with the validation error (fraction) of an epoch."""
        if not isinstance(self.rule, Plateau):
            return
        if top1_error < self.best_error - self.rule.min_improvement:
            self.best_error, self.epochs_without = top1_error, 0
            return
        self.epochs_without += 1
        if self.epochs_without >= self.rule.patience:
            self.drops, self.epochs_without = self.drops + 1, 0

    @property
    def finished(self) -> bool:
        """Whether training ends early: the plateau rule requires more than max_drops drops."""
        return isinstance(self.rule, Plateau) and self.drops > self.rule.max_drops

    def state(self) -> dict[str, Any]:
        return {"best_error": self.best_error, "epochs_without": self.epochs_without, "drops": self.drops}

    def restore(self, state: dict[str, Any]) -> None:
        self.best_error, self.epochs_without, self.drops = (
            state["best_error"],
            state["epochs_without"],
            state["drops"],
        )

    def describe(self) -> str:
        rule = self.rule
        warmup = f", warm-up over {counted(rule.warmup_epochs, 'epoch')}" if rule.warmup_epochs else ""
        divided = f"rate {self.learning_rate:g}, divided by {rule.drop_factor:g} after"
        if isinstance(rule, Plateau):
            patience = counted(rule.patience, "epoch")
            return f"{divided} {patience} without improvement, at most {counted(rule.max_drops, 'time')}{warmup}"
        if not rule.drop_epochs:
            return f"rate {self.learning_rate:g}, constant{warmup}"
        drops = ", ".join(f"{epoch:g}" for epoch in rule.drop_epochs)
        return f"{divided} epoch{'s' if len(rule.drop_epochs) > 1 else ''} {drops}{warmup}"
