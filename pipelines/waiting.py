"""Waiting for a run: a line for every change, and patience with a server that is away for a while."""

from __future__ import annotations

import logging
import time
from typing import Any

from pipelines.failure import is_step
from pipelines.runs import ENDED, Pipelines

log = logging.getLogger("vgg.submit")


def wait(pipelines: Pipelines, run_id: str, poll_seconds: float) -> tuple[Any, bool]:
    """The run when it has ended, and whether it was canceled.  Raises Unreachable when patience is used up."""
    states: dict[str, str] = {}
    canceling = False
    while True:
        run = pipelines.get(run_id)
        _tell(run, states)
        canceling = canceling or run.state == "CANCELING"
        if run.state in ENDED:
            return run, run.state == "CANCELED" or (run.state == "FAILED" and (canceling or _was_canceled(run)))
        time.sleep(poll_seconds)


def _tell(run: Any, states: dict[str, str]) -> None:
    details = (run.run_details.task_details if run.run_details else None) or []
    seen = {f"task {task.display_name}": task.state for task in details if _is_worth_it(task)}
    for name, state in {**seen, "run": run.state}.items():
        if state and states.get(name) != state:
            states[name] = state
            log.info("%s  %s %s", time.strftime("%H:%M:%S"), name, state)


def _is_worth_it(task: Any) -> bool:
    name = str(task.display_name)
    return is_step(name) or (task.state == "FAILED" and name.endswith("-driver"))


def _was_canceled(run: Any) -> bool:
    """A run that was told to stop ends FAILED (2.17); what it was before says why."""
    history = [status.state for status in run.state_history or []]
    return history[-2:] == ["CANCELING", "FAILED"]
