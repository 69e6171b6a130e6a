"""Trainings of the tiny network in this process, stopped at a given step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from conftest import ALONE, train_params

from runtime.shards.shardset import ShardSet
from vgg.network.trained import Trained
from vgg.training.loop import train
from vgg.training.task import Task


class StopAt:
    """A runtime.stopping.Stop that requests a stop after `times` calls."""

    def __init__(self, times: int | None) -> None:
        self.times, self.calls = times, 0

    def __call__(self) -> bool:
        self.calls += 1
        return self.times is not None and self.calls > self.times

    def interrupts(self) -> AbstractContextManager[None]:
        return nullcontext()


class Points:
    """A reporter that collects the points of the curves."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []

    def progress(self, step: int, num_steps: int) -> None: ...
    def saved(self) -> None: ...

    def point(self, step: int, values: dict[str, float]) -> None:
        self.points.append((step, values))


def run(
    shards: ShardSet, directory: Path, stop_at: int | None = None, initial: Path = Path("none"), **changes: object
) -> Points:
    """Train the tiny network.  stop_at: request a stop before the update of that step.  changes: of parameters."""
    reporter, stop = Points(), StopAt(stop_at)
    code = {"vgg/training/loop.py": str(changes.pop("code", "1"))}
    accept = bool(changes.pop("accept_code_change", False))
    params = train_params(**changes)
    weights = Trained.open(initial) if params.init in ("shallower", "checkpoint") else None
    task = Task(
        params=params, shards=shards, directory=directory, code=code, initial=weights, accept_code_change=accept
    )
    train(task, ALONE, reporter, stop)
    return reporter


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
