"""What MLflow knows of a link: the runs that made it or used it, and the versions in the registry."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from components.lineage.links import OUTPUT, STAGE
from components.tracking import access
from components.tracking.address import shown, tracking_uri
from components.tracking.patience import GONE
from components.tracking.problems import translated
from runtime.errors import Problem, Refused

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Made:
    """A run that made a link: its provenance record, and where it wrote."""

    run_id: str
    record: dict[str, Any]
    address: str
    tags: dict[str, str]

    def __str__(self) -> str:
        return f"MLflow run {self.run_id}"


class Server:
    """Questions to MLflow.  Raises Unreachable if it does not answer, Refused if it refuses."""

    def __init__(self) -> None:
        self.client: MlflowClient = access.connect(create=False)

    @cached_property
    def experiments(self) -> list[str]:
        """All: the Kubeflow plugin has experiments of its own."""
        return [str(found.experiment_id) for found in self.client.search_experiments()]

    def version(self, name: str, which: str) -> ModelVersion:
        """which: a number, or '@' and an alias."""
        from mlflow.exceptions import MlflowException

        with translated():
            try:
                if which.startswith("@"):
                    return self.client.get_model_version_by_alias(name, which[1:])
                return self.client.get_model_version(name, which)
            except MlflowException as error:
                if error.error_code not in GONE:
                    raise
                raise Refused(
                    f"MLflow at {shown(tracking_uri())} has no models:/{name}{'' if which[0] == '@' else '/'}{which}. "
                    "Check the name, or set MLFLOW_TRACKING_URI to the server of that model."
                ) from None

    def run(self, run_id: str) -> Run:
        from mlflow.exceptions import MlflowException

        with translated():
            try:
                return self.client.get_run(run_id)
            except MlflowException as error:
                if error.error_code not in GONE:
                    raise
                raise Refused(
                    f"MLflow at {shown(tracking_uri())} has no run {run_id}. Check the ID, or set MLFLOW_TRACKING_URI."
                ) from None

    def aliases(self, version: ModelVersion) -> list[str]:
        with translated():
            aliases = self.client.get_registered_model(version.name).aliases
        return sorted(alias for alias, number in aliases.items() if str(number) == str(version.version))

    def versions_of(self, weights_sha256: str) -> list[ModelVersion]:
        with translated():
            return list(self.client.search_model_versions(f"tags.`weights_sha256` = '{weights_sha256}'"))

    def made(self, kind: str, digest: str, weights_sha256: str = "") -> list[Made]:
        """The finished runs that made a link, the earliest first: the later ones found it made.

        weights_sha256: of a network, if its digest is not known.
        """
        tags = {f"vgg.result.{OUTPUT[kind]}": digest} if digest else {"vgg.weights_sha256": weights_sha256}
        found = self._runs(STAGE[kind], tags)
        return [_made(run, OUTPUT[kind]) for run in sorted(found, key=lambda run: int(run.info.start_time))]

    def users(self, kind: str, digest: str) -> list[Run]:
        """The finished runs that read a link."""
        later = {
            "evaluation": ("register",), "training": ("evaluate", "localise", "register"), "localiser": ("register",),
            "data": ("train", "evaluate", "localise"),
        }  # fmt: skip
        return [
            run for stage in later.get(kind, ()) for run in self._runs(stage, {f"vgg.input.{OUTPUT[kind]}": digest})
        ]

    def _runs(self, stage: str, tags: dict[str, str]) -> list[Run]:
        wanted = {"vgg.stage": stage, **tags}
        query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in wanted.items())
        with translated():
            return list(self.client.search_runs(self.experiments, f"attributes.status = 'FINISHED' and {query}"))


def reach() -> tuple[Server | None, Problem | None]:
    """The server, or why it cannot be asked."""
    try:
        return Server(), None
    except Problem as reason:
        return None, reason


def _made(run: Run, output: str) -> Made:
    return Made(str(run.info.run_id), record_of(run), run.data.tags.get(f"vgg.address.{output}", ""), run.data.tags)


def record_of(run: Run) -> dict[str, Any]:
    """The provenance record in a run's tags; what is left of it if somebody has changed or cut the tag."""
    tags = run.data.tags
    try:
        return dict(json.loads(tags["vgg.provenance"]))
    except (KeyError, ValueError, TypeError):
        inputs = {name.removeprefix("vgg.input."): v for name, v in tags.items() if name.startswith("vgg.input.")}
        git = {"commit": tags.get("mlflow.source.git.commit"), "dirty": tags.get("vgg.git.dirty") == "true"}
        return {"stage": tags.get("vgg.stage"), "inputs": inputs, "code": {"git": git}}
