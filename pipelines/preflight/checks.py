"""Checks of everything a run needs, before anything is created; everything missing is reported at once.

What cannot be checked is reported as "not checked", with the reason, never as "ok".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from components.tracking.address import check_address
from pipelines.definition.package import Package
from pipelines.preflight.cluster import Cluster, NotAllowed
from pipelines.preflight.registry import Registries
from pipelines.preflight.scheduling import fitting, too_large
from runtime.errors import Problem, Refused, Unreachable, WrongParameters
from runtime.wording import counted, did_you_mean, some

OK, MISSING, NOTE, UNKNOWN = "ok", "MISSING", "note", "not checked"
TRAINER = ("trainer.kubeflow.org", "v1alpha1")


@dataclass(frozen=True)
class Finding:
    """Result of one check.  state: OK, MISSING, NOTE or UNKNOWN."""

    what: str
    state: str
    detail: str

    def __str__(self) -> str:
        return f"{self.state:<12} {self.what}: {self.detail}"


@dataclass
class Preflight:
    """The checks of one submission.  arguments: of the run, defaults included."""

    package: Package
    arguments: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    addresses: dict[str, str] | None = None  # content of the ConfigMap; None if it could not be read

    def refuse_missing(self) -> None:
        """Raise Refused with everything that is missing."""
        if missing := [finding for finding in self.findings if finding.state == MISSING]:
            count = f"{counted(len(missing), 'item')} missing, nothing was created"
            raise Refused("\n".join([f"preflight: {count}:", *(f"  {one.what}: {one.detail}" for one in missing)]))

    def add(self, what: str, state: str, detail: str) -> None:
        self.findings.append(Finding(what, state, detail))

    def images(self) -> dict[str, str]:
        """The image arguments by digest, so that a moved tag is noticed."""
        registries, pinned = Registries(), dict[str, str]()
        missing: dict[str, list[str]] = {}  # image arguments by message
        for name in self.package.images:
            try:
                pinned[name] = registries.pinned(str(self.arguments[name]))
                self.add(name, OK, pinned[name])
            except Problem as problem:
                missing.setdefault(str(problem), []).append(name)
        for detail, names in missing.items():
            self.add(", ".join(names), MISSING, detail)
        return pinned

    def cluster(self, cluster: Cluster, gpus: bool = True) -> None:
        """Everything in Kubernetes.  gpus: whether the nodes must exist already."""
        arguments = self.arguments
        self._check(f"ConfigMap {arguments['addresses']}", lambda what: self._config_map(cluster, what))
        for name in ("store_secret", "tracking_secret"):
            self._check(f"Secret {arguments[name]}", functools.partial(self._secret, cluster, name))
        self._check(f"volume claim {arguments['claim']}", lambda what: self._claim(cluster, what))
        if self.addresses is not None:
            self.store(self.addresses)
        if int(arguments["nodes"]) > 1:
            self._check("Kubeflow Trainer", lambda what: self._trainer(cluster, what))
        if int(arguments["gpus"]) and gpus:
            self._check("GPUs", lambda what: self._gpus(cluster, what))
        if gpus:
            self._check("size of the nodes", lambda what: self._sizes(cluster, what))

    def _check(self, what: str, check: Callable[[str], None]) -> None:
        try:
            check(what)
        except (NotAllowed, Unreachable) as reason:
            self.add(what, UNKNOWN, str(reason))

    def _config_map(self, cluster: Cluster, what: str) -> None:
        name = self.arguments["addresses"]
        data, keys = cluster.config_map(name), self.package.keys("addresses")
        if data is None:
            needed = " ".join(f"--from-literal={key}=…" for key, optional in keys.items() if not optional)
            create = f"kubectl -n {cluster.namespace} create configmap {name} {needed}".rstrip()
            self.add(what, MISSING, f"not in namespace {cluster.namespace}. Create it: {create}")
            return
        self.addresses = {key: value for key, value in data.items() if value}
        if absent := [key for key, optional in keys.items() if key not in data and not optional]:
            self.add(what, MISSING, f"has no {' and no '.join(absent)}")
        else:
            self.add(what, OK, some(sorted(data)) or "empty")
        for key in sorted(set(data) - set(keys)):
            self.add(what, NOTE, f"its key {key} is not used{did_you_mean(key, keys)}")
        self._tracking_uri(what, self.addresses.get("MLFLOW_TRACKING_URI", ""))

    def _tracking_uri(self, what: str, uri: str) -> None:
        if not uri:
            self.add(what, NOTE, "without MLFLOW_TRACKING_URI every step tracks into a file that is lost with its pod")
            return
        try:
            check_address(uri)
        except WrongParameters as wrong:
            self.add(what, MISSING, str(wrong))

    def _secret(self, cluster: Cluster, argument: str, what: str) -> None:
        keys = self.package.keys(argument)
        found = cluster.secret_keys(self.arguments[argument])
        if found is None:
            state = NOTE if all(keys.values()) else MISSING
            self.add(what, state, f"not in namespace {cluster.namespace}, so steps run without {', '.join(keys)}")
        elif absent := [key for key in keys if key not in found]:
            present = f"; it has {some(sorted(found))}" if found else ""
            self.add(what, MISSING, f"{', '.join(absent)} missing or empty{present}")
        else:
            self.add(what, OK, ", ".join(keys))

    def _claim(self, cluster: Cluster, what: str) -> None:
        found, nodes = cluster.claim(self.arguments["claim"]), int(self.arguments["nodes"])
        if found is None:
            self.add(what, MISSING, f"not in namespace {cluster.namespace}; every step mounts it at /store")
            return
        phase, modes = found.get("status", {}).get("phase"), ", ".join(found["spec"].get("accessModes", []))
        if phase == "Lost":
            self.add(what, MISSING, "its volume is lost")
        elif nodes > 1 and "ReadWriteMany" not in modes:
            self.add(what, MISSING, f"{nodes} nodes mount it, which needs ReadWriteMany; it is {modes}")
        elif phase == "Pending":
            self.add(what, NOTE, "pending: the first step may bind it; see kubectl describe pvc")
        else:
            self.add(what, OK, f"{phase}, {modes}")

    def store(self, addresses: dict[str, str]) -> None:
        """Whether VGG_STORE can be accessed with this machine's credentials."""
        address = addresses.get("VGG_STORE", "/store")
        endpoint, region = addresses.get("AWS_ENDPOINT_URL"), addresses.get("AWS_DEFAULT_REGION")
        what = f"store {address}"
        if not (match := re.fullmatch(r"s3://([^/]+)(/.*)?", address)):
            self.add(what, OK, "a folder on the volume claim")
            return
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        once = Config(connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 1})
        try:
            client = boto3.session.Session().client("s3", endpoint_url=endpoint, region_name=region, config=once)
            client.head_bucket(Bucket=match[1])
            self.add(what, OK, "accessible with this machine's credentials")
        except NoCredentialsError:
            self.add(what, UNKNOWN, "this machine has no credentials for it (AWS_ACCESS_KEY_ID, …)")
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if status == 404:
                self.add(what, MISSING, f"no bucket {match[1]} at {endpoint or 'AWS'}")
            else:
                self.add(what, UNKNOWN, f"the server answers this machine's credentials with {status}")
        except (BotoCoreError, ValueError) as error:
            self.add(what, UNKNOWN, f"cannot be reached from this machine: {error}")

    def _trainer(self, cluster: Cluster, what: str) -> None:
        runtime = self.arguments["runtime"]
        if not cluster.serves(*TRAINER, "trainjobs"):
            self.add(
                what,
                MISSING,
                f"the cluster serves no TrainJobs ({'/'.join(TRAINER)}). Install Trainer 2, or use nodes=1",
            )
        elif not cluster.has(*TRAINER, "trainingruntimes", runtime):
            apply = "Apply deploy/components/trainer with the site's kustomization (docs/cluster.md, 4)"
            self.add(what, MISSING, f"no TrainingRuntime {runtime} in namespace {cluster.namespace}. {apply}")
        else:
            self.add(what, OK, f"TrainingRuntime {runtime}")

    def _gpus(self, cluster: Cluster, what: str) -> None:
        gpus, kind, needed = int(self.arguments["gpus"]), self.arguments["gpu_type"], int(self.arguments["nodes"])
        selector, tolerations = self.arguments["node_selector"], self.arguments["tolerations"]
        fit, others = fitting(cluster.nodes(), gpus, kind, selector, tolerations)
        if len(fit) >= needed:
            self.add(what, OK, f"{len(fit)} nodes with {gpus} {kind} (possibly in use), {needed} needed")
            return
        why = f": {some(others, '; ')}" if others else ""
        change = "-C gpus, gpu_type, node_selector, tolerations; --no-gpu-check if nodes are created on demand"
        self.add(what, MISSING, f"{needed} nodes with {gpus} {kind} needed, {len(fit)} found{why}. Change {change}")

    def _sizes(self, cluster: Cluster, what: str) -> None:
        """What the pods request, against the largest node: a pod that asks for more stays Pending for ever."""
        nodes, few = cluster.nodes(), len(self.findings)
        for pod, cpu, memory, pool in requests(self.arguments):
            where = (self.arguments["node_selector"], self.arguments["tolerations"]) if pool else ({}, [])
            if why := too_large(nodes, cpu, memory, *where):
                change = "Request less (docs/cluster.md, 6); --no-gpu-check if nodes are created on demand"
                self.add(what, MISSING, f"no node has the {cpu} CPUs and {memory} of {pod}: {why}. {change}")
        if len(self.findings) == few:
            self.add(what, OK, "every pod fits into an empty node")


def requests(arguments: dict[str, Any]) -> Iterator[tuple[str, str, str, bool]]:
    """Of the pods of a run: what it is, CPUs, memory, and whether it is in the node pool of the run."""
    if int(arguments["nodes"]) > 1:
        yield "a node of the training", str(arguments["train_cpu"]), str(arguments["train_memory"]), True
    others = ("shard", "evaluate", "localise", "gate", "register")
    for step, prefix in (("train", "step"), *((name, name) for name in others)):
        cpu, memory = (
            arguments.get(f"{prefix}_{kind}_request", arguments.get(f"{prefix}_{kind}")) for kind in ("cpu", "memory")
        )
        if cpu and memory:
            yield f"step {step}", str(cpu), str(memory), step in ("train", "evaluate", "localise")
