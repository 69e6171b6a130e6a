"""State and answers of a fake API server of Kubeflow Pipelines: pipelines, runs, tasks and logs as in 2.17.0."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kfprules import Wrong, arguments, known_fields, listed, package

WHEN = "2026-11-25T10:00:{:02d}Z"
LATER, NEVER = "2026-11-25T12:05:00Z", "1970-01-01T00:00:00Z"  # finished_at
ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
WORKFLOW = "vgg-imagenet-x7k2p"
Item = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """A request: the variable parts of its path, its query, and its body (JSON, or the uploaded file)."""

    path: tuple[str, ...]
    query: dict[str, str]
    body: Any = None


@dataclass(frozen=True)
class Frame:
    """Answer to one query of a run: its state, and those of its steps.

    messages: termination message of the container, by step.  lost: steps whose first pod was deleted.  cached: steps
    without a pod.
    """

    state: str
    steps: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()


@dataclass
class KfpState:
    """frames: states of every run, one per query; retried, stopping: the same after a retry, and after a termination.

    logs: by pod.  workflows: whether the older API returns the Argo workflow.  terminated: whether the workflow was
    stopped.  task_errors: whether tasks have pod and error, which no server returns yet.  mlflow_url: of the run, from
    the server's plugin.  play: what a cluster does with a run: its states, one per query.  stopped: told of
    a run that is terminated or deleted.
    """

    version: str = "2.17.0"
    multi_user: bool = False
    frames: list[Frame] = field(default_factory=lambda: [Frame("PENDING"), Frame("RUNNING"), Frame("SUCCEEDED")])
    retried: list[Frame] = field(default_factory=list)
    stopping: list[Frame] = field(default_factory=lambda: [Frame("CANCELING"), Frame("CANCELING"), Frame("FAILED")])
    logs: dict[str, str] = field(default_factory=dict)
    workflows: bool = True
    terminated: bool = False
    task_errors: bool = False
    mlflow_url: str = ""
    experiments: list[Item] = field(default_factory=list)
    pipelines: list[Item] = field(default_factory=list)
    versions: list[Item] = field(default_factory=list)
    runs: list[Item] = field(default_factory=list)
    recurring: list[Item] = field(default_factory=list)
    upcoming: dict[str, list[Frame]] = field(default_factory=dict)  # frames left, by run
    play: Callable[[Item], list[Frame]] | None = None
    stopped: Callable[[Item], None] = lambda run: None

    def healthz(self, ask: Ask) -> Item:
        health = {"commit_sha": "020857a", "tag_name": self.version, "multi_user": self.multi_user}
        return {**health, "pipeline_store": "database"}

    def list_experiments(self, ask: Ask) -> Item:
        self._needs_namespace(ask.query)
        found = [one for one in self.experiments if one.get("namespace", "") == ask.query.get("namespace", "")]
        return listed("experiments", "experiments", ask.query, found)

    def create_experiment(self, ask: Ask) -> Item:
        known_fields("V2beta1Experiment", ask.body)
        self._needs_namespace(ask.body)
        if any(one["display_name"] == ask.body["display_name"] for one in self.experiments):
            raise Wrong(6, f"experiment with the name {ask.body['display_name']} already exists")
        return _new("experiment", self.experiments, **ask.body, storage_state="AVAILABLE")

    def pipeline_by_name(self, ask: Ask) -> Item:
        self._needs_namespace(ask.query)
        for one in self.pipelines:
            if one["name"] == ask.path[0] and one.get("namespace", "") == ask.query.get("namespace", ""):
                return one
        raise Wrong(5, f"Namespace/Pipeline /{ask.path[0]} not found.")

    def create_pipeline(self, ask: Ask) -> Item:
        known_fields("V2beta1Pipeline", ask.body)
        if any(one["name"] == ask.body["name"] for one in self.pipelines):
            raise Wrong(6, f"the name {ask.body['name']} already exists")
        return _new("pipeline", self.pipelines, **ask.body)

    def list_pipelines(self, ask: Ask) -> Item:
        return {"pipelines": self.pipelines, "total_size": len(self.pipelines)}

    def list_versions(self, ask: Ask) -> Item:
        found = [one for one in self.versions if one["pipeline_id"] == ask.path[0]]
        return listed("versions", "pipeline_versions", ask.query, found)

    def upload_version(self, ask: Ask) -> Item:
        name, pipeline = ask.query["name"], ask.query.get("pipelineid")
        if not any(one["pipeline_id"] == pipeline for one in self.pipelines):
            raise Wrong(3, "Failed to create a pipeline version")
        if any(one["name"] == name and one["pipeline_id"] == pipeline for one in self.versions):
            raise Wrong(6, "Failed to create a pipeline version")
        names = {"name": name, "display_name": name, "pipeline_id": pipeline}
        return _new("pipeline_version", self.versions, **names, pipeline_spec=package(ask.body))

    def upload_pipeline(self, ask: Ask) -> Item:
        name = ask.query["name"]
        pipeline = self.create_pipeline(Ask((), {}, {"name": name, "display_name": name}))
        self.upload_version(Ask((), {"name": name, "pipelineid": pipeline["pipeline_id"]}, ask.body))
        return pipeline

    def create_run(self, ask: Ask) -> Item:
        known_fields("V2beta1Run", ask.body)
        self._check(ask.body)
        run = _new("run", self.runs, **ask.body, storage_state="AVAILABLE", state="PENDING", state_history=[])
        run["finished_at"] = NEVER
        self.upcoming[run["run_id"]] = self.play(run) if self.play else list(self.frames)
        if self.mlflow_url:
            run["plugins_output"] = {
                "mlflow": {"entries": {"run_url": {"value": self.mlflow_url, "render_type": "URL"}}}
            }
        return run

    def list_runs(self, ask: Ask) -> Item:
        """Of an experiment, or else of a namespace."""
        experiment = ask.query.get("experiment_id")
        if not experiment:
            self._needs_namespace(ask.query)
        found = [one for one in self.runs if experiment in (None, one["experiment_id"])]
        return listed("runs", "runs", ask.query, found)

    def get_run(self, ask: Ask) -> Item:
        run, upcoming = self._run(ask), self.upcoming[ask.path[0]]
        frame = upcoming.pop(0) if len(upcoming) > 1 else upcoming[0]
        run["state"], run["finished_at"] = frame.state, LATER if frame.state in ENDED else NEVER
        if run["state_history"][-1:] != [{"state": frame.state}]:
            run["state_history"].append({"state": frame.state})
        run["run_details"] = {"task_details": list(self._tasks(run, frame))}
        return run

    def retry_run(self, ask: Ask) -> Item:
        if self._run(ask)["state"] not in ("FAILED", "CANCELED"):
            raise Wrong(3, "Workflow must be Failed/Error to retry")
        run = self._run(ask)
        self.upcoming[ask.path[0]] = self.play(run) if self.play else list(self.retried)
        run["state"] = "PENDING"
        return {}

    def terminate_run(self, ask: Ask) -> Item:
        """The state is CANCELING at once, in the history only when the workflow is reported (run_store.go)."""
        run = self._run(ask)
        if run["state"] not in ("PENDING", "RUNNING", "PAUSED"):
            raise Wrong(3, f"Failed to terminate a run {run['run_id']}. Row not found")
        run["state"], self.terminated = "CANCELING", True
        self.upcoming[run["run_id"]] = list(self.stopping)
        self.stopped(run)
        return {}

    def delete_run(self, ask: Ask) -> Item:
        """With its workflow, also of an active run."""
        run = self._run(ask)
        self.runs.remove(run)
        self.stopped(run)
        return {}

    def delete_experiment(self, ask: Ask) -> Item:
        return self._delete(self.experiments, "experiment_id", ask.path[0])

    def delete_version(self, ask: Ask) -> Item:
        return self._delete(self.versions, "pipeline_version_id", ask.path[1])

    def delete_pipeline(self, ask: Ask) -> Item:
        """Not of one that has versions."""
        if any(one["pipeline_id"] == ask.path[0] for one in self.versions):
            raise Wrong(3, f"Failed to delete pipeline {ask.path[0]}: it has pipeline versions")
        return self._delete(self.pipelines, "pipeline_id", ask.path[0])

    @staticmethod
    def _delete(items: list[Item], key: str, value: str) -> Item:
        for item in items:
            if item[key] == value:
                items.remove(item)
                return {}
        raise Wrong(5, f"{key} {value} not found.")

    def create_recurring(self, ask: Ask) -> Item:
        known_fields("V2beta1RecurringRun", ask.body)
        self._check(ask.body)
        if not 1 <= int(ask.body.get("max_concurrency", 0)) <= 10:
            raise Wrong(3, "Max concurrency of a recurring run must be at least 1 and at most 10")
        if len(ask.body["trigger"]["cron_schedule"]["cron"].split()) != 6:
            raise Wrong(3, "Schedule cron is not a supported format(https://godoc.org/github.com/robfig/cron)")
        return _new("recurring_run", self.recurring, **ask.body, status="ENABLED")

    def list_recurring(self, ask: Ask) -> Item:
        return listed("recurringruns", "recurringRuns", ask.query, self.recurring)

    def read_log(self, ask: Ask) -> str:
        """The status is sent before the pod is looked up, so a missing log is answered with 200 (run_log_server.go)."""
        self._run(ask)
        missing = {"error_message": f"Failed to read logs for run {ask.path[0]}", "error_details": "pod not found"}
        return self.logs.get(ask.path[1], json.dumps(missing))

    def run_v1(self, ask: Ask) -> Item:
        run = self._run(ask)
        if not self.workflows:
            raise Wrong(5, "not found")
        nodes = {node["id"]: node for node in _nodes(self.upcoming[run["run_id"]][0])}
        spec = {"activeDeadlineSeconds": 0} if self.terminated else {}
        workflow = {"metadata": {"name": WORKFLOW}, "spec": spec, "status": {"nodes": nodes}}
        return {"run": {"id": run["run_id"]}, "pipeline_runtime": {"workflow_manifest": json.dumps(workflow)}}

    def _check(self, body: Item) -> None:
        """Checks for runs and recurring runs."""
        if not body.get("display_name"):
            raise Wrong(3, "The run name is empty. Please specify a valid name")
        if not any(one["experiment_id"] == body.get("experiment_id") for one in self.experiments):
            raise Wrong(5, "Experiment not found")
        reference = body["pipeline_version_reference"]
        found = [one for one in self.versions if one["pipeline_version_id"] == reference["pipeline_version_id"]]
        if not found or found[0]["pipeline_id"] != reference["pipeline_id"]:
            raise Wrong(5, "PipelineVersion not found")
        arguments(found[0]["pipeline_spec"], body.get("runtime_config", {}).get("parameters", {}))

    def _needs_namespace(self, fields: Item) -> None:
        if self.multi_user and not fields.get("namespace"):
            raise Wrong(3, "In multi-user mode, a namespace is required")

    def _run(self, ask: Ask) -> Item:
        for run in self.runs:
            if run["run_id"] == ask.path[0]:
                return run
        raise Wrong(5, f"Run {ask.path[0]} not found.")

    def _tasks(self, run: Item, frame: Frame) -> Iterator[Item]:
        """One for every node of the workflow; 2.17 sets neither pod nor error."""
        for node in _nodes(frame):
            more: Item = {}
            if self.task_errors and node["phase"] == "Failed" and "boundaryID" in node:
                more = {"pod_name": f"pod-of-{node['displayName']}", "error": {"code": 2, "message": "out of memory"}}
            state = "FAILED" if node["phase"] == "Error" else node["phase"].upper()
            yield {"run_id": run["run_id"], "display_name": node["displayName"], "state": state, **more}


def _new(kind: str, items: list[Item], **fields: Any) -> Item:
    new = {f"{kind}_id": str(uuid.uuid4()), "created_at": WHEN.format(len(items) % 60), **fields}
    items.append(new)
    return new


def _nodes(frame: Frame) -> Iterator[Item]:
    """The graph around every step, its driver, and the pod that runs the program, each in a Retry node, because
    Kubeflow's manifests set a retry strategy for all templates."""
    for number, name in enumerate((WORKFLOW, "root", "exit-handler-1")):
        yield {"id": f"{WORKFLOW}-{number}", "displayName": name, "type": "DAG", "phase": frame.state.title()}
    for number, (step, state) in enumerate(frame.steps.items(), 10):
        prefix, phase = f"{WORKFLOW}-{number}", state.title()
        pod = {"type": "Pod", "templateName": "system-container-impl", "startedAt": WHEN.format(number)}
        outside, inside = {"boundaryID": f"{WORKFLOW}-2"}, {"boundaryID": f"{prefix}3"}
        yield from _attempts(f"{prefix}0", f"{step}-driver", [{"phase": "Succeeded", **pod, **outside}])
        yield from _attempts(f"{prefix}2", step, [{"phase": phase, "type": "DAG", **outside}])
        if step in frame.cached:
            why = "when 'true != true' evaluated false"
            yield {"id": f"{prefix}4", "displayName": "executor", "type": "Skipped", "phase": "Skipped", **inside,
                   "message": why}  # fmt: skip
            continue
        ended = {"phase": phase, **pod, **inside}
        if state == "FAILED":  # inferFailedReason of Argo: the container, how it ended, and its termination message
            message = frame.messages.get(step)
            ended["message"] = "main: Error (exit code 1)" + (f": {message}" if message else "")
        deleted = {**ended, "phase": "Error", "startedAt": WHEN.format(number - 10), "message": "pod deleted"}
        yield from _attempts(f"{prefix}4", "executor", [*([deleted] if step in frame.lost else []), ended])


def _attempts(node_id: str, name: str, attempts: list[Item]) -> Iterator[Item]:
    """A Retry node in the state of its last attempt, and the attempts, whose ids are the next numbers."""
    ids = [f"{node_id[:-1]}{int(node_id[-1]) + number}" for number in range(1, len(attempts) + 1)]
    boundary = attempts[-1]["boundaryID"]
    yield {
        "id": node_id, "displayName": name, "type": "Retry", "phase": attempts[-1]["phase"], "boundaryID": boundary,
        "children": ids, "startedAt": attempts[0].get("startedAt", ""),
    }  # fmt: skip
    for number, (own, attempt) in enumerate(zip(ids, attempts, strict=True)):
        yield {"id": own, "displayName": f"{name}({number})", **attempt}
