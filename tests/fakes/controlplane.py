"""A real Kubernetes without nodes: etcd, API server, controllers and scheduler, built by tests/apiserver/build.sh.

There is no kubelet, so no container runs: tests set the status of pods.  Trainer and JobSet are not there either: their
CRDs keep all fields, and tests take the role of their controllers.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import ROOT
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from ending import ended
from kubeserver import wait_for, write_kubeconfig
from ports import free_port

Json = dict[str, Any]
BINARIES = ROOT / "build/apiserver"
ADMIN = "administrator"
TRAINER = (("trainer.kubeflow.org", "v1alpha1", "TrainJob"), ("trainer.kubeflow.org", "v1alpha1", "TrainingRuntime"))
JOBSET = ("jobset.x-k8s.io", "v1alpha2", "JobSet")


def crd(group: str, version: str, kind: str) -> Json:
    """A definition without rules: every field is kept, and status is a resource of its own."""
    plural = f"{kind.lower()}s"
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    versions = [{"name": version, "served": True, "storage": True, "schema": schema, "subresources": {"status": {}}}]
    names = {"kind": kind, "plural": plural, "singular": kind.lower()}
    spec = {"group": group, "scope": "Namespaced", "names": names, "versions": versions}
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"}, "spec": spec,
    }  # fmt: skip


class ControlPlane:
    """folder: for its data and its log."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self._etcd = free_port()
        self._store, self._server, self._controllers = (contextlib.ExitStack() for _ in range(3))
        self._write_keys()

    def start(self) -> None:
        peers = f"http://127.0.0.1:{free_port()}"
        client = f"http://127.0.0.1:{self._etcd}"
        self._store.enter_context(self._program(
            "etcd", f"--data-dir={self.folder}/etcd", "--unsafe-no-fsync", f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}", f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}", f"--initial-cluster=default={peers}",
        ))  # fmt: skip
        self.start_server()
        config = f"--kubeconfig={self.kubeconfig(self.folder / 'admin', ADMIN)}"
        shared = (config, "--leader-elect=false", f"--authorization-kubeconfig={self.folder}/admin")
        self._controllers.enter_context(self._program(
            "kube-controller-manager", *shared, f"--secure-port={free_port()}", "--use-service-account-credentials",
            f"--service-account-private-key-file={self.folder}/key", f"--root-ca-file={self.folder}/tls/apiserver.crt",
        ))  # fmt: skip
        self._controllers.enter_context(self._program("kube-scheduler", *shared, f"--secure-port={free_port()}"))

    def start_server(self) -> None:
        self._server.enter_context(self._program(
            "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{self._etcd}", "--bind-address=127.0.0.1",
            f"--secure-port={self.port}", f"--cert-dir={self.folder}/tls", f"--token-auth-file={self.folder}/tokens",
            "--service-account-issuer=https://kubernetes.default.svc", "--authorization-mode=RBAC",
            f"--service-account-key-file={self.folder}/key.pub", "--service-cluster-ip-range=10.0.0.0/24",
            f"--service-account-signing-key-file={self.folder}/key",
        ))  # fmt: skip
        self.kubeconfig(self.folder / "admin", ADMIN)
        wait_for(lambda: self.kubectl("get", "--raw", "/readyz", check=False).returncode == 0, 90)

    def stop_server(self) -> None:
        self._server.close()

    def close(self) -> None:
        for part in (self._controllers, self._server, self._store):
            part.close()

    def kubeconfig(self, path: Path, token: str, namespace: str = "kubeflow") -> str:
        cluster = {
            "server": f"https://127.0.0.1:{self.port}",
            "certificate-authority": f"{self.folder}/tls/apiserver.crt",
        }
        return write_kubeconfig(path, cluster, token, namespace)

    def kubectl(self, *words: str, text: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        """As the administrator."""
        command = ["kubectl", f"--kubeconfig={self.folder}/admin", *words]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, done.stderr
        return done

    def get(self, *words: str) -> Json:
        found: Json = json.loads(self.kubectl("get", *words, "-o", "json").stdout)
        return found

    def create(self, *objects: Json) -> None:
        items = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("create", "-f", "-", text=json.dumps(items))

    def define(self, *kinds: tuple[str, str, str]) -> None:
        """Make definitions, and wait until the server serves them."""
        self.create(*(crd(*kind) for kind in kinds))
        names = [f"crd/{kind.lower()}s.{group}" for group, _, kind in kinds]
        self.kubectl("wait", "--for=condition=Established", "--timeout=60s", *names)

    def set_status(self, what: str, name: str, status: Json) -> None:
        patch = json.dumps({"status": status})
        self.kubectl("patch", what, name, "-n", "kubeflow", "--subresource=status", "--type=merge", "-p", patch)

    @contextlib.contextmanager
    def _program(self, name: str, *flags: str) -> Iterator[None]:
        with open(self.folder / f"{name}.log", "ab") as log:
            child = subprocess.Popen(
                [BINARIES / name, *flags], cwd=self.folder, stdout=log, stderr=log, env={"PATH": os.environ["PATH"]}
            )
        with ended(child):
            time.sleep(0.2)
            assert child.poll() is None, (self.folder / f"{name}.log").read_text()[-2000:]
            yield

    def _write_keys(self) -> None:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        (self.folder / "key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        public = serialization.PublicFormat.SubjectPublicKeyInfo
        (self.folder / "key.pub").write_bytes(key.public_key().public_bytes(pem, public))
        (self.folder / "tokens").write_text(f"{ADMIN},{ADMIN},1,system:masters\n")
