"""What the checks work with: runs of their own, the pods of those, and pods that look around inside."""

from __future__ import annotations

import argparse
import logging
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipelines import submit
from pipelines.arguments import IMAGES_VERSION, gather
from pipelines.definition.package import STEPS as ALL_STEPS
from pipelines.definition.package import Package
from pipelines.kfp import failure
from pipelines.kfp.pending import Pending
from pipelines.kfp.runs import ENDED, Order, Pipelines
from pipelines.prove.objects import LABEL, Object, Objects
from runtime.errors import Problem
from vgg.params import OPTIONAL

log = logging.getLogger("vgg.prove")
T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
STEPS = tuple(step for step in ALL_STEPS if step not in OPTIONAL)  # of the digits
SMALL = (  # run arguments for small nodes without GPUs (docs/cluster.md, 6); -C changes them
    "gpus=0", "shard_cpu=1", "shard_memory=2Gi", "train_cpu=1", "train_memory=4Gi", "evaluate_cpu=1",
    "evaluate_memory=4Gi",
)  # fmt: skip
# every model may be registered
LOOSE = ("register.gate.max_top1_error=1.0", "register.gate.max_top5_error=1.0", "register.gate.max_regression=1.0")
# a training that is long enough to be disturbed and short enough to wait for
SHORT = (
    "train.epochs=3", "train.checkpoint_steps=10", "evaluate.methods=[centre_crop]", "evaluate.test_scales=[32]",
    *LOOSE,
)  # fmt: skip
LOG_LINES = 5000  # of a step: all of it


class NotTried(Exception):
    """Why something cannot be tried on this installation."""


class Different(Exception):
    """What was seen instead of what is expected."""


