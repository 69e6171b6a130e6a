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

KUBERNETES = ("1.31", "1.37")  # the oldest that Trainer 2.2 asks for, and the newest that there are schemas of
METADATA = ("169.254.169.254", "fd00:ec2::254")  # where clouds hand out a machine's credentials
# JobSet's; job failure reasons are Kubernetes'
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
    documents = load(sys.stdin.read() if file == "-" else Path(file).read_text())
    if found := [line for document in documents for line in faults(document)]:
        raise Refused("\n".join(found))
    print(f"{len(documents)} objects: schemas of Kubernetes {' and '.join(KUBERNETES)} and our rules hold")


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
    """Everything that is wrong with an object, a line each, its kind and name first."""
    checks: list[Callable[[Json], Iterator[str]]] = [schema, runtime, workload, rights, network, secrets]
    name = f"{document['kind']}/{document['metadata'].get('name')}"
    return [f"{name}: {line}" for check in checks for line in check(document)]


def schema(document: Json) -> Iterator[str]:
    """What the published schemas do not know or want otherwise."""
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
    # the models drop what they do not know, without a word
    yield from (f"{path}: no such field in Trainer's schema" for path in _lost(document, known.to_dict()))


def _lost(given: object, kept: object, path: str = "") -> Iterator[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            place = f"{path}.{key}".lstrip(".")
            yield from _lost(value, kept[key], place) if key in kept else [place]
    elif isinstance(given, list) and isinstance(kept, list):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _lost(one, other, f"{path}[{number}]")


def _kubernetes_schema(document: Json) -> Iterator[str]:
    import kubernetes_validate

    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{'.'.join(map(str, error.path))}: {error.message} (Kubernetes {version})"
        except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError):
            yield f"there is no published schema of {document['apiVersion']} {document['kind']} ({version})"


def runtime(document: Json) -> Iterator[str]:
    """What Trainer, JobSet and Kubernetes refuse of a TrainingRuntime beyond its schema."""
    if document["kind"] != "TrainingRuntime":
        return
    spec = document["spec"]["template"]["spec"]
    for rule in spec.get("failurePolicy", {}).get("rules") or []:
        if not re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]):
            yield f"failurePolicy: {rule['name']} is no name of a rule"
        if rule["action"] not in ACTIONS:
            yield f"failurePolicy: {rule['action']} is no action of JobSet's"
        for reason in set(rule.get("onJobFailureReasons") or []) - REASONS:
            yield f"failurePolicy: {reason} is no reason for which a Job fails"
    for job in spec["replicatedJobs"]:
        template, pod = job["template"], job["template"]["spec"]["template"]["spec"]
        if (
            template.get("metadata", {}).get("labels", {}).get("trainer.kubeflow.org/trainjob-ancestor-step")
            != "trainer"
        ):
            yield f"replicatedJobs.{job['name']}: without the label of the trainer's step a TrainJob changes nothing"
        if job.get("replicas") != 1 or "node" not in {container["name"] for container in pod["containers"]}:
            yield f"replicatedJobs.{job['name']}: must have 1 replica and a container 'node'"
        if "podFailurePolicy" in template["spec"] and pod.get("restartPolicy") != "Never":
            yield f"replicatedJobs.{job['name']}: podFailurePolicy asks for restartPolicy Never"


def workload(document: Json) -> Iterator[str]:
    """Pod Security "restricted" and our rules, for every pod template wherever it stands.

    A TrainJob has none of its own: what it says of pods are patches of those of its runtime.
    """
    if document["kind"] == "TrainJob":
        return
    for path, pod in pod_specs(document):
        yield from (f"{path}: {line}" for line in [*pods.restricted(pod), *pods.ours(pod)])


def pod_specs(place: object, path: str = "") -> Iterator[tuple[str, Json]]:
    """Every PodSpec in an object, with its path."""
    if isinstance(place, dict):
        if isinstance(place.get("containers"), list):
            yield path, place
        for key, value in place.items():
            yield from pod_specs(value, f"{path}.{key}".lstrip("."))
    elif isinstance(place, list):
        for number, value in enumerate(place):
            yield from pod_specs(value, f"{path}[{number}]")


def rights(document: Json) -> Iterator[str]:
    """A role of ours is a namespace's, names what it allows, and gives away no secret and no way around itself."""
    if document["kind"] in ("ClusterRole", "ClusterRoleBinding"):
        yield "rights in the whole cluster; a Role is enough"
    if document["kind"] == "RoleBinding" and document["roleRef"]["kind"] != "Role":
        yield f"binds the {document['roleRef']['kind']} {document['roleRef']['name']}; bind a Role of ours"
    for rule in document.get("rules") or []:
        asked = {*rule.get("apiGroups", []), *rule.get("resources", [])}
        for risky in sorted(asked & RISKY_RESOURCES | set(rule.get("verbs", [])) & RISKY_VERBS):
            yield f"rule for {', '.join(rule.get('resources', []))}: {risky} is too much"


def network(document: Json) -> Iterator[str]:
    """No policy lets anybody everywhere, or to the machine's metadata."""
    if document["kind"] != "NetworkPolicy":
        return
    spec = document["spec"]
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for rule in spec.get(direction) or []:
            if not rule.get(peers):
                yield f"{direction}: a rule without {peers!r} is for the whole world"
            for peer in rule.get(peers) or []:
                for address in METADATA:
                    if direction == "egress" and _reaches(peer.get("ipBlock"), address):
                        yield f"egress to {peer['ipBlock']['cidr']} reaches {address}; except it"
    for kind in {"Ingress", "Egress"} - set(spec.get("policyTypes", [])):
        if kind.lower() in spec:
            yield f"policyTypes: there are rules for {kind}, which it does not name"


def _reaches(block: Json | None, address: str) -> bool:
    if not block:
        return False
    target = ipaddress.ip_address(address)
    return target in ipaddress.ip_network(block["cidr"]) and not any(
        target in ipaddress.ip_network(cidr) for cidr in block.get("except") or []
    )


def secrets(document: Json) -> Iterator[str]:
    """Secrets are named, never shipped, and nothing that looks like one stands in a config map."""
    if document["kind"] == "Secret":
        yield "a secret does not belong into a manifest; it is made by hand (docs/cluster.md)"
    if document["kind"] == "ConfigMap":
        for key, value in (document.get("data") or {}).items():
            lines = [key, *(line for line in str(value).splitlines() if not line.lstrip().startswith(("#", ";")))]
            if any(re.search(r"(password|secret|token|access_key)[\w-]*\s*[=:]\s*\S|AKIA\w", x, re.I) for x in lines):
                yield f"data.{key}: looks like a secret"


if __name__ == "__main__":
    run(main)
