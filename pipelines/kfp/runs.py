"""Experiments, versions and runs of Kubeflow Pipelines.  An existing one is used again, so there are no duplicates."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.definition.package import NAME, Package
from pipelines.kfp.server import Server
from runtime.errors import Refused

log = logging.getLogger("vgg.submit")

ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")


@dataclass(frozen=True)
class Order:
    """A run to start.  version: ids of pipeline and version.  account: service account of the pods."""

    name: str
    experiment: str
    version: tuple[str, str]
    arguments: dict[str, Any]
    account: str | None

    def fields(self) -> dict[str, Any]:
        """Fields of the API's objects."""
        import kfp_server_api as api

        pipeline, version = self.version
        return {
            "experiment_id": self.experiment,
            "display_name": self.name,
            "pipeline_version_reference": api.V2beta1PipelineVersionReference(pipeline, version),
            "runtime_config": api.V2beta1RuntimeConfig(parameters=self.arguments),
            "service_account": self.account,
        }


class Pipelines:
    """Our objects on a server.  namespace: with profiles only, else None."""

    def __init__(self, server: Server, namespace: str | None) -> None:
        self.server, self.namespace = server, namespace if server.multi_user else None
        self._scope: dict[str, Any] = {"namespace": self.namespace} if self.namespace else {}

    def experiment(self, name: str) -> str:
        """Its id; created if it does not exist."""
        import kfp_server_api as api

        def create() -> str:
            body = api.V2beta1Experiment(display_name=name, **self._scope)
            service = self.server.experiments
            return str(self.server.send(service.experiment_service_create_experiment, body).experiment_id)

        return self.server.made_once(lambda: self.known_experiment(name), create)

    def known_experiment(self, name: str) -> str | None:
        """Its id; None if it does not exist."""
        listing = self.server.experiments.experiment_service_list_experiments
        found = self.server.ask(listing, filter=named(name), **self._scope).experiments
        return str(found[0].experiment_id) if found else None

    def version(self, package: Package, name: str) -> tuple[str, str]:
        """Ids of the pipeline and of the version with this name; uploaded if it does not exist.

        Raises Refused if the existing version is another package.
        """
        pipeline = self._pipeline()

        def find() -> tuple[str, str] | None:
            listing = self.server.pipelines.pipeline_service_list_pipeline_versions
            found = self.server.ask(listing, pipeline, filter=named(name), page_size=1).pipeline_versions
            if not found:
                return None
            if not package.is_spec(found[0].pipeline_spec):
                raise Refused(
                    f"{self.server.host}: version {name} of pipeline {NAME} exists and is another package: it was "
                    "compiled elsewhere (VGG_REGISTRY, version of kfp). Commit, or choose a name: --version NAME."
                )
            log.info("version %s exists", name)
            return pipeline, str(found[0].pipeline_version_id)

        def create() -> tuple[str, str]:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / f"{NAME}.yaml"
                path.write_text(package.text, encoding="utf-8")
                upload = self.server.uploads.upload_pipeline_version
                uploaded = self.server.send(upload, str(path), name=name, pipelineid=pipeline)
            log.info("uploaded as version %s", name)
            return pipeline, str(uploaded.pipeline_version_id)

        return self.server.made_once(find, create)

    def _pipeline(self) -> str:
        import kfp_server_api as api

        def create() -> str:
            body = api.V2beta1Pipeline(name=NAME, display_name=NAME, **self._scope)
            service = self.server.pipelines
            return str(self.server.send(service.pipeline_service_create_pipeline, body).pipeline_id)

        return self.server.made_once(self.known_pipeline, create)

    def known_pipeline(self) -> str | None:
        """Its id; None if it was never uploaded."""
        by_name = self.server.pipelines.pipeline_service_get_pipeline_by_name
        found = self.server.find(by_name, NAME, **self._scope)
        return str(found.pipeline_id) if found else None

    def run(self, order: Order, again: bool) -> Any:
        """An active run with this name; started if there is none.  again: start another one in any case."""
        import kfp_server_api as api

        name, experiment = order.name, order.experiment
        ignored = {run.run_id for run in self._active(name, experiment)} if again else set()
        started: list[str] = []

        def find() -> Any:
            found = [run for run in self._active(name, experiment) if run.run_id not in ignored]
            if found and not started:
                log.info("the same run is already active; --again starts another one")
            return found[0] if found else None

        def create() -> Any:
            started.append(name)
            body = api.V2beta1Run(**order.fields())
            return self.server.send(self.server.runs.run_service_create_run, body)

        return self.server.made_once(find, create)

    def _active(self, name: str, experiment: str) -> list[Any]:
        listing = self.server.runs.run_service_list_runs
        newest: dict[str, Any] = {"filter": named(name), "sort_by": "created_at desc", "page_size": 100}
        found = self.server.ask(listing, experiment_id=experiment, **newest).runs or []
        return [run for run in found if run.state not in ENDED and run.storage_state != "ARCHIVED"]

    def recurring(self, order: Order, cron: str) -> str:
        """Id of the recurring run with this name; created if there is none.  One run at a time, no catching up."""
        import kfp_server_api as api

        service = self.server.recurring

        def enabled() -> list[Any]:
            listing = service.recurring_run_service_list_recurring_runs
            found = self.server.ask(listing, experiment_id=order.experiment, page_size=100).recurring_runs or []
            return [one for one in found if one.status == "ENABLED"]

        def find() -> str | None:
            same = [str(one.recurring_run_id) for one in enabled() if one.display_name == order.name]
            return same[0] if same else None

        def create() -> str:
            for other in enabled():
                log.warning("recurring run %s stays enabled until you disable it", other.display_name)
            body = api.V2beta1RecurringRun(
                **order.fields(),
                trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=cron)),
                mode="ENABLE",
                max_concurrency=1,
                no_catchup=True,
            )
            return str(self.server.send(service.recurring_run_service_create_recurring_run, body).recurring_run_id)

        return self.server.made_once(find, create)

    def resume(self, run_id: str) -> Any:
        """Run the failed tasks of a run again; tasks that succeeded are kept.  Raises Refused if nothing failed."""
        run = self.get(run_id)
        if run.state in ("SUCCEEDED", "SKIPPED"):
            raise Refused(f"run {run_id}: {run.state}; there is nothing to resume")

        def find() -> Any:
            found = self.get(run_id)
            return found if found.state not in ENDED else None

        def create() -> Any:
            self.server.send(self.server.runs.run_service_retry_run, run_id)
            return self.get(run_id)

        if run.state not in ENDED:
            log.info("run %s is already %s", run_id, run.state)
        return self.server.made_once(find, create)

    def cancel(self, run_id: str) -> Any:
        """Stop a run; it may go on for a while.  A run that has ended is left as it is."""

        def find() -> Any:
            found = self.get(run_id)
            return found if found.state in (*ENDED, "CANCELING") else None

        def create() -> Any:
            try:
                self.server.send(self.server.runs.run_service_terminate_run, run_id)
            except Refused:  # the server's answer if it has just ended, or another user has canceled it
                if found := find():
                    return found
                raise
            return self.get(run_id)

        return self.server.made_once(find, create)

    def get(self, run_id: str) -> Any:
        """Raises Refused if the run does not exist."""
        run = self.server.ask(self.server.runs.run_service_get_run, run_id)
        if not run.run_id:  # the client parses a login page as an empty run
            raise Refused(f"{self.server.host}: the answer is not from Kubeflow Pipelines; has the session expired?")
        return run


def named(name: str) -> str:
    """The filter of a list for one name."""
    return filtered("EQUALS", "display_name", name)


def filtered(operation: str, key: str, value: str) -> str:
    """A filter of a list.  Encoded once more, because the server decodes it twice."""
    predicate = {"operation": operation, "key": key, "string_value": value}
    return json.dumps({"predicates": [predicate]}).replace("%", "%25").replace("+", "%2B")
