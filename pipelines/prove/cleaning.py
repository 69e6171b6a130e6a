"""Removal of everything that a proof has made, found by its name; also of one that was killed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

from pipelines.kfp import links
from pipelines.kfp.runs import ENDED
from pipelines.preflight.cluster import NotAllowed
from pipelines.prove import kubeflow, pods
from pipelines.prove.bench import Bench, Different, NotTried
from runtime.errors import Problem
from runtime.wording import some

log = logging.getLogger("vgg.prove")

LIMIT_SECONDS = 240.0  # for every part that waits
KNOWN_TO_STAY = (
    "in Kubeflow's own store the small artifacts of its runs (metrics, reports), and its record of their tasks, which "
    "no later run finds; in MLflow deleted runs, until `mlflow gc`"
)


class Cleaning:
    """left: what could not be removed, with the reason."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.left = bench, list[str]()
        self._stopped = False

    def run(self) -> list[str]:
        """Remove everything.  A second interrupt ends it: what was not reached is left."""
        name, bench = self.bench.name, self.bench
        log.info("removing what %s has made", name)
        runs: list[Any] = []

        def find() -> None:
            if experiment := bench.pipelines.known_experiment(name):
                runs.extend(kubeflow.runs_of(bench.pipelines, experiment))

        self._attempt(f"the runs of experiment {name}, which could not be listed", find)
        for run in runs:
            self._attempt(f"run {run.run_id}, which may go on", lambda run=run: self._stop(run))
        self._attempt("pods of its runs", lambda: self._wait_for_pods([run.run_id for run in runs]))
        what = f"in the store {name}, in MLflow the models {' and '.join(bench.models)} and the runs"
        if runs or self._has_addresses():
            self._attempt(what, lambda: self._inside([run.run_id for run in runs]))
        for run in runs:
            self._attempt(f"run {run.run_id}", lambda run=run: kubeflow.delete_run(bench.pipelines, run.run_id))
        self._attempt(f"experiment {name}", self._experiment)
        self._attempt(f"version {name} of the pipeline", lambda: kubeflow.delete_version(bench.pipelines, name))
        self._attempt("pods with the label vgg.prove", self._pods)
        self._attempt(f"ConfigMap {name}", lambda: bench.cluster.delete("configmaps", name))
        return self.left

    def _attempt(self, what: str, removal: Callable[[], object]) -> None:
        if self._stopped:
            self.left.append(f"{what}: interrupted")
            return
        self.bench.deadline = time.monotonic() + LIMIT_SECONDS * self.bench.args.time_factor
        try:
            removal()
        except KeyboardInterrupt:
            self._stopped = True
            self.left.append(f"{what}: interrupted")
        except (Problem, NotAllowed, NotTried, Different) as reason:
            self.left.append(f"{what}: {reason}")
        except Exception as error:  # the rest is to be removed, whatever it is
            log.exception("%s", what)
            self.left.append(f"{what}: {error!r}")

    def _stop(self, run: Any) -> None:
        pipelines = self.bench.pipelines
        pipelines.cancel(run.run_id)

        def look() -> bool | None:
            return True if pipelines.get(run.run_id).state in ENDED else None

        self.bench.until(look, "its end")

    def _wait_for_pods(self, run_ids: list[str]) -> None:
        """Until no pod can write any more.  Pending ones of a terminated run may stay (docs/cluster.md, 7)."""
        cluster = self.bench.cluster

        def look() -> bool | None:
            running = [
                pod["metadata"]["name"]
                for run_id in run_ids
                for pod in [*cluster.pods(run_id), *cluster.training_pods(run_id)]
                if pod["status"].get("phase") == "Running"
            ]
            return None if running else True

        self.bench.until(look, "their end")

    def _has_addresses(self) -> bool:
        try:
            return self.bench.cluster.config_map(self.bench.name) is not None
        except (Problem, NotAllowed):
            return False

    def _inside(self, run_ids: list[str]) -> None:
        """The store and MLflow, from a pod: only there are their addresses and secrets."""
        given = {
            "name": self.bench.name, "models": self.bench.models, "lineages": [links.lineage(one) for one in run_ids]
        }  # fmt: skip
        found = pods.inside(self.bench, "remove", json.dumps(given))
        log.info("removed: %s", some(found["removed"]) or "nothing")
        self.left += found["left"]

    def _experiment(self) -> None:
        if found := self.bench.pipelines.known_experiment(self.bench.name):
            kubeflow.delete_experiment(self.bench.pipelines, found)

    def _pods(self) -> None:
        for pod in self.bench.cluster.made_by(self.bench.name):
            self.bench.cluster.delete("pods", pod["metadata"]["name"])
