"""The TrainJob of a training on several nodes, for Kubeflow Trainer 2.2 and later.

It sets image, command and node pool; settings shared by all TrainJobs (/dev/shm, user, restarts) are in the
TrainingRuntime in deploy/.  Secrets and addresses are referenced by name, never copied.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import PurePosixPath
from typing import Any

from components import given
from runtime import environment, manifest
from runtime.errors import WrongParameters

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
MANAGER = "vgg.imagenet/train"  # of a patch of the runtime; Trainer requires a domain-like name
NODE = "node"  # the runtime's replicated job, and the container in it
LABELS = {"app.kubernetes.io/part-of": "vgg-imagenet", "vgg.stage": "train"}
RUN_LABEL = "vgg.pipeline-run"  # pipelines.preflight.cluster finds the pods by it
SCRATCH = "/tmp"  # noqa: S108  # an emptyDir of the runtime

FROM_ADDRESSES = [name for name in given.ADDRESSES if not name.startswith("VGG_")]  # the step passes the others on
FIXED = {**given.FIXED, "VGG_STORE": "/store"}
# variables that the step passes on to its nodes: addresses and numbers, no secrets
PASSED_ON = (
    "VGG_STORE", "VGG_CACHE", "VGG_JOURNAL", "VGG_PIPELINE_RUN", "VGG_CACHE_BYTES", "VGG_HANG_SECONDS", "VGG_WORKERS",
    "VGG_S3_PATIENCE_SECONDS", "VGG_S3_TIMEOUT_SECONDS", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID",
)  # fmt: skip
OUTPUTS = ("--curves", "--metrics")  # flags with paths that exist only in the step's pod
EXECUTOR_INPUT = "--executor-input"  # for the step only


def body(args: argparse.Namespace) -> dict[str, Any]:
    """The complete object except its owner.  args: of components.trainjob.  Raises WrongParameters."""
    run = environment.PIPELINE_RUN.get()
    labels = {**LABELS, RUN_LABEL: run} if re.fullmatch(r"[a-zA-Z0-9]([-\w.]{0,61}[a-zA-Z0-9])?", run) else LABELS
    spec = {
        "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": args.runtime},
        "trainer": {
            "image": args.image,
            "command": ["python", "-m", "components.launch"],
            "args": ["--nodes", str(args.nodes), str(processes(args.gpus)), args.module, *for_nodes(args.arguments)],
            "env": pod_environment(args),
            "numNodes": args.nodes,
            "numProcPerNode": processes(args.gpus),
            "resourcesPerNode": resources(args),
        },
        "runtimePatches": [patch(args, labels)],
    }
    # from the content, so that a step that runs again finds its job; short, because pod names contain it
    name = f"vgg-{manifest.digest_of({'run': run, 'spec': spec})[:16]}"
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
    }


def processes(gpus: int) -> int:
    """Per node: one per GPU, or one without GPUs."""
    return max(gpus, 1)


def for_nodes(arguments: list[str]) -> list[str]:
    """The program's arguments in the nodes' pods, which share only the store with the step.

    The step writes the outputs that Kubeflow collects; the nodes write theirs to a scratch folder.
    """
    result: list[str] = []
    for flag, value in _pairs(arguments):
        if flag in OUTPUTS and value is not None:
            result += [flag, f"{SCRATCH}/{PurePosixPath(value).name}"]
        elif flag != EXECUTOR_INPUT:
            result += [flag] if value is None else [flag, value]
    return result


def _pairs(arguments: list[str]) -> list[tuple[str, str | None]]:
    """Arguments; those of OUTPUTS and EXECUTOR_INPUT with their values, from --flag VALUE or --flag=VALUE."""
    pairs: list[tuple[str, str | None]] = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag not in (*OUTPUTS, EXECUTOR_INPUT):
            pairs.append((argument, None))
        else:
            pairs.append((flag, value if equals else next(rest, None)))
    return pairs


def resources(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Requests equal limits, so that other pods cannot take the resources, and throughput is reproducible."""
    amounts = {"cpu": args.cpu, "memory": args.memory}
    if args.gpus:
        amounts[args.gpu_type] = str(args.gpus)
    return {"requests": dict(amounts), "limits": dict(amounts)}


def pod_environment(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Fixed variables by value, the others as optional references."""
    values = {**FIXED, "VGG_IMAGE": args.image}
    values |= environment.passed_on(PASSED_ON)
    env: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in sorted(values.items())]
    for source, reference, names in (
        ("configMapKeyRef", args.addresses, FROM_ADDRESSES),
        ("secretKeyRef", args.store_secret, given.STORE_SECRET),
        ("secretKeyRef", args.tracking_secret, given.TRACKING_SECRET),
    ):
        for name in names if reference else ():
            env.append({"name": name, "valueFrom": {source: {"name": reference, "key": name, "optional": True}}})
    return env


def patch(args: argparse.Namespace, labels: dict[str, str]) -> dict[str, Any]:
    """Pod settings that a TrainJob can make only by patching the runtime: store, node pool, labels."""
    pod: dict[str, Any] = {}
    if args.claim:
        pod["volumes"] = [{"name": "store", "persistentVolumeClaim": {"claimName": args.claim}}]
        pod["containers"] = [{"name": NODE, "volumeMounts": [{"name": "store", "mountPath": "/store"}]}]
    if selector := node_selector(args.node_selector):
        pod["nodeSelector"] = selector
    if tolerated := tolerations(args.tolerations):
        pod["tolerations"] = tolerated
    template = {"metadata": {"labels": labels}, **({"spec": pod} if pod else {})}
    job = {"name": NODE, "template": {"spec": {"template": template}}}
    return {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}


def node_selector(text: str) -> dict[str, str]:
    """Raises WrongParameters unless it is a JSON object of strings."""
    value = _json("--node-selector", text)
    if not isinstance(value, dict) or not all(isinstance(label, str) for label in value.values()):
        raise WrongParameters(
            f"--node-selector: {text} must be a JSON object of strings, such as "
            '{"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}'
        )
    return value


def tolerations(text: str) -> list[dict[str, Any]]:
    """Raises WrongParameters unless it is a JSON list of Kubernetes tolerations."""
    known = {"key", "operator", "value", "effect", "tolerationSeconds"}
    value = _json("--tolerations", text)
    if not isinstance(value, list) or not all(isinstance(one, dict) and one.keys() <= known for one in value):
        raise WrongParameters(
            f"--tolerations: {text} must be a JSON list of Kubernetes tolerations, such as "
            '[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]'
        )
    for one in value:
        seconds = one.get("tolerationSeconds")
        if isinstance(seconds, float) and seconds.is_integer():  # Kubeflow sends all numbers as floats
            one["tolerationSeconds"] = int(seconds)
    return value


def _json(flag: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise WrongParameters(f"{flag}: {text!r} is not JSON ({error})") from None
