"""What a run needs and may not be there: looked for before anything is made, every lack told at once.

What cannot be looked at is called "not checked", with the reason, and never "ok".
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipelines.cluster import Cluster, NotAllowed
from pipelines.package import Package
from pipelines.registry import Registries
from pipelines.scheduling import fitting
from vgg.errors import Problem, Refused, Unreachable

OK, LACK, NOTE, UNKNOWN = "ok", "MISSING", "note", "not checked"
TRAINER = ("trainer.kubeflow.org", "v1alpha1")


@dataclass(frozen=True)
class Finding:
    """What was looked for, how it stands (OK, LACK, NOTE, UNKNOWN), and what is to be said of it."""

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
    addresses: dict[str, str] | None = None  # what the ConfigMap says; None if it could not be read

    def lacks(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.state == LACK]

    def refuse_lacks(self) -> None:
        """Raise Refused, naming everything that is missing."""
        if lacks := self.lacks():
            count = f"{len(lacks)} thing{'s are' if len(lacks) > 1 else ' is'} missing, so nothing has been made"
            raise Refused("\n".join([f"preflight: {count}:", *(f"  {lack.what}: {lack.detail}" for lack in lacks)]))

    def say(self, what: str, state: str, detail: str) -> None:
        self.findings.append(Finding(what, state, detail))

    def images(self) -> dict[str, str]:
        """The image arguments by digest, so that a moved tag is another image."""
        registries, pinned = Registries(), dict[str, str]()
        lacks: dict[str, list[str]] = {}  # names of images by what is wrong with them
        for name in self.package.images:
            try:
                pinned[name] = registries.pinned(str(self.arguments[name]))
                self.say(name, OK, pinned[name])
            except Problem as problem:
                lacks.setdefault(str(problem), []).append(name)
        for detail, names in lacks.items():
            self.say(", ".join(names), LACK, detail)
        return pinned

    def cluster(self, cluster: Cluster, gpus: bool = True) -> None:
        """Everything that Kubernetes knows of.  gpus: whether their nodes must be there already."""
        arguments = self.arguments
        self._look(f"ConfigMap {arguments['addresses']}", lambda what: self._config_map(cluster, what))
        for name in ("store_secret", "tracking_secret"):
            self._look(f"Secret {arguments[name]}", functools.partial(self._secret, cluster, name))
        self._look(f"volume claim {arguments['claim']}", lambda what: self._claim(cluster, what))
        if self.addresses is not None:
            self.store(self.addresses)
        if int(arguments["nodes"]) > 1:
            self._look("Kubeflow Trainer", lambda what: self._trainer(cluster, what))
        if int(arguments["gpus"]) and gpus:
            self._look("GPUs", lambda what: self._gpus(cluster, what))

    def _look(self, what: str, check: Callable[[str], None]) -> None:
        try:
            check(what)
        except (NotAllowed, Unreachable) as reason:
            self.say(what, UNKNOWN, str(reason))

    def _config_map(self, cluster: Cluster, what: str) -> None:
        name = self.arguments["addresses"]
        data, keys = cluster.config_map(name), self.package.keys("addresses")
        if data is None:
            needed = " ".join(f"--from-literal={key}=…" for key, optional in keys.items() if not optional)
            make = f"kubectl -n {cluster.namespace} create configmap {name} {needed}".rstrip()
            self.say(what, LACK, f"not in namespace {cluster.namespace}. Make it: {make}")
            return
        self.addresses = {key: value for key, value in data.items() if value}
        if absent := [key for key, optional in keys.items() if key not in data and not optional]:
            self.say(what, LACK, f"has no {' and no '.join(absent)}")
        else:
            self.say(what, OK, ", ".join(sorted(data)) or "empty")
        for key in sorted(set(data) - set(keys)):
            close = difflib.get_close_matches(key, keys, n=1)
            self.say(what, NOTE, f"nothing reads its key {key}" + (f"; did you mean {close[0]}?" if close else ""))
        if not self.addresses.get("MLFLOW_TRACKING_URI"):
            self.say(what, NOTE, "without MLFLOW_TRACKING_URI every step tracks into a file that ends with its pod")

    def _secret(self, cluster: Cluster, argument: str, what: str) -> None:
        keys = self.package.keys(argument)
        found = cluster.secret_keys(self.arguments[argument])
        if found is None:
            state = NOTE if all(keys.values()) else LACK
            self.say(what, state, f"not in namespace {cluster.namespace}, so the steps get no {', '.join(keys)}")
        elif absent := [key for key in keys if key not in found]:
            there = f"; there are {', '.join(sorted(found))}" if found else ""
            self.say(what, LACK, f"{', '.join(absent)} missing or empty{there}")
        else:
            self.say(what, OK, ", ".join(keys))

    def _claim(self, cluster: Cluster, what: str) -> None:
        found, nodes = cluster.claim(self.arguments["claim"]), int(self.arguments["nodes"])
        if found is None:
            self.say(what, LACK, f"not in namespace {cluster.namespace}; every step mounts it at /store")
            return
        phase, modes = found.get("status", {}).get("phase"), ", ".join(found["spec"].get("accessModes", []))
        if phase == "Lost":
            self.say(what, LACK, "its volume is lost")
        elif nodes > 1 and "ReadWriteMany" not in modes:
            self.say(what, LACK, f"{nodes} nodes mount it, which needs ReadWriteMany; it is {modes}")
        elif phase == "Pending":
            self.say(what, NOTE, "pending: bound by the first step, or never; see kubectl describe pvc")
        else:
            self.say(what, OK, f"{phase}, {modes}")

    def store(self, addresses: dict[str, str]) -> None:
        """Whether VGG_STORE answers to the credentials that this machine has."""
        address = addresses.get("VGG_STORE", "/store")
        endpoint, region = addresses.get("AWS_ENDPOINT_URL"), addresses.get("AWS_DEFAULT_REGION")
        what = f"store {address}"
        if not (match := re.fullmatch(r"s3://([^/]+)(/.*)?", address)):
            self.say(what, OK, "a folder of the volume claim")
            return
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        once = Config(connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 1})
        try:
            client = boto3.session.Session().client("s3", endpoint_url=endpoint, region_name=region, config=once)
            client.head_bucket(Bucket=match[1])
            self.say(what, OK, "answers to the credentials of this machine")
        except NoCredentialsError:
            self.say(what, UNKNOWN, "this machine has no credentials for it (AWS_ACCESS_KEY_ID, …)")
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if status == 404:
                self.say(what, LACK, f"there is no bucket {match[1]} at {endpoint or 'AWS'}")
            else:
                self.say(what, UNKNOWN, f"the credentials of this machine are answered with {status}")
        except (BotoCoreError, ValueError) as error:
            self.say(what, UNKNOWN, f"not to be reached from this machine: {error}")

    def _trainer(self, cluster: Cluster, what: str) -> None:
        runtime = self.arguments["runtime"]
        if not cluster.serves(*TRAINER, "trainjobs"):
            self.say(what, LACK, f"no TrainJob is served ({'/'.join(TRAINER)}). Install Trainer 2, or use nodes=1")
        elif not cluster.has(*TRAINER, "trainingruntimes", runtime):
            self.say(what, LACK, f"no TrainingRuntime {runtime} in namespace {cluster.namespace}. Apply deploy/")
        else:
            self.say(what, OK, f"TrainingRuntime {runtime}")

    def _gpus(self, cluster: Cluster, what: str) -> None:
        gpus, kind, needed = int(self.arguments["gpus"]), self.arguments["gpu_type"], int(self.arguments["nodes"])
        selector, tolerations = self.arguments["node_selector"], self.arguments["tolerations"]
        fit, others = fitting(cluster.nodes(), gpus, kind, selector, tolerations)
        if len(fit) >= needed:
            self.say(what, OK, f"{len(fit)} nodes with {gpus} {kind} (perhaps in use), {needed} needed")
            return
        why = f": {'; '.join(others)}" if others else ""
        change = "-C gpus, gpu_type, node_selector, tolerations; --no-gpu-check if nodes are made on demand"
        self.say(what, LACK, f"{needed} nodes with {gpus} {kind} needed, {len(fit)} there{why}. Change {change}")
