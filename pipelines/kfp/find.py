"""The runs of Kubeflow: the newest ones, and one by its ID, the beginning of it, or its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from pipelines.kfp.runs import Pipelines, filtered, named
from pipelines.kfp.waiting import was_canceled
from runtime.errors import WrongParameters
from runtime.wording import counted

PAGE = 100  # the server gives at most 200
SHOWN = 20
RUN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
BEGINNING = re.compile(r"[0-9a-f-]{1,35}")


def newest(pipelines: Pipelines, experiment: str, limit: int = SHOWN) -> list[Any]:
    """Runs of our pipeline, and of an experiment (its name), newest first; not those in the archive."""
    ours = {pipelines.known_pipeline(), pipelines.known_experiment(experiment)} - {None}

    def of_us(run: Any) -> bool:
        version = run.pipeline_version_reference
        return run.storage_state != "ARCHIVED" and bool(ours & {run.experiment_id, version and version.pipeline_id})

    return list(islice(filter(of_us, _pages(pipelines)), limit)) if ours else []


def run_id(pipelines: Pipelines, text: str) -> str:
    """The ID of the run that a text means.  Raises WrongParameters if there is none or more than one."""
    if RUN_ID.fullmatch(text):
        return text
    found = {run.run_id: run for run in _pages(pipelines, named(text))}
    if BEGINNING.fullmatch(text):
        containing = _pages(pipelines, filtered("IS_SUBSTRING", "run_id", text))
        found |= {run.run_id: run for run in containing if run.run_id.startswith(text)}
    if len(found) == 1:
        return str(next(iter(found)))
    if found:
        raise WrongParameters(
            f"{text!r} is the name, or the beginning of the ID, of {counted(len(found), 'run')}. "
            f"Write more of the ID:\n{table(_some(found.values()))}"
        )
    similar = _some(_pages(pipelines, filtered("IS_SUBSTRING", "display_name", text)))
    shown = similar or _some(_pages(pipelines))
    what = "Runs with it in their names" if similar else "The newest runs"
    candidates = f"{what}:\n{table(shown)}" if shown else f"{pipelines.server.host} has no runs in this namespace."
    raise WrongParameters(
        f"{text!r} is neither the ID of a run, nor the beginning of one, nor a whole name. {candidates}"
    )


def table(runs: Iterable[Any]) -> str:
    """One line for each run."""
    rows = [("ID", "STATE", "CREATED (UTC)", "TOOK", "NAME")]
    for run in runs:
        created = run.created_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M") if run.created_at else ""
        rows.append((run.run_id, state(run), created, _took(run), str(run.display_name)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join(
        "  ".join([*(f"{word:<{width}}" for word, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )


def state(run: Any) -> str:
    """As Kubeflow's, but a run that a user stopped is CANCELED, which 2.17 calls FAILED."""
    return "CANCELED" if run.state == "FAILED" and was_canceled(run) else str(run.state or "UNKNOWN")


def _took(run: Any) -> str:
    """Hours and minutes; until now, if it has not ended."""
    if not run.created_at:
        return ""
    ended = run.finished_at if run.finished_at and run.finished_at.year > 1970 else None  # 1970: it has not ended
    minutes = int(((ended or datetime.now(UTC)) - run.created_at).total_seconds() // 60)
    return f"{minutes // 60}:{minutes % 60:02}"


def _some(runs: Iterable[Any]) -> list[Any]:
    return list(islice(runs, SHOWN))


def _pages(pipelines: Pipelines, only: str | None = None) -> Iterator[Any]:
    """All runs of the namespace, newest first.  only: a filter."""
    listing, token = pipelines.server.runs.run_service_list_runs, ""
    wanted: dict[str, Any] = {"sort_by": "created_at desc", "page_size": PAGE}
    wanted |= {"namespace": pipelines.namespace} if pipelines.namespace else {}
    wanted |= {"filter": only} if only else {}
    while True:
        answer = pipelines.server.ask(listing, **wanted, **({"page_token": token} if token else {}))
        yield from answer.runs or []
        token = answer.next_page_token
        if not token:
            return
