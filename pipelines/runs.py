"""Experiments, versions and runs of Kubeflow Pipelines: each is looked for first, so that nothing is made twice."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.package import NAME, Package
from pipelines.server import Server
from vgg.errors import Refused

log = logging.getLogger("vgg.submit")

ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")


@dataclass(frozen=True)
class Order:
    """What is asked for.  version: ids of pipeline and version.  account: service account of the pods."""

    name: str
    experiment: str
    version: tuple[str, str]
    arguments: dict[str, Any]
    account: str | None

    def fields(self) -> dict[str, Any]:
        """As the API has them."""
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
    """What a server keeps for us.  namespace: of a Kubeflow with profiles, None elsewhere."""

    def __init__(self, server: Server, namespace: str | None) -> None:
        self.server, self.namespace = server, namespace if server.multi_user else None

    def experiment(self, name: str) -> str:
        """Its id; made if there is none."""
        import kfp_server_api as api

        service = self.server.experiments
        scope: dict[str, Any] = {"namespace": self.namespace} if self.namespace else {}

        def look() -> str | None:
            found = self.server.ask(service.experiment_service_list_experiments, filter=_named(name), **scope)
            return found.experiments[0].experiment_id if found.experiments else None

        def make() -> str:
            body = api.V2beta1Experiment(display_name=name, **scope)
            return str(self.server.send(service.experiment_service_create_experiment, body).experiment_id)

        return self.server.made_once(look, make)

    def version(self, package: Package, name: str) -> tuple[str, str]:
        """Ids of the pipeline and of the version of this name; uploaded if there is none.

        Raises Refused if there is one that is another package.
        """
        pipeline = self._pipeline()

        def look() -> tuple[str, str] | None:
            listing = self.server.pipelines.pipeline_service_list_pipeline_versions
            found = self.server.ask(listing, pipeline, filter=_named(name), page_size=1).pipeline_versions
            if not found:
                return None
            if not package.is_spec(found[0].pipeline_spec):
                raise Refused(
                    f"{self.server.host}: version {name} of pipeline {NAME} is there already and is another package: "
                    "it was compiled elsewhere (VGG_REGISTRY, version of kfp). Commit, or name yours: --version NAME."
                )
            log.info("version %s is there already", name)
            return pipeline, str(found[0].pipeline_version_id)

        def make() -> tuple[str, str]:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / f"{NAME}.yaml"
                path.write_text(package.text)
                upload = self.server.uploads.upload_pipeline_version
                made = self.server.send(upload, str(path), name=name, pipelineid=pipeline)
            log.info("uploaded as version %s", name)
            return pipeline, str(made.pipeline_version_id)

        return self.server.made_once(look, make)

    def _pipeline(self) -> str:
        import kfp_server_api as api

        service = self.server.pipelines
        scope = {"namespace": self.namespace} if self.namespace else {}

        def look() -> str | None:
            found = self.server.find(service.pipeline_service_get_pipeline_by_name, NAME, **scope)
            return str(found.pipeline_id) if found else None

        def make() -> str:
            body = api.V2beta1Pipeline(name=NAME, display_name=NAME, **scope)
            return str(self.server.send(service.pipeline_service_create_pipeline, body).pipeline_id)

        return self.server.made_once(look, make)

    def run(self, order: Order, again: bool) -> Any:
        """A run of this name that has not ended; started if there is none.  again: start another one beside it."""
        import kfp_server_api as api

        name, experiment = order.name, order.experiment
        passed_over = {run.run_id for run in self._active(name, experiment)} if again else set()
        started: list[str] = []

        def look() -> Any:
            found = [run for run in self._active(name, experiment) if run.run_id not in passed_over]
            if found and not started:
                log.info("the same run is under way already; --again would start another")
            return found[0] if found else None

        def make() -> Any:
            started.append(name)
            body = api.V2beta1Run(**order.fields())
            return self.server.send(self.server.runs.run_service_create_run, body)

        return self.server.made_once(look, make)

    def _active(self, name: str, experiment: str) -> list[Any]:
        listing = self.server.runs.run_service_list_runs
        newest: dict[str, Any] = {"filter": _named(name), "sort_by": "created_at desc", "page_size": 100}
        found = self.server.ask(listing, experiment_id=experiment, **newest).runs or []
        return [run for run in found if run.state not in ENDED and run.storage_state != "ARCHIVED"]

    def recurring(self, order: Order, cron: str) -> str:
        """Id of the recurring run of this name; made if there is none.  One at a time, and none made up for later."""
        import kfp_server_api as api

        service = self.server.recurring

        def enabled() -> list[Any]:
            listing = service.recurring_run_service_list_recurring_runs
            found = self.server.ask(listing, experiment_id=order.experiment, page_size=100).recurring_runs or []
            return [one for one in found if one.status == "ENABLED"]

        def look() -> str | None:
            same = [str(one.recurring_run_id) for one in enabled() if one.display_name == order.name]
            return same[0] if same else None

        def make() -> str:
            for other in enabled():
                log.warning("recurring run %s goes on too, until you disable it", other.display_name)
            body = api.V2beta1RecurringRun(
                **order.fields(),
                trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=cron)),
                mode="ENABLE",
                max_concurrency=1,
                no_catchup=True,
            )
            return str(self.server.send(service.recurring_run_service_create_recurring_run, body).recurring_run_id)

        return self.server.made_once(look, make)

    def resume(self, run_id: str) -> Any:
        """Run the failed tasks of a run again; what has succeeded stays.  Raises Refused if nothing failed."""
        run = self.get(run_id)
        if run.state in ("SUCCEEDED", "SKIPPED"):
            raise Refused(f"run {run_id}: has {run.state}; there is nothing to go on with")

        def look() -> Any:
            found = self.get(run_id)
            return found if found.state not in ENDED else None

        def make() -> Any:
            self.server.send(self.server.runs.run_service_retry_run, run_id)
            return self.get(run_id)

        if run.state not in ENDED:
            log.info("run %s is %s already", run_id, run.state)
        return self.server.made_once(look, make)

    def get(self, run_id: str) -> Any:
        """Raises Refused if there is no such run."""
        run = self.server.ask(self.server.runs.run_service_get_run, run_id)
        if not run.run_id:  # a login page makes an empty one
            raise Refused(f"{self.server.host}: does not answer like Kubeflow Pipelines; has the session expired?")
        return run


def _named(name: str) -> str:
    """A filter.  The server decodes it once more than the client encodes it."""
    predicate = {"operation": "EQUALS", "key": "display_name", "string_value": name}
    return json.dumps({"predicates": [predicate]}).replace("%", "%25").replace("+", "%2B")
