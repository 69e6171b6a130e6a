"""Everything a submission communicates with: Kubeflow's API, Kubernetes, a registry; each over real HTTP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from kfpserver import KfpServer
from kubeobjects import ImageRegistry, KubeObjects

from pipelines import submit
from pipelines.definition.package import Package
from runtime import retry
from runtime.errors import Problem

CANARIES = ("canary-of-a-secret", "canary-of-a-password", "canary-of-a-token", "canary-of-a-cookie", "canary-in-uri")


def read(path: Path) -> Package:
    text = path.read_text()
    return Package(text, *yaml.load_all(text, yaml.CSafeLoader))


@pytest.fixture(scope="module")
def package(package_file: Path) -> Package:
    return read(package_file)


@dataclass
class World:
    kfp: KfpServer
    kube: KubeObjects
    registry: ImageRegistry
    package: Package
    capsys: pytest.CaptureFixture[str]
    caplog: pytest.LogCaptureFixture

    def images(self) -> list[str]:
        """Flags for images that exist in the registry."""
        flags = []
        for name in self.package.images:
            self.registry.push(f"vgg/{name}:1")
            flags += ["-C", f"{name}={self.registry.host}/vgg/{name}:1"]
        return flags

    def submit(self, *flags: str) -> str:
        """The output of main().  A Problem is raised again; its message is checked for the canaries too."""
        self.caplog.clear()
        output = ""
        try:
            submit.main(["--host", self.kfp.endpoint, "--params", str(ROOT / "params.yaml"), "--poll", "0.01", *flags])
        except Problem as problem:
            output = str(problem)
            raise
        finally:
            output += self.capsys.readouterr().out + self.caplog.text
            assert not [canary for canary in CANARIES if canary in output]
            assert not self.kfp.surprises
        return output

    def run(self) -> dict[str, Any]:
        """The only run."""
        (only,) = self.kfp.runs
        return only

    def posted(self) -> list[str]:
        return [line for line in self.kfp.seen if line.startswith("POST")]


def prepare(package: Package, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """No address or secret of the caller, short pauses, and the package as it is: compiling takes seconds."""
    for name in [name for name in os.environ if name.startswith(("KF_", "KUBE", "AWS_", "VGG_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(submit, "compiled", lambda localised=False: package)
    caplog.set_level("INFO", "vgg")


@pytest.fixture
def world(
    package: Package,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Iterator[World]:
    """A complete cluster."""
    prepare(package, monkeypatch, caplog)
    with KfpServer() as kfp, KubeObjects() as kube, ImageRegistry() as registry:
        kube.complete()
        monkeypatch.setenv("KUBECONFIG", str(kube.kubeconfig(tmp_path / "kubeconfig")))
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(registry.auth_file(tmp_path / "auth.json")))
        yield World(kfp, kube, registry, package, capsys, caplog)
