"""Command-line flags of the programs that talk to Kubeflow: pipelines.submit and pipelines.prove."""

from __future__ import annotations

import argparse
from typing import Any

Flags = argparse.ArgumentParser | argparse._ArgumentGroup


def add_connection(flags: Flags) -> None:
    """Where Kubeflow is, and who asks: what pipelines.submit.connect() and the preflight take."""
    flags.add_argument("--host", metavar="URL", help="Kubeflow Pipelines' API ($KF_PIPELINES_ENDPOINT)")
    flags.add_argument("--token-file", metavar="FILE", help="file with a bearer token")
    flags.add_argument("--namespace", metavar="NS", help="namespace of the runs (kubeflow; with profiles, yours)")
    flags.add_argument("--service-account", metavar="NAME", help="service account of the pods (Kubeflow's default)")
    flags.add_argument("--kube-context", metavar="NAME", help="kubeconfig context (the current one)")


def add_image_check(flags: Flags) -> None:
    flags.add_argument("--no-image-check", action="store_true", help="images are already loaded into the nodes")


def add_pace(flags: Flags, poll: float, patience: float) -> None:
    """poll, patience: the defaults, seconds."""
    seconds: dict[str, Any] = {"type": float, "metavar": "S"}
    flags.add_argument("--poll", default=poll, **seconds, help=f"seconds between two queries ({poll:g})")
    flags.add_argument(
        "--patience", default=patience, **seconds, help=f"give up after S seconds without an answer ({patience:g})"
    )
