"""Existing runs: the commands list, logs and cancel of pipelines.submit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from runtime.errors import Refused

if TYPE_CHECKING:
    from pipelines.kfp.runs import Pipelines
    from pipelines.preflight.cluster import Cluster

KEPT = "kept: shards, checkpoints and tracked points; the same submission, or resume {}, continues from them"


def print_list(pipelines: Pipelines, experiment: str) -> None:
    from pipelines.kfp import find

    runs = find.newest(pipelines, experiment)
    print(find.table(runs) if runs else f"no runs of this pipeline, nor in the experiment {experiment}")


def print_logs(pipelines: Pipelines, run_id: str, step: str | None, cluster: Callable[[], Cluster]) -> None:
    """Raises Refused if no log of the one step is left."""
    from pipelines.kfp import steplogs

    logs = []
    for log in steplogs.read(pipelines.server, pipelines.get(run_id), step, cluster):
        print(log, flush=True)
        logs.append(log)
    if step and all(log.text is None for log in logs):
        raise Refused(f"step {step}: {logs[-1].why}")


def cancel(pipelines: Pipelines, run_id: str, poll_seconds: float, cluster: Callable[[], Cluster]) -> None:
    from pipelines.kfp import cancel

    remains = cancel.cancel(pipelines, run_id, poll_seconds, cluster)
    print(f"run {pipelines.get(run_id).display_name} CANCELED", *remains, KEPT.format(run_id), sep="\n")