class Bench:
    """name: prove-<stamp>, of everything that the checks make.  deadline: of the check that runs, monotonic seconds.

    facts: what a check found out that later ones go on with.
    """

    def __init__(
        self, args: argparse.Namespace, pipelines: Pipelines, cluster: Objects, package: Package, name: str
    ) -> None:
        """args: of pipelines.prove, with namespace and host filled in."""
        self.args, self.pipelines, self.cluster, self.package, self.name = args, pipelines, cluster, package, name
        self.deadline = float("inf")
        self.facts: dict[str, Any] = {}
        self._number = 0
        self._started: list[str] = []
        self._images: dict[str, str] = {}
        self._has_addresses = False

    @property
    def models(self) -> list[str]:
        """Registered models: of the digits, and of the short trainings."""
        return [self.name, f"{self.name}-short"]

    # -- time

    def until(self, look: Callable[[], T | None], what: str, run_id: str = "") -> T:
        """What look() returns, as soon as it returns something.

        run_id: of a run whose waiting pods are logged.  Raises Different when the time of the check is over.
        """
        pending = Pending(lambda: self.cluster, run_id) if run_id else None
        waits = ""
        while (found := look()) is None:
            for line in pending.news() if pending else ():
                waits = line
                log.info("%s", line)
            if time.monotonic() > self.deadline:
                raise Different(f"not in time: {what}" + (f"; {waits}" if waits else ""))
            time.sleep(self.args.poll)
        return found

    # -- runs

    def submission(self, *flags: str) -> argparse.Namespace:
        """The arguments of pipelines.submit for a run of the digits on this cluster."""
        args, given = self.args, ["--params", self.params, "--experiment", self.name, "--host", self.args.host]
        for flag in ("token_file", "namespace", "service_account", "kube_context"):
            if value := getattr(args, flag):
                given += [f"--{flag.replace('_', '-')}", value]
        given += ["--no-image-check"] * args.no_image_check + [f"--patience={args.patience}", f"--poll={args.poll}"]
        for setting in (*SMALL, *args.settings):
            given += ["-C", setting]
        return submit.parser().parse_args([*given, *flags])

    def arguments(self, overrides: tuple[str, ...] = (), settings: tuple[str, ...] = ()) -> dict[str, Any]:
        """The run arguments of a run of its own: no cache and no store has seen them, and its model has its own name.

        Kubeflow's cache does not know the store: without a memory of its own, the evaluation of other runs would be
        found, which is not in the store of this proof.
        """
        from kubernetes.utils.quantity import parse_quantity

        short = set(LOOSE) <= set(overrides)  # not the model of the digits, which a real gate guards
        model = f"register.model_name={self.models[short]}"
        own = (f"addresses={self.name}", f"{IMAGES_VERSION}={self.name}")
        found = (
            gather(self.package, self.params, [model, *overrides], [*SMALL, *self.args.settings, *own, *settings])
            | self._images
        )
        own_bytes = int(re.sub(r"\D", "", self.name) or 0) % 999_983
        return {**found, "evaluate_memory": str(int(parse_quantity(found["evaluate_memory"])) + own_bytes)}

    def start(self, title: str, overrides: tuple[str, ...] = (), settings: tuple[str, ...] = ()) -> str:
        """Start a run; returns its id."""
        self.make_addresses()
        order = Order(
            name=f"{self.name} {title}",
            experiment=self.pipelines.experiment(self.name),
            version=self.pipelines.version(self.package, self.name),
            arguments=self.arguments(overrides, settings),
            account=self.args.service_account,
        )
        run_id = str(self.pipelines.run(order, again=False).run_id)
        self._started.append(run_id)
        log.info("%s: run %s", title, run_id)
        return run_id

    def stop_runs(self) -> None:
        """Stop the runs that a check has left active."""
        for run_id in self._started:
            try:
                self.pipelines.cancel(run_id)
            except Problem as problem:
                log.warning("run %s: %s", run_id, problem)

    def use_images(self, pinned: dict[str, str]) -> None:
        """Images by digest, from the preflight."""
        self._images = pinned

    def make_addresses(self) -> None:
        """The ConfigMap of the steps of this proof: that of the site, with a store below its store."""
        if self._has_addresses:
            return
        site = str({**self.package.defaults, **self._site()}["addresses"])
        if self.cluster.config_map(self.name) is not None:  # this proof is cleaned up by another process
            self._has_addresses = True
            return
        data = self.cluster.config_map(site)
        if data is None:
            raise NotTried(f"no ConfigMap {site} in namespace {self.cluster.namespace}")
        store = data.get("VGG_STORE") or "/store"
        metadata = {"name": self.name, "labels": {LABEL: self.name}}
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
        self.cluster.create("configmaps", {**body, "data": {**data, "VGG_STORE": f"{store.rstrip('/')}/{self.name}"}})
        self._has_addresses = True

    def _site(self) -> dict[str, str]:
        return dict(setting.split("=", 1) for setting in self.args.settings if "=" in setting)

    def ended(self, run_id: str) -> Any:
        """The run after its end.  Raises Different with the reason if it did not succeed."""

        def look() -> Any:
            run = self.pipelines.get(run_id)
            return run if run.state in ENDED else None

        run = self.until(look, f"the end of run {run_id}", run_id)
        if run.state != "SUCCEEDED":
            workflow = failure.workflow_of(self.pipelines.server, run_id)
            raise Different(str(failure.explain(self.pipelines.server, run, workflow, lambda: self.cluster)))
        return run

    def expect_active(self, run_id: str) -> None:
        """Raises Different if a run has ended already."""
        if (run := self.pipelines.get(run_id)).state in ENDED:
            raise Different(f"run {run_id} has ended too early: {run.state}")

    # -- pods of runs

    def executed(self, run_id: str) -> list[str]:
        """The steps of a run that have had a pod, once for every pod: a step from the cache has none."""
        labels = [pod["metadata"].get("labels", {}) for pod in self.cluster.pods(run_id)]
        return sorted((label["vgg.stage"] for label in labels if label.get("vgg.stage") in STEPS), key=STEPS.index)

    def step_pods(self, run_id: str, step: str) -> list[Object]:
        """The pods of a step, oldest first."""
        found = [p for p in self.cluster.pods(run_id) if p["metadata"].get("labels", {}).get("vgg.stage") == step]
        return sorted(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))

    def log_of(self, pod: Object) -> str:
        """The log of its container main; '' before it has one."""
        try:
            return self.cluster.pod_log(pod["metadata"]["name"], LOG_LINES) or ""
        except Problem:  # 400: it has not started
            return ""

    def training_under_way(self, run_id: str) -> Object:
        """The pod of the training step, once an epoch is done, so that there is a checkpoint."""

        def look() -> Object | None:
            self.expect_active(run_id)
            running = [pod for pod in self.step_pods(run_id, "train") if pod["status"].get("phase") == "Running"]
            return running[-1] if running and "epoch 1, step" in self.log_of(running[-1]) else None

        return self.until(look, f"a first epoch of run {run_id}", run_id)

    def continued_at(self, pod: Object) -> int:
        """The step at which a training went on from a checkpoint.  Raises Different if it began anew."""
        found = re.findall(r"continuing \S+ at step (\d+)", self.log_of(pod))
        if not found or not int(found[-1]):
            raise Different(f"the log of {pod['metadata']['name']} does not say that it continued from a checkpoint")
        return int(found[-1])

    # -- pods of its own: pipelines.prove.pods

    def next_number(self) -> int:
        """For names."""
        self._number += 1
        return self._number

    def expect_allowed(self, *what: tuple[str, str]) -> None:
        """what: verb and resource.  Raises NotTried if one is not allowed."""
        for verb, resource in what:
            if not self.cluster.may(verb, resource):
                raise NotTried(f"no permission to {verb} {resource} in namespace {self.cluster.namespace}")

    # -- committed files

    @property
    def params(self) -> str:
        """The committed params.yaml, as a file: the committed metrics are of no other."""
        if "params" not in self.facts:
            path = Path(self.args.output) / "params.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(committed("params.yaml"))
            self.facts["params"] = str(path)
        return str(self.facts["params"])


def committed(name: str) -> bytes:
    """A file as in the last commit; from the work tree if there is no repository."""
    try:
        done = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return (ROOT / name).read_bytes()
    return done.stdout if done.returncode == 0 else (ROOT / name).read_bytes()
