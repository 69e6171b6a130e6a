"""Links to a run's pages in Kubeflow and MLflow."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from runtime import manifest

EXPERIMENT = "vgg-imagenet"  # in MLflow; the same as components.tracking.access.EXPERIMENT
TIMEOUT_SECONDS = 2.0


def kubeflow(ui: str, page: str, name: str) -> str:
    """page: runs or recurringrun."""
    return f"{ui}/#/{page}/details/{name}"


def mlflow(run: Any, tracking_uri: str) -> str:
    """From Kubeflow's MLflow plugin, or else at the tracking URI of the run's stages; '' if neither is known."""
    plugin = (run.plugins_output or {}).get("mlflow")
    entry = ((plugin and plugin.entries) or {}).get("run_url")
    if entry and entry.value:
        return str(entry.value)
    if not tracking_uri.startswith(("http://", "https://")):
        return ""
    uri = _without_password(tracking_uri).rstrip("/")
    query = f"tags.`vgg.lineage` = '{lineage(run.run_id)}'"
    if number := _experiment(uri):
        return f"{uri}/#/experiments/{number}/runs?searchFilter={quote(query, safe='')}"
    return f"{uri}/#/experiments  (experiment {EXPERIMENT}, search: {query})"


def lineage(run_id: str) -> str:
    """Value of the MLflow tag that the stages of a pipeline run share: components.tracking.provenance.lineage."""
    return manifest.digest_of({"pipeline_run": run_id})


def _experiment(uri: str) -> str:
    """MLflow's id of the experiment; '' if MLflow cannot be reached or the experiment does not exist yet."""
    import requests

    try:
        answer = requests.get(
            f"{uri}/api/2.0/mlflow/experiments/get-by-name",
            params={"experiment_name": EXPERIMENT},
            auth=lambda request: request,  # never send credentials from .netrc to an address from a ConfigMap
            timeout=TIMEOUT_SECONDS,
        )
        return str(answer.json()["experiment"]["experiment_id"])
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return ""


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
