"""Exit task of a pipeline run, after success or failure: write a page for Kubeflow, end the parent run in MLflow."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import program
from runtime import environment

if TYPE_CHECKING:
    from mlflow.entities import Run

STATES = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED", "CANCELLED": "KILLED", "CANCELED": "KILLED"}
FIGURES = {  # metrics on the page: name in MLflow, text
    "data/num_train": "{:,.0f} training images",
    "data/num_val": "{:,.0f} validation images",
    "final_val_top1_error_percent": "{:.2f} % top-1 error after the last epoch",
    "top1_error_percent": "{:.2f} % top-1 error",
    "top5_error_percent": "{:.2f} % top-5 error",
}


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.report", __doc__)
    flags.add_argument("--status", required=True, metavar="JSON", help="Kubeflow's PipelineTaskFinalStatus")
    flags.add_argument("--summary", required=True, metavar="FILE", help="out: the page, Markdown")
    program.add_executor_input(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    from components.tracking import access
    from components.tracking.address import shown, tracking_uri
    from components.tracking.problems import problem
    from runtime import manifest
    from runtime.errors import WrongParameters
    from runtime.redaction import redacted

    try:
        status = dict(json.loads(args.status))
    except (ValueError, TypeError):
        raise WrongParameters(f"--status: {args.status!r} is not a JSON object") from None
    runs, address = [], ""
    try:
        runs = close(access.connect(), STATES.get(status.get("state", ""), "FAILED"))
        address = shown(tracking_uri())
    except Exception as error:  # write the page all the same: a report must not fail a successful run
        program.log.warning("the page has no figures: %s", problem(error) or error)
    text = redacted(page(status, runs, address))
    manifest.write_atomically(Path(args.summary), lambda file: file.write(text.encode()))
    program.write_executor_output(args.executor_output, {}, {"summary": (args.summary, {})})
    program.log.info("%s", text)


def close(client: Any, state: str) -> list[Run]:
    """End the MLflow runs of this pipeline run that a lost step left open; returns the parent and its children."""
    from components.tracking import access, provenance

    experiment = client.get_experiment_by_name(access.EXPERIMENT)
    if experiment is None:
        return []
    lineage = f"tags.`vgg.lineage` = '{provenance.lineage('{}')}' and tags.`vgg.stage` = 'pipeline'"
    found = client.search_runs([experiment.experiment_id], lineage, max_results=1)
    if not found:
        return []
    parent = found[0]
    children = client.search_runs(
        [experiment.experiment_id],
        f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
        order_by=["attributes.start_time ASC"],
    )
    for run in children:
        if run.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, state)
    if parent.info.status != state:  # its stages may all have ended well, and the next one never began
        client.set_terminated(parent.info.run_id, state)
    client.set_tag(parent.info.run_id, "vgg.pipeline.state", state)
    return [client.get_run(run.info.run_id) for run in (parent, *children)]


def page(status: dict[str, Any], runs: list[Run], address: str) -> str:
    """Markdown: state of the run, figures of every stage, where to look, what to do next."""
    name, state = environment.PIPELINE_RUN.get(), status.get("state", "unknown")
    lines = [f"# Run {name} {state.lower()}", ""]
    if message := (status.get("error") or {}).get("message"):
        lines += [f"> {line}" for line in str(message).strip().splitlines()] + [""]
    if runs:
        parent, *children = runs
        lines += ["| stage | state | figures |", "|---|---|---|"]
        for run in children:
            metrics = run.data.metrics
            figures = ", ".join(text.format(metrics[key]) for key, text in FIGURES.items() if key in metrics)
            lines.append(f"| {run.data.tags.get('vgg.stage', '')} | {run.info.status.lower()} | {figures} |")
        tags = parent.data.tags
        lines += [""]
        if gate := tags.get("vgg.gate"):
            lines += [f"Gate: {gate}", ""]
        if model := tags.get("vgg.model"):
            lines += [f"Model: {model}", ""]
        lines += [f"MLflow: {address}/#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}", ""]
    if state != "SUCCEEDED":
        resume = f"`python -m pipelines.submit resume {name}`"
        what = "run the same command again" if name.startswith("local-") else resume
        lines += [f"To continue where it stopped: {what}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    program.run(main)
