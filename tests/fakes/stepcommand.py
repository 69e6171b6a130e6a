"""The command of a step as Kubeflow's launcher starts it, with a folder of this machine instead of /s3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kfplauncher

from pipelines.definition.package import Package


def command_of(package: Package, name: str, given: dict[str, Any], folder: Path) -> list[str]:
    """given: values of the input parameters.  Outputs go to `folder`; of inputs, the evaluation is in ../m there."""
    container = package.spec["deploymentSpec"]["executors"][f"exec-{name}"]["container"]
    words = [word.replace("pipelinechannel--", "") for word in (*container["command"], *container["args"])]
    assert not kfplauncher.unknown(words)
    found = kfplauncher.command(words, _executor_input(package, name, given, folder))
    return [word.removeprefix("/s3") if word.startswith(f"/s3{folder.parent}") else word for word in found]


def _executor_input(package: Package, name: str, given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the driver gives the launcher."""
    outputs = package.spec["components"][f"comp-{name}"]["outputDefinitions"]
    artifacts = {n: {"artifacts": [{"uri": f"s3:/{folder}/{n}"}]} for n in outputs.get("artifacts", {})}
    evaluation = {"evaluation": {"artifacts": [{"uri": f"s3:/{folder.parent}/m/evaluate.json"}]}}
    return {
        "inputs": {"parameterValues": given, "artifacts": evaluation if name == "register" else {}},
        "outputs": {
            "parameters": {n: {"outputFile": f"{folder}/{n}.txt"} for n in outputs.get("parameters", {})},
            "artifacts": artifacts,
            "outputFile": f"{folder}/{name}-output.json",
        },
    }
