"""An installation as pipelines.prove meets it: fakes of Kubeflow and Kubernetes, and what a cluster does with runs.

Not real: that policies are enforced, that pods meet, that a served model answers.  `reaches` and `serves` say what such
pods would have seen; the program `stored` runs as a process.  So a test with it is one of the checks, not of an
installation.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import environment
from kfpserver import Frame, KfpServer
from kubelive import LiveObjects

from runtime import manifest

STEPS = ("shard", "train", "evaluate", "gate", "register", "report")
LISTENER = "10.9.8.7"
ACTIVE = 400  # queries until a short training would end by itself
EPOCH = "epoch 1, step 47: train loss 2.1, top-1 error 70.00 %; val loss 2.0, top-1 70.00 %"
EPOCHS = 3  # of a training that is to be disturbed
Object = dict[str, Any]


class Installation:
    """metrics: of the digits' evaluation.  forgets: what does not work: "cache", "checkpoints", "gate".

    reaches: addresses that answer, by whether the pod has a step's labels.
    """

    def __init__(self, kfp: KfpServer, kube: LiveObjects, store: Path, metrics: dict[str, Any]) -> None:
        self.kfp, self.kube, self.store, self.metrics = kfp, kube, store, metrics
        self.forgets: set[str] = set()
        self.serves = {"asked": 50, "right": 49, "seconds": 21.0}
        kubeflow = ("ml-pipeline.kubeflow:8888", "ml-pipeline.kubeflow:8887", "metadata-grpc-service.kubeflow:8080")
        everybody = {*kubeflow, "kubernetes.default:443"}
        listener, page = f"{LISTENER}:9999", "ml-pipeline-ui.kubeflow:80"
        self.reaches = {True: {*everybody, "mlflow:5000"}, False: {*everybody, listener, page}}
        self.removed: list[Object] = []  # arguments of the program remove
        self._cache: set[str] = set()  # Kubeflow's
        self._trained: set[str] = set()  # finished trainings in the store
        self._unfinished: dict[str, list[str]] = {}  # steps that a run has yet to do
        self._count = 0
        kfp.play, kfp.stopped = self.play, self.stopped
        kube.created, kube.deleted, kube.look = self.kubelet, self.lost, self.proceed

    # -- runs

    def play(self, run: Object) -> list[Frame]:
        """The states of a run that starts, or is retried."""
        with self.kube.lock:
            run_id, given = run["run_id"], run["runtime_config"]["parameters"]
            retried = any(pod["metadata"]["labels"].get("pipeline/runid") == run_id for pod in self.kube.pods.values())
            keys = self._keys(given)
            cached = {step for step in STEPS if keys.get(step) in self._cache}
            if not retried and "shard" not in cached:
                self._pod(run_id, "shard", "Succeeded", "shards: 8 files")
            if "train" not in cached:
                self._train(run_id, given, retried)
            done = cached | {"shard", "train"}
            self._unfinished[run_id] = [step for step in STEPS if step not in done]
            is_short = given["train"]["epochs"] == EPOCHS
            return [Frame("PENDING"), *[Frame("RUNNING")] * (ACTIVE if is_short and not retried else 2), self._last()]

    def _last(self) -> Frame:
        return Frame("SUCCEEDED", dict.fromkeys(STEPS, "SUCCEEDED"))

    def _keys(self, given: Object) -> dict[str, str]:
        """What Kubeflow's cache goes by: the arguments of each task, and those that its settings are made of."""
        if "cache" in self.forgets:
            return {}
        of = {
            "shard": ("shard", "images", "images_version", "addresses", "shard_image", "shard_cpu", "shard_memory"),
            "train": ("shard", "train", "addresses", "nodes", "train_image", "train_cpu", "train_memory"),
            "evaluate": ("shard", "train", "evaluate", "addresses", "evaluate_image", "evaluate_memory"),
        }
        return {step: json.dumps([given.get(name) for name in names]) for step, names in of.items()}

    def _train(self, run_id: str, given: Object, retried: bool) -> None:
        if json.dumps([given["addresses"], given["train"]]) in self._trained:
            self._pod(run_id, "train", "Succeeded", "/store/x: step 470, weights e315")
            return
        continued = "continuing /store/x at step 40\n" if retried and "checkpoints" not in self.forgets else ""
        self._pod(run_id, "train", "Running", continued + EPOCH)
        if given.get("nodes", 1) > 1:
            self._nodes(run_id)

    def _nodes(self, run_id: str) -> None:
        for node in range(2):
            self._count += 1
            labels = {"vgg.pipeline-run": run_id, "batch.kubernetes.io/job-completion-index": str(node)}
            self.kube.add(f"job-node-0-{node}-{self._count}", "Running", labels)

    def _pod(self, run_id: str, step: str, phase: str, log: str) -> None:
        self._count += 1
        name = f"vgg-imagenet-x7k2p-{step}-{self._count}"
        self.kube.add(name, phase, {"pipeline/runid": run_id, "vgg.stage": step})
        self.kube.logs[name] = log + "\n"

    def proceed(self) -> None:
        """What has happened until now: a run that succeeded has done its other steps, and its pods have ended."""
        for run in self.kfp.runs:
            if run["state"] in ("SUCCEEDED", "CANCELED"):
                for pod in self._pods_of(run["run_id"]):
                    if pod["status"]["phase"] == "Running":
                        pod["status"]["phase"] = "Succeeded" if run["state"] == "SUCCEEDED" else "Failed"
            if run["state"] == "SUCCEEDED" and (left := self._unfinished.pop(run["run_id"], [])):
                given = run["runtime_config"]["parameters"]
                for step in left if "gate" not in self.forgets else [one for one in left if one != "register"]:
                    self._pod(run["run_id"], step, "Succeeded", "done")
                if "evaluate" in left:
                    self._evaluate(given)
                self._cache |= set(self._keys(given).values())
                self._trained.add(json.dumps([given["addresses"], given["train"]]))

    def _evaluate(self, given: Object) -> None:
        """As components.evaluate leaves it in the store, without the arrays."""
        store = Path(self.kube.config_maps()[given["addresses"]]["data"]["VGG_STORE"])
        weights = (
            manifest.digest_of(given["train"]) if given["train"]["epochs"] == EPOCHS else self.metrics["weights_sha256"]
        )
        inputs = {"shards": self.metrics["data_digest"], "checkpoint": "46.dir", "weights_sha256": weights}
        folder = store / "predictions" / manifest.digest_of([given["evaluate"], weights])[:16]
        folder.mkdir(parents=True)
        whole = json.loads(json.dumps(given["evaluate"]))
        manifest.write(folder, "vgg.predictions/2", {"evaluate": whole, "inputs": inputs, "metrics": self.metrics}, [])

    def _pods_of(self, run_id: str) -> list[Object]:
        labels = ("pipeline/runid", "vgg.pipeline-run")
        return [p for p in self.kube.pods.values() if run_id in (p["metadata"]["labels"].get(one) for one in labels)]

    def stopped(self, run: Object) -> None:
        """A run was terminated, or deleted with its workflow and pods."""
        with self.kube.lock:
            gone = run not in self.kfp.runs
            for pod in self._pods_of(run["run_id"]):
                pod["status"]["phase"] = "Failed"
                if gone:
                    self.kube.pods.pop(pod["metadata"]["name"])

    def lost(self, pod: Object) -> None:
        """A pod was deleted: Argo makes a step's anew, JobSet those of all nodes; training continues, and ends."""
        labels = pod["metadata"]["labels"]
        run_id = labels.get("pipeline/runid") or labels.get("vgg.pipeline-run")
        if not run_id:
            return
        where = "" if "checkpoints" in self.forgets else "continuing /store/x at step 40\n"
        if "vgg.pipeline-run" in labels:
            for other in self._pods_of(run_id):
                if "vgg.pipeline-run" in other["metadata"]["labels"]:
                    self.kube.pods.pop(other["metadata"]["name"])
                elif other["metadata"]["labels"]["vgg.stage"] == "train":
                    self.kube.logs[other["metadata"]["name"]] += where
            self._nodes(run_id)
        else:
            self._pod(run_id, "train", "Running", where + EPOCH)
        self.kfp.upcoming[run_id] = [*[Frame("RUNNING")] * 4, self._last()]

    # -- pods of a proof

    def kubelet(self, pod: Object) -> None:
        name, labels = pod["metadata"]["name"], pod["metadata"]["labels"]
        [container] = pod["spec"]["containers"]
        python, dash_c, text, *words = container["command"]
        assert (python, dash_c) == ("python", "-c")
        compile(text, name, "exec")
        program = labels["vgg.prove-program"]
        if program == "listen":
            pod["status"] = {"phase": "Running", "podIP": LISTENER}
            return
        env = self._environment(container["env"])
        if program == "stored":
            command = [sys.executable, "-c", text, *words]
            done = subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=60)
            pod["status"]["phase"], self.kube.logs[name] = "Succeeded", done.stdout + done.stderr
            return
        said: Any = self.serves
        if program == "reach":
            open_ones = self.reaches["vgg.stage" in labels]
            said = {address: "open" if address in open_ones else "no answer in 5 s" for address in words}
        elif program == "remove":
            self.removed.append({**json.loads(words[0]), "store": env["VGG_STORE"]})
            shutil.rmtree(env["VGG_STORE"], ignore_errors=True)
            said = {"removed": [env["VGG_STORE"]], "left": []}
        self.kube.logs[name] = f"a warning of a library\n{json.dumps(said)}\nINFO: shutting down\n"
        pod["status"]["phase"] = "Succeeded"

    def _environment(self, listed: list[Object]) -> dict[str, str]:
        """Values of a container's variables; those of secrets are not needed."""
        found = {one["name"]: one["value"] for one in listed if "value" in one}
        for one in listed:
            if source := one.get("valueFrom", {}).get("configMapKeyRef"):
                data = self.kube.config_maps()[source["name"]]["data"]
                if source["key"] in data:
                    found[one["name"]] = data[source["key"]]
                assert source["optional"] or source["key"] in data
        return {name: value for name, value in found.items() if name != "HOME"}
