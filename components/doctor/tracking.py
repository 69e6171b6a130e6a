"""MLflow: a server that cannot be used, journals that wait for it, runs that nobody will end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.doctor.finding import Finding, Patient
from components.tracking import access
from components.tracking.address import shown, tracking_uri
from components.tracking.problems import translated
from components.tracking.tracker import output_key
from runtime import environment, manifest
from runtime.errors import Problem
from runtime.wording import counted

if TYPE_CHECKING:
    from mlflow.entities import Run

REPLAY = "python -m components.tracking replay"


def journals(patient: Patient) -> Iterator[Finding]:
    """Events that MLflow does not have, of stages that do not run; and what was unreadable."""
    for path in sorted(patient.journals.glob("*/events.jsonl")):
        if path.parent.name not in patient.at_work and (waiting := _waiting(path.parent)):
            yield Finding(f"journal {path.parent}: {counted(waiting, 'event')} wait for MLflow", REPLAY)
    for path in sorted(patient.journals.glob("*.damaged")):
        yield Finding(
            f"{path}: {path.stat().st_size:,} bytes of events that could not be read",
            f"they are lost for MLflow; look at them, then rm {path}",
        )


def _waiting(folder: Path) -> int:
    """Number of events of a journal that are not delivered."""
    delivered = {"events": 0, "artifacts": 0}
    state = manifest.unsealed(_bytes(folder / "delivered.json"))
    delivered |= state["delivered"] if state else {}
    events = [manifest.unsealed(line) for line in _bytes(folder / "events.jsonl").splitlines(keepends=True)]
    kinds = [("artifacts" if event["kind"] == "artifact" else "events", event["number"]) for event in events if event]
    return sum(number > delivered[kind] for kind, number in kinds)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def server(patient: Patient) -> Iterator[Finding]:
    """A server that does not answer, or never will; runs of this project that are open although nothing runs."""
    uri = tracking_uri()
    if uri.startswith("sqlite"):
        yield from _lost(patient, uri)
        if not access.database_file(uri).exists():
            patient.notes.append(f"{shown(uri)}: no run yet")
            return
    try:
        client = access.connect()
        with translated():
            experiment = client.get_experiment_by_name(access.EXPERIMENT)
            found = (
                client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'") if experiment else []
            )
    except Problem as reason:
        yield Finding(str(reason), "see the message", reason.exit_code)
        return
    yield from _open(patient, uri, list(found))


def _lost(patient: Patient, uri: str) -> Iterator[Finding]:
    """The version of metrics/register.json is not in the database file, although its model is here."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        model = json.loads((patient.project / "metrics/register.json").read_bytes())
        is_here = (patient.project / "models/vgg/manifest.json").exists()
        if is_here and not access.has_version(uri, model["model_name"], str(model["version"])):
            yield Finding(
                f"{shown(uri)}: has no version {model['version']} of {model['model_name']}, which is in "
                "metrics/register.json",
                "dvc repro -f -s register",
            )


def _open(patient: Patient, uri: str, running: list[Run]) -> Iterator[Finding]:
    """Runs left open.  Of a server only those of this project's outputs: another machine may be at work on others."""
    place = patient.journals / "place"
    own = {output_key(str(patient.project / name)): name for name in _all_outputs(patient)} if place.exists() else {}
    is_own = uri.startswith("sqlite") and access.database_file(uri).absolute().parent == patient.project.absolute()
    busy = {key for key, name in own.items() if name in patient.at_work} | set(_runs_at_work(patient))
    foreign = 0
    for run in running:
        tags, run_id = run.data.tags, str(run.info.run_id)
        outputs = {value for tag, value in tags.items() if tag.startswith("vgg.output")}
        if run_id in busy or outputs & busy:
            continue
        if not is_own and not outputs & own.keys():
            foreign += 1
            continue
        name = tags.get("mlflow.runName", "?")
        after = " (preempted: the same command continues it)" if "vgg.preempted" in tags else ""
        code = f"import mlflow; mlflow.MlflowClient('{shown(uri)}').set_terminated('{run_id}', 'KILLED')"
        yield Finding(
            f"MLflow run {run_id} ({name}) is RUNNING, and no process works on it{after}",
            f'run its stage again, which continues it, or close it: python -c "{code}"',
        )
    if foreign:
        patient.notes.append(f"{counted(foreign, 'run')} of other places are RUNNING: not judged from here")


def _all_outputs(patient: Patient) -> list[str]:
    from components.lineage.places import outputs

    return list(outputs(patient.project))


def _runs_at_work(patient: Patient) -> Iterator[str]:
    """IDs of the runs whose journals are open in a process, and of their parents."""
    for name in patient.at_work:
        state: dict[str, Any] | None = manifest.unsealed(_bytes(environment.JOURNAL.get() / name / "delivered.json"))
        if state:
            yield from state["runs"].values()
