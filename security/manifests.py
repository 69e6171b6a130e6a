"""Check rendered Kubernetes manifests: the published schemas, strictly, and our rules for pods, rights and networks.

kubectl kustomize deploy/overlays/gpu | python -m security.manifests -
"""

from __future__ import annotations

import ipaddress
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from components.program import Parser, run
from runtime.errors import BadData, Refused
from security import pods

Json = dict[str, Any]

KUBERNETES = ("1.31", "1.37")  # the oldest that Trainer 2.2 supports, and the newest with published schemas
METADATA = ("169.254.169.254", "fd00:ec2::254")  # metadata services of clouds, with a machine's credentials
# actions of JobSet; failure reasons of Kubernetes' Jobs
ACTIONS = {
    "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts",
}  # fmt: skip
REASONS = {
    "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy",
}  # fmt: skip
TRAINER = "trainer.kubeflow.org/v1alpha1"
STEP = "trainer.kubeflow.org/trainjob-ancestor-step"
RISKY_VERBS = {"*", "escalate", "bind", "impersonate"}
RISKY_RESOURCES = {"*", "secrets", "pods/exec", "pods/attach", "serviceaccounts/token"}


def main(argv: Sequence[str] | None = None) -> None:
    flags = Parser("security.manifests", __doc__)
    flags.add_argument("file", help="rendered YAML; - for standard input")
    file = flags.parse_args(argv).file
    documents = load(sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8"))
    if found := [line for document in documents for line in faults(document)]:
        raise Refused("\n".join(found))
    print(f"{len(documents)} objects: schemas of Kubernetes {' and '.join(KUBERNETES)} and our rules: passed")


def load(text: str) -> list[Json]:
    """The documents of a YAML text.  Raises BadData."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        documents = [document for document in YAML(typ="safe", pure=True).load_all(text) if document is not None]
    except YAMLError as error:
        raise BadData(f"not YAML: {error}") from None
    if not documents or not all(isinstance(d, dict) and "kind" in d and "metadata" in d for d in documents):
        raise BadData("not a list of Kubernetes objects; render them with: kubectl kustomize deploy/overlays/gpu")
    return documents


def faults(document: Json) -> list[str]:
    """All violations of an object, a line each, its kind and name first."""
    checks: list[Callable[[Json], Iterator[str]]] = [schema, runtime, workload, rights, network, secrets]
    name = f"{document['kind']}/{document['metadata'].get('name')}"
    return [f"{name}: {line}" for check in checks for line in check(document)]


def schema(document: Json) -> Iterator[str]:
    """Violations of the published schemas."""
    if document["apiVersion"] != TRAINER or document["kind"] not in ("TrainingRuntime", "TrainJob"):
        yield from _kubernetes_schema(document)
        return
    yield from _trainer_schema(document)
    for job in document["spec"].get("template", {}).get("spec", {}).get("replicatedJobs", []):
        inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]}
        yield from (f"replicatedJobs.{job['name']}: {line}" for line in _kubernetes_schema(inner))


def _trainer_schema(document: Json) -> Iterator[str]:
    from kubeflow_trainer_api import models
    from pydantic import ValidationError

    try:
        known = getattr(models, f"TrainerV1alpha1{document['kind']}").from_dict(document)
    except ValidationError as error:
        yield from (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return
    assert known is not None
    # the models silently drop unknown fields
    yield from (f"{path}: not a field of Trainer's schema" for path in _lost(document, known.to_dict()))


def _lost(given: object, parsed: object, path: str = "") -> Iterator[str]:
    if isinstance(given, dict) and isinstance(parsed, dict):
        for key, value in given.items():
            inner = f"{path}.{key}".lstrip(".")
            yield from _lost(value, parsed[key], inner) if key in parsed else [inner]
    elif isinstance(given, list) and isinstance(parsed, list):
        for number, (one, other) in enumerate(zip(given, parsed, strict=True)):
            yield from _lost(one, other, f"{path}[{number}]")


def _kubernetes_schema(document: Json) -> Iterator[str]:
    import kubernetes_validate

    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{'.'.join(map(str, error.path))}: {error.message} (Kubernetes {version})"
        except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError):
            yield f"no published schema of {document['apiVersion']} {document['kind']} ({version})"


def runtime(document: Json) -> Iterator[str]:
    """Rules of Trainer, JobSet and Kubernetes for a TrainingRuntime beyond its schema."""
    if document["kind"] != "TrainingRuntime":
        return
    spec = document["spec"]["template"]["spec"]
    for rule in spec.get("failurePolicy", {}).get("rules") or []:
        if not re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]):
            yield f"failurePolicy: {rule['name']} is not a valid rule name"
        if rule["action"] not in ACTIONS:
            yield f"failurePolicy: {rule['action']} is not an action of JobSet"
        for reason in set(rule.get("onJobFailureReasons") or []) - REASONS:
            yield f"failurePolicy: {reason} is not a failure reason of a Job"
    for job in spec["replicatedJobs"]:
        template, pod = job["template"], job["template"]["spec"]["template"]["spec"]
        if (
            template.get("metadata", {}).get("labels", {}).get("trainer.kubeflow.org/trainjob-ancestor-step")
            != "trainer"
        ):
            yield f"replicatedJobs.{job['name']}: without the label of the trainer's step a TrainJob has no effect"
        if job.get("replicas") != 1 or "node" not in {container["name"] for container in pod["containers"]}:
            yield f"replicatedJobs.{job['name']}: must have 1 replica and a container 'node'"
        if "podFailurePolicy" in template["spec"] and pod.get("restartPolicy") != "Never":
            yield f"replicatedJobs.{job['name']}: podFailurePolicy requires restartPolicy Never"


def workload(document: Json) -> Iterator[str]:
    """Pod Security "restricted" and our rules, for every pod template in the object.

    A TrainJob has none: it only patches the templates of its runtime.
    """
    if document["kind"] == "TrainJob":
        return
    for path, pod in pod_specs(document):
        yield from (f"{path}: {line}" for line in [*pods.restricted(pod), *pods.ours(pod)])


def pod_specs(parent: object, path: str = "") -> Iterator[tuple[str, Json]]:
    """Every PodSpec in an object, with its path."""
    if isinstance(parent, dict):
        if isinstance(parent.get("containers"), list):
            yield path, parent
        for key, value in parent.items():
            yield from pod_specs(value, f"{path}.{key}".lstrip("."))
    elif isinstance(parent, list):
        for number, value in enumerate(parent):
            yield from pod_specs(value, f"{path}[{number}]")


def rights(document: Json) -> Iterator[str]:
    """Our roles are limited to a namespace, name what they allow, and grant no secrets or further rights."""
    if document["kind"] in ("ClusterRole", "ClusterRoleBinding"):
        yield "grants rights in the whole cluster; use a Role"
    if document["kind"] == "RoleBinding" and document["roleRef"]["kind"] != "Role":
        yield f"binds the {document['roleRef']['kind']} {document['roleRef']['name']}; bind one of our Roles"
    for rule in document.get("rules") or []:
        asked = {*rule.get("apiGroups", []), *rule.get("resources", [])}
        for risky in sorted(asked & RISKY_RESOURCES | set(rule.get("verbs", [])) & RISKY_VERBS):
            yield f"rule for {', '.join(rule.get('resources', []))}: {risky} is not allowed"


def network(document: Json) -> Iterator[str]:
    """No policy allows all peers, or egress to the metadata service."""
    if document["kind"] != "NetworkPolicy":
        return
    spec = document["spec"]
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for rule in spec.get(direction) or []:
            if not rule.get(peers):
                yield f"{direction}: a rule without {peers!r} allows all peers"
            for peer in rule.get(peers) or []:
                for address in METADATA:
                    if direction == "egress" and _reaches(peer.get("ipBlock"), address):
                        yield f"egress to {peer['ipBlock']['cidr']} reaches {address}; except it"
    for kind in {"Ingress", "Egress"} - set(spec.get("policyTypes", [])):
        if kind.lower() in spec:
            yield f"policyTypes: has rules for {kind} but does not list it"


def _reaches(block: Json | None, address: str) -> bool:
    if not block:
        return False
    target = ipaddress.ip_address(address)
    return target in ipaddress.ip_network(block["cidr"]) and not any(
        target in ipaddress.ip_network(cidr) for cidr in block.get("except") or []
    )


def secrets(document: Json) -> Iterator[str]:
    """Manifests contain no Secret, and no value in a ConfigMap that looks like one."""
    if document["kind"] == "Secret":
        yield "a secret must not be in a manifest; create it with kubectl (docs/cluster.md)"
    if document["kind"] == "ConfigMap":
        for key, value in (document.get("data") or {}).items():
            lines = [key, *(line for line in str(value).splitlines() if not line.lstrip().startswith(("#", ";")))]
            if any(re.search(r"(password|secret|token|access_key)[\w-]*\s*[=:]\s*\S|AKIA\w", x, re.I) for x in lines):
                yield f"data.{key}: looks like a secret"


if __name__ == "__main__":
    run(main)
