"""Wait for a run: log every state change and why pods wait, and retry while the server is unreachable."""

from __future__ import annotations

import logging
import time
from typing import Any

from pipelines.kfp.failure import is_driver, is_step
from pipelines.kfp.pending import Pending
from pipelines.kfp.runs import ENDED, Pipelines

log = logging.getLogger("vgg.submit")


def wait(pipelines: Pipelines, run_id: str, poll_seconds: float, pending: Pending) -> tuple[Any, bool]:
    """The run after its end, and whether it was canceled.  Raises Unreachable if the server does not answer in time."""
    states: dict[str, str] = {}
    canceling = False
    while True:
        run = pipelines.get(run_id)
        _log_changes(run, states)
        canceling = canceling or run.state == "CANCELING"
        if run.state in ENDED:
            return run, run.state == "CANCELED" or (run.state == "FAILED" and (canceling or was_canceled(run)))
        for line in pending.news():
            log.info("%s  %s", time.strftime("%H:%M:%S"), line)
        time.sleep(poll_seconds)


def _log_changes(run: Any, states: dict[str, str]) -> None:
    """states: those logged already, by task; updated."""
    details = (run.run_details.task_details if run.run_details else None) or []
    tasks = {f"task {task.display_name}": task.state for task in details if _is_shown(task)}
    for name, state in {**tasks, "run": run.state}.items():
        if state and states.get(name) != state:
            states[name] = state
            log.info("%s  %s %s", time.strftime("%H:%M:%S"), name, state)


def _is_shown(task: Any) -> bool:
    """Steps, and drivers that failed."""
    name = str(task.display_name)
    return is_step(name) or (task.state == "FAILED" and is_driver(name))


def was_canceled(run: Any) -> bool:
    """A canceled run ends FAILED (2.17); the state before that was CANCELING."""
    history = [status.state for status in run.state_history or []]
    return history[-2:] == ["CANCELING", "FAILED"]
