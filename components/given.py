"""What a cluster provides: environment variables of every step, and the cluster values of a run, each declared once.

The environment: addresses and limits come from a ConfigMap, secrets by the names of their keys, the rest is fixed.

The cluster values of a run (nodes, GPUs, names of Kubernetes objects) are declared in CLUSTER.  Flags of
components.trainjob, the command of the training component and a part of pipelines.definition.inputs are made from it.
kfp reads literal signatures, so pipeline and component repeat the names; tests/pipelines/test_package.py compares them.
without() takes out of a signature what a pipeline lacks.
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

FIXED = {"HOME": "/tmp", "VGG_CACHE": "/store/cache", "VGG_JOURNAL": "/store/tracking"}  # noqa: S108  # of a container
ADDRESSES = {  # keys of the ConfigMap, and whether they are optional
    "VGG_STORE": False,
    "MLFLOW_TRACKING_URI": False,
    "AWS_ENDPOINT_URL": True,
    "AWS_DEFAULT_REGION": True,
    "AWS_REQUEST_CHECKSUM_CALCULATION": True,
    "AWS_RESPONSE_CHECKSUM_VALIDATION": True,
    "VGG_CACHE_BYTES": True,  # this and the next ones: limits that depend on the site
    "VGG_HANG_SECONDS": True,
    "VGG_S3_PATIENCE_SECONDS": True,
    "VGG_S3_TIMEOUT_SECONDS": True,
}
STORE_SECRET = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
TRACKING_SECRET = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


@dataclass(frozen=True)
class ClusterValue:
    """One value of a run that concerns the cluster and not the science.

    name: argument of the training component; with dashes, flag of components.trainjob.
    kind: int, str, dict or list; the flag takes the last two as JSON.
    default: of the run argument.
    unset: of the flag; None: the flag is required.
    help: meaning, for users.
    run_argument: name for -C, if it differs.
    minimum: of a number.
    every_step: whether the pods of all steps use it, not only the training.
    """

    name: str
    kind: type
    default: Any
    unset: str | None
    help: str
    run_argument: str = ""
    minimum: int | None = None
    every_step: bool = False

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def argument(self) -> str:
        """Name for -C."""
        return self.run_argument or self.name


CLUSTER = {
    value.name: value
    for value in (
        ClusterValue("nodes", int, 1, None, "machines to train on", minimum=1),
        ClusterValue("gpus", int, 1, None, "GPUs of each machine; 0: train on its CPU", minimum=0),
        ClusterValue("gpu_type", str, "nvidia.com/gpu", "nvidia.com/gpu", "Kubernetes resource name of the GPUs"),
        ClusterValue("cpu", str, "16", None, "CPUs of each machine, a Kubernetes quantity", "train_cpu"),
        ClusterValue("memory", str, "64Gi", None, "memory of each machine, a Kubernetes quantity", "train_memory"),
        ClusterValue("node_selector", dict, {}, "{}", "node labels that pods with GPUs require", every_step=True),
        ClusterValue("tolerations", list, [], "[]", "Kubernetes tolerations of pods with GPUs", every_step=True),
        ClusterValue("claim", str, "vgg-store", "", "PersistentVolumeClaim mounted as /store", every_step=True),
        ClusterValue("addresses", str, "vgg-addresses", "", "ConfigMap with addresses and limits", every_step=True),
        ClusterValue("store_secret", str, "vgg-store", "", "Secret with the store's credentials", every_step=True),
        ClusterValue(
            "tracking_secret", str, "vgg-tracking", "", "Secret with the tracking server's credentials", every_step=True
        ),
        ClusterValue("runtime", str, "vgg-train", "vgg-train", "TrainingRuntime, used with several nodes"),
        ClusterValue("image", str, "", "", "container image of training", "train_image"),
    )
}


DEFAULTS = {value.name: value.default for value in CLUSTER.values()}
METAVARS = {int: "N", str: "TEXT", dict: "JSON", list: "JSON"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each cluster value."""
    for value in CLUSTER.values():
        parser.add_argument(
            value.flag,
            type=int if value.kind is int else str,
            required=value.unset is None,
            default=value.unset,
            metavar=METAVARS[value.kind],
            help=f"{value.help} (default {value.unset})" if value.unset else value.help,
        )


def below_minimum(values: Mapping[str, Any]) -> list[ClusterValue]:
    """The numbers that are too small.  values: by name."""
    return [
        value
        for value in CLUSTER.values()
        if value.minimum is not None and values.get(value.name, value.minimum) < value.minimum
    ]


def command(arguments: Mapping[str, Any]) -> list[Any]:
    """The flags of components.trainjob, with these values.  arguments: by name; others are ignored."""
    return [word for value in CLUSTER.values() for word in (value.flag, arguments[value.name])]


def from_run_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The cluster values by name, from run arguments."""
    return {value.name: arguments[value.argument] for value in CLUSTER.values()}


def without(names: Collection[str], function: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline or component without these arguments, which are None then: kfp knows no optional flags.

    kfp reads the signature, and calls a pipeline by position and a component by name.
    """
    signature = inspect.signature(function)
    kept = signature.replace(parameters=[p for name, p in signature.parameters.items() if name not in names])

    @functools.wraps(function)
    def reduced(*values: Any, **named: Any) -> Any:
        return function(**dict.fromkeys(names), **kept.bind(*values, **named).arguments)

    reduced.__signature__ = kept  # type: ignore[attr-defined]
    return reduced
