"""Ends a run of a study in MLflow: registration does that, the last stage, which a study leaves out.

python -m pipelines.paper.tracked DIGEST     of the run's predictions

A program of its own, because MLflow writes its address into the environment of the process, which DVC would inherit.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from components.program import Parser, run

EVALUATED = "vgg.result.predictions"  # tag of an evaluation's run
SECONDS = 120


def end(predictions: str, project: Path) -> bool:
    """Whether that worked.  A study never fails with MLflow: why it shows the run as RUNNING is printed."""
    command = [sys.executable, "-m", "pipelines.paper.tracked", predictions]
    try:
        return subprocess.run(command, cwd=project, timeout=SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"MLflow does not answer within {SECONDS} s: it shows this run as RUNNING", file=sys.stderr)
        return False


def main() -> None:
    """Raises Problems of MLflow."""
    flags = Parser("pipelines.paper.tracked", __doc__)
    flags.add_argument("predictions", metavar="DIGEST")
    args = flags.parse_args()
    from components.tracking import access
    from components.tracking.problems import translated

    with translated():
        client = access.connect()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        for evaluation in client.search_runs(experiments, f"tags.`{EVALUATED}` = '{args.predictions}'"):
            parent = evaluation.data.tags.get("mlflow.parentRunId")
            if parent and client.get_run(parent).info.status == "RUNNING":
                client.set_terminated(parent, "FINISHED")


if __name__ == "__main__":
    run(main)
