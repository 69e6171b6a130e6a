"""The TrainJob of a training on several nodes, as Kubeflow Trainer 2.2 and later take it.

Image, command and pool of nodes are said here; what is the same for all (/dev/shm, user, restarts) is in the
TrainingRuntime that deploy/ ships.  Secrets and addresses go by name, never by value.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import PurePosixPath
from typing import Any

from components import given
from vgg import manifest
from vgg.errors import WrongParameters

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
MANAGER = "vgg.imagenet/train"  # who made a patch of the runtime: Trainer wants a name like a domain's
NODE = "node"  # the runtime's replicated job, and the container in it
LABELS = {"app.kubernetes.io/part-of": "vgg-imagenet", "vgg.stage": "train"}
RUN_LABEL = "vgg.pipeline-run"
SCRATCH = "/tmp"  # noqa: S108  # an emptyDir of the runtime

FROM_ADDRESSES = [name for name in given.ADDRESSES if not name.startswith("VGG_")]  # those the step passes on
FIXED = {**given.FIXED, "VGG_STORE": "/store"}
# what the step has been told and its nodes have to know; addresses and numbers, no secrets
PASSED_ON = (
    "VGG_STORE", "VGG_CACHE", "VGG_JOURNAL", "VGG_PIPELINE_RUN", "VGG_CACHE_BYTES", "VGG_HANG_SECONDS", "VGG_WORKERS",
    "VGG_S3_PATIENCE_SECONDS", "VGG_S3_TIMEOUT_SECONDS", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID",
)  # fmt: skip
OUTPUTS = ("--curves", "--metrics")  # of the step, in folders that only its own pod has
EXECUTOR_INPUT = "--executor-input"  # of the step itself


def body(args: argparse.Namespace) -> dict[str, Any]:
    """The whole object, but for its owner.  args: components.train.job's.  Raises WrongParameters."""
    spec = {
        "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": args.runtime},
        "trainer": {
            "image": args.image,
            "command": ["python", "-m", "components.launch"],
            "args": ["--nodes", str(args.nodes), str(processes(args.gpus)), args.module, *for_nodes(args.arguments)],
            "env": environment(args),
            "numNodes": args.nodes,
            "numProcPerNode": processes(args.gpus),
            "resourcesPerNode": resources(args),
        },
        "runtimePatches": [patch(args)],
    }
    run = os.environ.get("VGG_PIPELINE_RUN", "")
    labels = {**LABELS, RUN_LABEL: run} if re.fullmatch(r"[a-zA-Z0-9]([-\w.]{0,61}[a-zA-Z0-9])?", run) else LABELS
    # by content, so that a step that runs again finds the job it has made; short, because pods are called after it
    name = f"vgg-{manifest.digest_of({'run': run, 'spec': spec})[:16]}"
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
    }


def processes(gpus: int) -> int:
    """On a node: one a GPU, and one on a node without."""
    return max(gpus, 1)


def for_nodes(arguments: list[str]) -> list[str]:
    """The program's arguments in the nodes' pods, which have the store in common with the step and nothing else.

    The step itself writes what Kubeflow collects from it; the nodes' own copies go to their scratch folder.
    """
    kept: list[str] = []
    for flag, value in _pairs(arguments):
        if flag in OUTPUTS and value is not None:
            kept += [flag, f"{SCRATCH}/{PurePosixPath(value).name}"]
        elif flag != EXECUTOR_INPUT:
            kept += [flag] if value is None else [flag, value]
    return kept


def _pairs(arguments: list[str]) -> list[tuple[str, str | None]]:
    """Arguments with the value of those flags that matter here, written --flag VALUE or --flag=VALUE."""
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
    """Requests are limits: what is measured is what was asked for, and no neighbour takes it away."""
    wanted = {"cpu": args.cpu, "memory": args.memory}
    if args.gpus:
        wanted[args.gpu_type] = str(args.gpus)
    return {"requests": dict(wanted), "limits": dict(wanted)}


def environment(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Fixed ones by value, the others as references that may be missing."""
    values = {**FIXED, "VGG_IMAGE": args.image}
    values |= {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    env: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in sorted(values.items())]
    for source, reference, names in (
        ("configMapKeyRef", args.addresses, FROM_ADDRESSES),
        ("secretKeyRef", args.store_secret, given.STORE_SECRET),
        ("secretKeyRef", args.tracking_secret, given.TRACKING_SECRET),
    ):
        for name in names if reference else ():
            env.append({"name": name, "valueFrom": {source: {"name": reference, "key": name, "optional": True}}})
    return env


def patch(args: argparse.Namespace) -> dict[str, Any]:
    """What a TrainJob may say of its pods only as a patch of the runtime: store, node pool, labels."""
    pod: dict[str, Any] = {}
    if args.claim:
        pod["volumes"] = [{"name": "store", "persistentVolumeClaim": {"claimName": args.claim}}]
        pod["containers"] = [{"name": NODE, "volumeMounts": [{"name": "store", "mountPath": "/store"}]}]
    if selector := node_selector(args.node_selector):
        pod["nodeSelector"] = selector
    if tolerated := tolerations(args.tolerations):
        pod["tolerations"] = tolerated
    template = {"metadata": {"labels": LABELS}, **({"spec": pod} if pod else {})}
    job = {"name": NODE, "template": {"spec": {"template": template}}}
    return {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}


def node_selector(text: str) -> dict[str, str]:
    """Raises WrongParameters unless it is a JSON object of texts."""
    value = _json("--node-selector", text)
    if not isinstance(value, dict) or not all(isinstance(label, str) for label in value.values()):
        raise WrongParameters(
            f"--node-selector: {text} is no JSON object of texts, such as "
            '{"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}'
        )
    return value


def tolerations(text: str) -> list[dict[str, Any]]:
    """Raises WrongParameters unless it is a JSON list of Kubernetes' tolerations."""
    known = {"key", "operator", "value", "effect", "tolerationSeconds"}
    value = _json("--tolerations", text)
    if not isinstance(value, list) or not all(isinstance(one, dict) and one.keys() <= known for one in value):
        raise WrongParameters(
            f"--tolerations: {text} is no JSON list of Kubernetes' tolerations, such as "
            '[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]'
        )
    for one in value:
        seconds = one.get("tolerationSeconds")
        if isinstance(seconds, float) and seconds.is_integer():  # Kubeflow's numbers are floats
            one["tolerationSeconds"] = int(seconds)
    return value


def _json(flag: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise WrongParameters(f"{flag}: {text!r} is not JSON ({error})") from None
