"""The files of a version in MLflow: stored with a manifest, loaded again and compared with the evaluation.

files.json, beside MLmodel, lists every other file with size and sha256: weights, network, code, MLmodel itself.  The
tag files.sha256 of the version holds the sha256 of files.json, so that a file and its entry cannot change together.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.register import tags as version_tags
from components.register.registry import LOCALISER, Upload
from components.register.version import page
from components.register.version.model import arguments
from components.register.version.package import Package
from components.tracking import artifacts
from components.tracking.problems import problem
from components.tracking.tracker import Tracker
from runtime import manifest
from runtime.errors import Refused, Unreachable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

FILES, FILES_TAG, FILES_SCHEMA = "files.json", "files.sha256", "vgg.version/1"
BOXES_COMPARED = 5  # of an image
PROBABILITY_TOLERANCE = 0.02  # bf16 and batch sizes differ between evaluation and serving


@dataclass
class Packaged:
    """A package as a candidate for registration (components.register.promotion.Candidate)."""

    client: MlflowClient
    name: str
    package: Package
    provenance: dict[str, Any]
    tracker: Tracker

    @property
    def weights_sha256(self) -> str:
        return self.package.trained.weights_sha256

    @property
    def localiser_sha256(self) -> str:
        return self.package.localiser.weights_sha256 if self.package.localiser else ""

    def upload(self) -> Upload:
        """Raises Refused if this machine cannot store files for the server, or what was stored does not serve."""
        run_id = self.tracker.run_id(self.client)
        artifacts.check_destination(self.client, run_id)
        with tempfile.TemporaryDirectory() as scratch:
            model_id, files_sha256 = self._store(Path(scratch), run_id)
        source = f"models:/{model_id}"
        if damage := self._damage(source, files_sha256):
            raise Refused(f"the files of the new version were not stored intact: {damage}; no version registered.")
        result = self.package.evaluation
        evaluation = {
            name: result[name] for name in ("headline", "top1_error", "top5_error", "num_images", "data_digest")
        }
        tags = {
            "weights_sha256": self.weights_sha256,
            FILES_TAG: files_sha256,
            **({LOCALISER: self.localiser_sha256} if self.localiser_sha256 else {}),
            "evaluation": json.dumps(evaluation, sort_keys=True),
            "git.commit": str(self.provenance["code"]["git"]["commit"]),
            "data.digest": self.package.shards.digest,
            "provenance": json.dumps({**self.provenance, "chain": self.package.chain()}, sort_keys=True),
        }
        page.log_metrics(self.client, run_id, model_id, self.package)
        text = page.description(self.package, self.provenance)
        return Upload(source, run_id, version_tags.stored({**page.facts(self.package), **tags}), text, model_id)

    def _store(self, scratch: Path, run_id: str) -> tuple[str, str]:
        """Store the files as a logged model of the run; returns its ID and the sha256 of files.json."""
        import mlflow
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        experiment = self.client.get_run(run_id).info.experiment_id
        logged = self.client.create_logged_model(experiment, self.name, run_id)
        folder = scratch / "model"
        mlflow.pyfunc.save_model(
            path=folder,
            mlflow_model=Model(
                artifact_path=logged.artifact_location, run_id=run_id, model_uuid=logged.model_id,
                model_id=logged.model_id,
            ),
            **arguments(self.package.write(scratch / "files", self.provenance), self.package.probes()[0][0]),
        )  # fmt: skip
        for cache in list(folder.rglob("__pycache__")):
            shutil.rmtree(cache)
        files_sha256 = write_files(folder)
        with artifacts.transfer():
            self.client.log_model_artifacts(logged.model_id, str(folder))
        self.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
        self.client.finalize_logged_model(logged.model_id, "READY")
        return logged.model_id, files_sha256

    def discard(self, upload: Upload) -> None:
        """The logged model is deleted; its files go with the next `mlflow gc`."""
        if upload.model_id:
            self.client.delete_logged_model(upload.model_id)

    def verify(self, version: ModelVersion) -> str:
        return self._damage(f"models:/{self.name}/{version.version}", version.tags.get(FILES_TAG, ""))

    def _damage(self, uri: str, files_sha256: str) -> str:
        """What is wrong with stored files: they differ from their manifest, or do not serve; "" if they are good."""
        with tempfile.TemporaryDirectory() as scratch:
            if not (folder := downloaded(uri, scratch)):
                return "its files are gone"
            try:
                verify_files(folder, files_sha256, self.weights_sha256)
            except Refused as reason:
                return str(reason).replace(f"{folder}/", "").partition(". ")[0]
            served = json.loads((folder / "artifacts/network.json").read_bytes())
            localiser = self.package.localiser
            # a version of an evaluation with other parameters answers as that one; so do its boxes
            same_boxes = localiser and _json(folder / "artifacts/localiser.json") == localiser.description()
            try:
                serving_check(
                    str(folder), self.package, served["evaluate"] == self.package.evaluate_params, bool(same_boxes)
                )
            except Refused as reason:
                return str(reason).replace(f"{folder}/", "")
        return ""


def downloaded(uri: str, scratch: str) -> Path | None:
    """The files of a model, in a folder; None if they are gone."""
    folder = fetched(uri, scratch)
    return folder if folder and (folder / "MLmodel").is_file() else None


def fetched(uri: str, scratch: str) -> Path | None:
    """A file or folder of a model, downloaded; None if it is gone."""
    try:
        return artifacts.download(uri, scratch)
    except Exception as error:  # of any store's library
        if isinstance(found := problem(error), Unreachable):
            raise found from error
        return None


def write_files(folder: Path) -> str:
    """Write files.json of a folder; returns its sha256."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    entries = [manifest.file_entry(folder, name, md5=False) for name in names]
    content = manifest.text(manifest.compose(FILES_SCHEMA, {}, entries))
    manifest.write_atomically(folder / FILES, lambda file: file.write(content))
    return str(manifest.file_entry(folder, FILES, md5=False)["sha256"])


