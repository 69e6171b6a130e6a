"""Where to look at a run: Kubeflow's page of it, and MLflow's."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from vgg import manifest

EXPERIMENT = "vgg-imagenet"  # of MLflow, components/tracking.py
LOOK_SECONDS = 2.0


def kubeflow(ui: str, page: str, name: str) -> str:
    """page: runs or recurringrun."""
    return f"{ui}/#/{page}/details/{name}"


def mlflow(run: Any, tracking_uri: str) -> str:
    """By Kubeflow's own plugin, or else where the run's stages write to; '' if nobody knows of any."""
    plugin = (run.plugins_output or {}).get("mlflow")
    entry = ((plugin and plugin.entries) or {}).get("run_url")
    if entry and entry.value:
        return str(entry.value)
    if not tracking_uri.startswith(("http://", "https://")):
        return ""
    uri = _without_password(tracking_uri).rstrip("/")
    mark = f"tags.`vgg.lineage` = '{lineage(run.run_id)}'"
    if number := _experiment(uri):
        return f"{uri}/#/experiments/{number}/runs?searchFilter={quote(mark, safe='')}"
    return f"{uri}/#/experiments  (experiment {EXPERIMENT}, search: {mark})"


def lineage(run_id: str) -> str:
    """What the stages of a pipeline run have in common in MLflow: components.provenance.lineage."""
    return manifest.digest_of({"pipeline_run": run_id})


def _experiment(uri: str) -> str:
    """MLflow's number of our experiment; '' where it cannot be asked from here, or has none yet."""
    import requests

    try:
        answer = requests.get(
            f"{uri}/api/2.0/mlflow/experiments/get-by-name",
            params={"experiment_name": EXPERIMENT},
            auth=lambda request: request,  # nobody's password is sent to an address of a ConfigMap
            timeout=LOOK_SECONDS,
        )
        return str(answer.json()["experiment"]["experiment_id"])
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return ""


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
