"""Checks of a PodSpec: the Pod Security Standard "restricted" of Kubernetes, complete, and our own rules.

Both take a PodSpec (Kubernetes' JSON) and return a line per violation, the field first.  The standard:
https://kubernetes.io/docs/concepts/security/pod-security-standards/ (1.37; Linux pods).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

CONTAINERS = ("initContainers", "containers", "ephemeralContainers")
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
}  # fmt: skip
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL|PRIVATE", re.IGNORECASE)


def restricted(pod: Json) -> list[str]:
    """Violations of the standard's level "restricted", which includes "baseline"."""
    return [
        *_host(pod),
        *_volumes(pod),
        *_context("pod", _of(pod, "securityContext")),
        *(line for path, container in containers(pod) for line in _container(path, container, pod)),
    ]


def ours(pod: Json) -> list[str]:
    """Violations of our own rules beyond the standard."""
    lines = []
    if pod.get("automountServiceAccountToken") is not False:
        lines.append("automountServiceAccountToken: must be false, the pod does not use the Kubernetes API")
    for path, container in containers(pod):
        context = _of(container, "securityContext")
        user = context.get("runAsUser", _of(pod, "securityContext").get("runAsUser"))
        if not isinstance(user, int):
            lines.append(f"{path}.securityContext.runAsUser: must be a number; an image may give any user a name")
        if context.get("readOnlyRootFilesystem") is not True:
            lines.append(f"{path}.securityContext.readOnlyRootFilesystem: must be true")
        limits = _of(_of(container, "resources"), "limits")
        lines += [f"{path}.resources.limits.{name}: is missing" for name in ("cpu", "memory") if name not in limits]
        if fault := image_fault(container.get("image", "")):
            lines.append(f"{path}.image: {fault}")
        for variable in container.get("env") or []:
            if SECRET_NAME.search(variable["name"]) and variable.get("value"):
                lines.append(f"{path}.env.{variable['name']}: a literal value; use a secret (secretKeyRef)")
    return lines


def image_fault(reference: str) -> str:
    """What is wrong with an image reference; '' if it always means the same image."""
    if re.search(r"@sha256:[0-9a-f]{64}$", reference):
        return ""
    if "@" in reference:
        return f"{reference}: is not a sha256 digest"
    tag = reference.rpartition("/")[2].partition(":")[2]
    if not tag:
        return f"{reference or 'is missing'}: has neither tag nor digest, which means 'latest'"
    return f"{reference}: 'latest' is not a fixed image" if tag == "latest" else ""


def containers(pod: Json) -> Iterator[tuple[str, Json]]:
    """Every container of a pod, of all three kinds, with its path: 'containers.node'."""
    for kind in CONTAINERS:
        for container in pod.get(kind) or []:
            yield f"{kind}.{container['name']}", container


def _host(pod: Json) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"{name}: must not be true"
    for sysctl in _of(pod, "securityContext").get("sysctls") or []:
        if sysctl["name"] not in SYSCTLS:
            yield f"pod.securityContext.sysctls: {sysctl['name']} is not one of the safe ones"


def _volumes(pod: Json) -> Iterator[str]:
    for volume in pod.get("volumes") or []:
        for kind in volume.keys() - {"name"} - VOLUMES:
            yield f"volumes.{volume['name']}: {kind} is not an allowed kind of volume"


def _context(path: str, context: Json) -> Iterator[str]:
    """Violations in the security context of a pod or a container."""
    if context.get("runAsUser") == 0:
        yield f"{path}.securityContext.runAsUser: must not be 0"
    if context.get("runAsNonRoot") is False:
        yield f"{path}.securityContext.runAsNonRoot: must not be false"
    if _of(context, "windowsOptions").get("hostProcess"):
        yield f"{path}.securityContext.windowsOptions.hostProcess: must not be true"
    selinux = _of(context, "seLinuxOptions")
    if selinux.get("type", "") not in SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        yield f"{path}.securityContext.seLinuxOptions: only a container's type may be set, neither user nor role"
    for profile in ("seccompProfile", "appArmorProfile"):
        kind = _of(context, profile).get("type")
        if kind not in (None, "RuntimeDefault", "Localhost"):
            yield f"{path}.securityContext.{profile}: {kind} is not RuntimeDefault or Localhost"


def _container(path: str, container: Json, pod: Json) -> Iterator[str]:
    context, of_pod = _of(container, "securityContext"), _of(pod, "securityContext")
    yield from _context(path, context)
    if context.get("privileged"):
        yield f"{path}.securityContext.privileged: must not be true"
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{path}.securityContext.allowPrivilegeEscalation: must be false"
    if context.get("procMount") not in (None, "Default"):
        yield f"{path}.securityContext.procMount: must be Default"
    if context.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is None:
        yield f"{path}.securityContext.runAsNonRoot: must be true, here or for the pod"
    if not (_of(context, "seccompProfile") or _of(of_pod, "seccompProfile")):
        yield f"{path}.securityContext.seccompProfile: must be RuntimeDefault or Localhost, here or for the pod"
    capabilities = _of(context, "capabilities")
    if "ALL" not in (capabilities.get("drop") or []):
        yield f"{path}.securityContext.capabilities.drop: must contain ALL"
    if added := set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield f"{path}.securityContext.capabilities.add: {', '.join(sorted(added))} may not be added"
    for port in container.get("ports") or []:
        if port.get("hostPort"):
            yield f"{path}.ports: hostPort {port['hostPort']} is not allowed"
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        yield from _handler(f"{path}.{name}", _of(container, name))
    for name in ("postStart", "preStop"):
        yield from _handler(f"{path}.lifecycle.{name}", _of(_of(container, "lifecycle"), name))


def _handler(path: str, handler: Json) -> Iterator[str]:
    """A host in a probe: the kubelet sends the probe, to which no network policy applies."""
    for kind in ("httpGet", "tcpSocket"):
        if host := _of(handler, kind).get("host"):
            yield f"{path}.{kind}.host: {host} is not allowed"


def _of(parent: Json, name: str) -> Json:
    found = parent.get(name)
    return found if isinstance(found, dict) else {}