def verify_files(folder: Path, files_sha256: str, weights_sha256: str) -> None:
    """Raises Refused, naming the file, unless all files of a version are as they were stored.

    files_sha256: the version's tag; "" for a version that an earlier edition of this pipeline registered, of which only
    the weights can be verified.
    """
    if not files_sha256:
        weights = folder / "artifacts/weights.safetensors"
        if not weights.is_file() or manifest.file_entry(weights.parent, weights.name)["sha256"] != weights_sha256:
            raise Refused(f"{weights}: missing, or without the sha256 of the version's tag weights_sha256")
        return
    if not (folder / FILES).is_file() or manifest.file_entry(folder, FILES, md5=False)["sha256"] != files_sha256:
        raise Refused(f"{folder / FILES}: missing, or without the sha256 of the version's tag {FILES_TAG}")
    for entry in manifest.parse((folder / FILES).read_bytes(), FILES_SCHEMA, str(folder / FILES))["files"]:
        manifest.verify_file(folder, entry)


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def serving_check(uri: str, package: Package, same_evaluation: bool = True, same_boxes: bool = False) -> None:
    """Load the packaged model as a server does, and compare its answers with the evaluation.

    uri: an address of MLflow, or a folder.  same_evaluation: whether the model is to answer as this evaluation does;
    otherwise it must answer.  same_boxes: whether its boxes are to be those of the package's localiser.
    Raises Refused if it cannot be loaded, if the answers differ, or if the model accepts bytes that are not an image.
    """
    import mlflow
    import pandas as pd

    jpegs, classes, probabilities = package.probes()
    try:
        model = mlflow.pyfunc.load_model(uri)
    except Exception as error:  # of whatever the damaged files contain
        if isinstance(found := problem(error), Unreachable):
            raise found from error
        raise Refused(f"serving check failed: the model cannot be loaded: {error}") from error
    boxes = same_boxes and package.localiser
    answers = model.predict(pd.DataFrame({"image": jpegs}), params={"top_k": BOXES_COMPARED if boxes else 1})
    served = np.array([row[0] for row in answers["classes"]])
    difference = np.abs(np.array([row[0] for row in answers["probabilities"]]) - probabilities)
    near_tie = probabilities < 0.5 + PROBABILITY_TOLERANCE  # another class may be as likely
    if same_evaluation and (((served != classes) & ~near_tie) | (difference > PROBABILITY_TOLERANCE)).any():
        raise Refused(
            f"serving check failed: the packaged model predicts {served.tolist()}, the evaluation {classes.tolist()} "
            f"(probabilities differ by up to {difference.max():.3f})"
        )
    if boxes:
        boxes.compare(package.probe_numbers(), answers["classes"].tolist(), answers["boxes"].tolist())
    try:
        model.predict(pd.DataFrame({"image": [b"not an image"]}))
    except ValueError:  # expected: raised by served.py
        pass
    else:
        raise Refused("serving check failed: the packaged model accepts invalid images")
