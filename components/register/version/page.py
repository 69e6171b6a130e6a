"""What MLflow's pages of a model version and its run show: a short description, metrics on the data set, a link."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from components.evaluate.table import headline, markdown
from components.register.version.package import Package
from components.tracking.names import results
from components.tracking.tracker import Tracker
from components.weights import origin

if TYPE_CHECKING:
    from mlflow import MlflowClient


def log_metrics(client: MlflowClient, run_id: str, model_id: str, package: Package) -> None:
    """Log the evaluation as metrics of the model on the shards, which the pages of the model and its versions show."""
    from mlflow.entities import Metric

    evaluation, now = package.evaluation, int(time.time() * 1000)
    values = results({name: evaluation[name] for name in ("top1_error", "top5_error")})
    dataset, digest = package.shards.manifest["dataset"], package.shards.digest
    metrics = [Metric(name, value, now, 0, model_id, dataset, digest, run_id) for name, value in values.items()]
    client.log_batch(run_id, metrics=metrics)


def facts(package: Package) -> dict[str, str]:
    """The result as tags, which the lists and the page of versions show; the metrics are on the page of the model."""
    evaluation = package.evaluation
    return {
        "top1_error": f"{100 * evaluation['top1_error']:.2f} %",
        "top5_error": f"{100 * evaluation['top5_error']:.2f} %",
        "evaluated_on": f"{evaluation['num_images']:,} images of {package.shards.manifest['dataset']}",
        **_boxes(package),
    }


def _boxes(package: Package) -> dict[str, str]:
    if not package.localiser:
        return {}
    return {"class_given_error": f"{100 * package.localiser.content['metrics']['class_given_error']:.2f} %"}


def description(package: Package, provenance: dict[str, Any]) -> str:
    """The result first, because lists cut it; the whole card is a file of the version."""
    network, git = package.trained.manifest["network"], provenance["code"]["git"]
    record = origin.imported(package.trained.manifest)
    source = f", {origin.in_words(record)}" if record else ""
    commit = f", commit {str(git['commit'])[:12]}{' with changes' if git['dirty'] else ''}" if git["commit"] else ""
    boxes = "Output: classes with boxes. " if package.localiser else ""
    return (
        f"{headline(package.evaluation, package.shards.manifest['dataset'])}. VGG, configuration "
        f"{network['configuration']}{' with batch norm' if network['batch_norm'] else ''}, {network['num_classes']} "
        f"classes, {network['input_size']} pixels{source}{commit}. Input: the bytes of a JPEG. {boxes}"
        "More in MODEL_CARD.md."
    )


def link(client: MlflowClient, tracker: Tracker, name: str, version: str, package: Package) -> None:
    """Put the version into the note of the pipeline run, and its model among the run's models."""
    text = markdown(package.evaluation, package.shards.manifest["dataset"])
    tracker.note(f"{text}\nModel: [{name} version {version}](#/models/{name}/versions/{version})\n")
    scheme, _, model_id = str(client.get_model_version(name, version).source).partition("models:/")
    if not scheme and model_id:
        tracker.model(model_id)
        versions = [
            {"name": name, "version": int(version)}
        ]  # as mlflow.register_model does: the pages of runs link them
        client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps(versions)})
