"""Requests to Kubeflow Pipelines that only a proof makes: remove what it made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pipelines.kfp.runs import Pipelines, named
from pipelines.kfp.server import Unsure
from runtime.errors import Unreachable


@contextlib.contextmanager
def _certain() -> Iterator[None]:
    """A request of which it is unknown whether it was applied, as Unreachable."""
    try:
        yield
    except Unsure as unsure:
        raise Unreachable(str(unsure)) from None


def delete_run(pipelines: Pipelines, run_id: str) -> None:
    """With its workflow and its pods."""
    with _certain():
        pipelines.server.send(pipelines.server.runs.run_service_delete_run, run_id)


def runs_of(pipelines: Pipelines, experiment_id: str) -> list[Any]:
    """All runs of an experiment, at most 100."""
    listing = pipelines.server.runs.run_service_list_runs
    return list(pipelines.server.ask(listing, experiment_id=experiment_id, page_size=100).runs or [])


def delete_experiment(pipelines: Pipelines, experiment_id: str) -> None:
    with _certain():
        pipelines.server.send(pipelines.server.experiments.experiment_service_delete_experiment, experiment_id)


def delete_version(pipelines: Pipelines, name: str) -> bool:
    """The version of our pipeline with this name, and the pipeline if that was its only one.  Whether it was there."""
    server, service = pipelines.server, pipelines.server.pipelines
    pipeline = pipelines.known_pipeline()
    if not pipeline:
        return False
    listing = service.pipeline_service_list_pipeline_versions
    found = server.ask(listing, pipeline, filter=named(name), page_size=1).pipeline_versions
    with _certain():
        for one in found or []:
            remove = service.pipeline_service_delete_pipeline_version
            server.send(remove, pipeline, one.pipeline_version_id)
        if found and not server.ask(listing, pipeline, page_size=1).pipeline_versions:
            server.send(service.pipeline_service_delete_pipeline, pipeline)
    return bool(found)
