"""Connections that the network policies of deploy/ allow, combined as in Kubernetes."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from rendering import rendered

Json = dict[str, Any]

METADATA, OUTSIDE = "169.254.169.254", "203.0.113.7"
STEP = {"vgg.stage": "shard", "pipelines.kubeflow.org/v2_component": "true"}
NODE = {"vgg.stage": "train", "jobset.sigs.k8s.io/jobset-name": "vgg-1"}
MLFLOW = {"app": "mlflow"}


def selects(selector: Json, labels: dict[str, str]) -> bool:
    def holds(rule: Json) -> bool:
        exists, value = rule["key"] in labels, labels.get(rule["key"])
        return {"Exists": exists, "DoesNotExist": not exists, "In": value in rule.get("values", [])}[rule["operator"]]

    wanted = selector.get("matchLabels", {})
    return wanted.items() <= labels.items() and all(map(holds, selector.get("matchExpressions", [])))


def matches(peer: Json, other: dict[str, str] | str, namespace: str) -> bool:
    """Whether a peer of a rule matches a pod, given by labels and namespace, or an address."""
    if isinstance(other, str):
        block = peer.get("ipBlock", {"cidr": "0.0.0.0/32"})
        address, excluded = ipaddress.ip_address(other), map(ipaddress.ip_network, block.get("except", []))
        return address in ipaddress.ip_network(block["cidr"]) and not any(address in network for network in excluded)
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" in peer:
        in_namespace = selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
    else:
        in_namespace = namespace == "kubeflow"  # that of the policy
    return in_namespace and selects(peer.get("podSelector", {}), other)


def allowed(direction: str, pod: dict[str, str], other: dict[str, str] | str, port: int, namespace: str) -> bool:
    """Whether the policies allow a connection of a pod in the namespace of the runs: if any of them does."""
    policies = [d["spec"] for d in rendered("base") if d["kind"] == "NetworkPolicy"]
    mine = [p for p in policies if direction in p["policyTypes"] and selects(p["podSelector"], pod)]
    rules = [rule for policy in mine for rule in policy.get(direction.lower(), [])]
    peers = {"Egress": "to", "Ingress": "from"}[direction]
    return not mine or any(
        port in [p["port"] for p in rule.get("ports", [{"port": port}])]
        and any(matches(peer, other, namespace) for peer in rule[peers])
        for rule in rules
    )


@pytest.mark.parametrize(
    "pod, other, namespace, port, expected",
    [
        (STEP, {"k8s-app": "kube-dns"}, "kube-system", 53, True),
        (NODE, {"k8s-app": "kube-dns"}, "kube-system", 53, True),
        (STEP, "169.254.20.10", "", 53, True),
        (STEP, MLFLOW, "kubeflow", 5000, True),
        (NODE, MLFLOW, "kubeflow", 5000, True),
        (STEP, MLFLOW, "kubeflow", 22, False),
        (STEP, {"app": "seaweedfs"}, "kubeflow", 8333, True),
        (NODE, {"app": "minio"}, "kubeflow", 9000, True),
        (STEP, {"app": "seaweedfs"}, "kubeflow", 8111, False),  # the admin port
        (STEP, {"app": "seaweedfs"}, "elsewhere", 8333, False),
        (STEP, {"app": "ml-pipeline"}, "kubeflow", 8887, True),
        (STEP, {"component": "metadata-grpc-server"}, "kubeflow", 8080, True),
        (NODE, {"app": "ml-pipeline"}, "kubeflow", 8887, False),
        (NODE, {"component": "metadata-grpc-server"}, "kubeflow", 8080, False),
        (STEP, {"app": "mysql"}, "kubeflow", 3306, False),
        (STEP, "10.0.0.1", "", 6443, True),  # the Kubernetes API
        (NODE, "10.0.0.1", "", 6443, False),
        (STEP, OUTSIDE, "", 443, True),  # S3
        (STEP, OUTSIDE, "", 80, False),
        (NODE, OUTSIDE, "", 22, False),
        (STEP, METADATA, "", 80, False),
        (STEP, METADATA, "", 443, False),
        (NODE, METADATA, "", 443, False),
        (STEP, METADATA, "", 53, False),
        (NODE, NODE, "kubeflow", 29500, True),
        (NODE, NODE, "kubeflow", 40123, True),  # NCCL
        (STEP, NODE, "kubeflow", 29500, False),
        (NODE, STEP, "kubeflow", 29500, False),
        (MLFLOW, OUTSIDE, "", 443, False),
        (MLFLOW, STEP, "kubeflow", 443, False),
    ],
)
def test_pods_open_required_connections_only(
    pod: dict[str, str], other: dict[str, str] | str, namespace: str, port: int, expected: bool
) -> None:
    assert allowed("Egress", pod, other, port, namespace) is expected


@pytest.mark.parametrize(
    "pod, other, port, expected",
    [
        (MLFLOW, STEP, 5000, True),
        (MLFLOW, NODE, 5000, True),
        (MLFLOW, {"app": "jupyter"}, 5000, False),
        (MLFLOW, OUTSIDE, 5000, False),
        (NODE, NODE, 29500, True),
        (NODE, {"app": "jupyter"}, 29500, False),
        (STEP, STEP, 8080, False),
        (STEP, OUTSIDE, 8080, False),
    ],
)
def test_pods_accept_required_connections_only(
    pod: dict[str, str], other: dict[str, str] | str, port: int, expected: bool
) -> None:
    assert allowed("Ingress", pod, other, port, "kubeflow") is expected
