"""Pod Security "restricted": each control is violated once, and allowed values pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from broken import change

from security.pods import image_fault, ours, restricted

CONTAINER = {
    "name": "c", "image": "r/vgg:1",
    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
}  # fmt: skip
GOOD = {
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [CONTAINER],
    "volumes": [{"name": "v", "emptyDir": {}}],
}


@pytest.mark.parametrize(
    "path, value, field",
    [
        ("hostNetwork", True, "hostNetwork"),
        ("hostPID", True, "hostPID"),
        ("hostIPC", True, "hostIPC"),
        ("volumes.0", {"name": "v", "hostPath": {"path": "/"}}, "volumes.v: hostPath"),
        ("volumes.0", {"name": "v", "nfs": {"server": "s", "path": "/"}}, "volumes.v: nfs"),
        ("securityContext.sysctls", [{"name": "kernel.msgmax", "value": "1"}], "sysctls: kernel.msgmax"),
        ("securityContext.runAsUser", 0, "pod.securityContext.runAsUser"),
        ("securityContext.runAsNonRoot", False, "pod.securityContext.runAsNonRoot"),
        ("securityContext.runAsNonRoot", None, "containers.c.securityContext.runAsNonRoot"),
        ("securityContext.seccompProfile", None, "containers.c.securityContext.seccompProfile"),
        ("securityContext.seccompProfile.type", "Unconfined", "pod.securityContext.seccompProfile"),
        ("securityContext.appArmorProfile.type", "Unconfined", "pod.securityContext.appArmorProfile"),
        ("securityContext.seLinuxOptions.type", "spc_t", "pod.securityContext.seLinuxOptions"),
        ("securityContext.seLinuxOptions.user", "system_u", "pod.securityContext.seLinuxOptions"),
        ("securityContext.windowsOptions.hostProcess", True, "windowsOptions.hostProcess"),
        ("containers.0.securityContext.runAsUser", 0, "containers.c.securityContext.runAsUser"),
        ("containers.0.securityContext.runAsNonRoot", False, "containers.c.securityContext.runAsNonRoot"),
        (
            "containers.0.securityContext.seccompProfile.type",
            "Unconfined",
            "containers.c.securityContext.seccompProfile",
        ),
        ("containers.0.securityContext.privileged", True, "containers.c.securityContext.privileged"),
        ("containers.0.securityContext.allowPrivilegeEscalation", None, "allowPrivilegeEscalation"),
        ("containers.0.securityContext.allowPrivilegeEscalation", True, "allowPrivilegeEscalation"),
        ("containers.0.securityContext.procMount", "Unmasked", "procMount"),
        ("containers.0.securityContext.capabilities.drop", ["NET_RAW"], "capabilities.drop"),
        ("containers.0.securityContext.capabilities.add", ["SYS_ADMIN"], "capabilities.add: SYS_ADMIN"),
        ("containers.0.ports", [{"containerPort": 1, "hostPort": 1}], "hostPort 1"),
        ("containers.0.livenessProbe", {"httpGet": {"host": "10.0.0.1", "port": 1}}, "livenessProbe.httpGet.host"),
        ("containers.0.lifecycle.preStop", {"tcpSocket": {"host": "x", "port": 1}}, "preStop.tcpSocket.host"),
        ("initContainers", [{"name": "i", "image": "x:1"}], "initContainers.i.securityContext.capabilities.drop"),
        ("ephemeralContainers", [{"name": "e", "image": "x:1"}], "ephemeralContainers.e.securityContext.allow"),
    ],
)
def test_each_control_of_pod_security_restricted(path: str, value: Any, field: str) -> None:
    assert restricted(GOOD) == []
    pod = copy.deepcopy(GOOD)
    change(pod, path, value)
    found = restricted(pod)
    assert any(field in line for line in found), found


def test_what_restricted_allows_passes() -> None:
    pod = copy.deepcopy(GOOD)
    change(pod, "containers.0.securityContext.capabilities.add", ["NET_BIND_SERVICE"])
    change(pod, "securityContext.sysctls", [{"name": "net.ipv4.tcp_syncookies", "value": "1"}])
    change(pod, "securityContext.seLinuxOptions", {"type": "container_t", "level": "s0"})
    change(pod, "containers.0.livenessProbe", {"httpGet": {"port": 1}})
    assert restricted(pod) == []
    change(pod, "securityContext", {})  # setting it for each container is enough
    change(pod, "containers.0.securityContext.runAsNonRoot", True)
    change(pod, "containers.0.securityContext.seccompProfile", {"type": "Localhost", "localhostProfile": "p.json"})
    assert restricted(pod) == []
    assert len(ours(pod)) == 5  # token, user, root file system, two limits


def test_an_image_reference_is_fixed() -> None:
    assert image_fault("r:5000/vgg-train:train-0123") == ""
    assert image_fault(f"r:5000/vgg-train@sha256:{'0' * 64}") == ""
    for bad in ("", "vgg", "r:5000/vgg", "vgg:latest", "vgg@sha256:0"):
        assert image_fault(bad), bad
