"""The models that classify takes: a version in the registry, with the code it was made with, or a finished training."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.classify import answering
from components.tracking.patience import GONE
from components.weights import origin
from runtime.errors import Refused, WrongParameters
from runtime.wording import some

if TYPE_CHECKING:
    from mlflow import MlflowClient

URI = re.compile(r"models:/+(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")
MAX_PIXELS = 50_000_000  # of an image, for a training, which has no limit of its own


def answers(model: str, files: list[str], top_k: int) -> Iterator[dict[str, Any]]:
    """See answering.answers.

    Raises WrongParameters for a model that does not exist, Unreachable if MLflow does not answer, Refused if the model
    is damaged, not finished, or cannot be loaded.
    """
    if model.partition(":")[0] in ("models", "runs", "mlflow-artifacts"):
        with tempfile.TemporaryDirectory() as scratch:
            yield from _of_version(model, _downloaded(model, scratch), files, top_k)
    elif (Path(model) / "MLmodel").is_file():  # a version that somebody has downloaded
        yield from _of_version(model, Path(model), files, top_k)
    else:
        yield from _of_training(model, files, top_k)


def _downloaded(uri: str, scratch: str) -> Path:
    from components.tracking import access, artifacts
    from components.tracking.problems import translated

    match = URI.fullmatch(uri)
    if not match:
        raise WrongParameters(f"{uri}: write models:/NAME@ALIAS or models:/NAME/VERSION, or a finished checkpoint")
    client = access.connect(create=False)
    with access.MLFLOW_LOCK, translated():
        version = _version(client, match["name"], match["alias"], match["version"] or "")
        try:
            return artifacts.download(f"models:/{match['name']}/{version}", scratch)
        except OSError as error:
            if error.filename and str(error.filename).startswith(scratch):
                raise  # this disk, not the store
            raise Refused(f"{uri}: the files of version {version} are gone: {error}. Register it again.") from error


def _version(client: MlflowClient, name: str, alias: str | None, version: str) -> str:
    from mlflow.exceptions import MlflowException

    from components.tracking.address import shown, tracking_uri

    where = f"MLflow at {shown(tracking_uri())}"
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
        return str(found.version)
    except MlflowException as error:
        if error.error_code not in GONE:
            raise
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = [model.name for model in client.search_registered_models(max_results=100)]
        others = f"; it has {some(names)}" if names else " and no other; make run registers one"
        raise WrongParameters(f"{where} has no model {name!r}{others}") from None
    versions = sorted((int(v.version) for v in client.search_model_versions(f"name = '{name}'")), reverse=True)
    known = [*(f"{name}@{alias}" for alias in aliases), *(f"{name}/{number}" for number in versions)]
    wanted = f"@{alias}" if alias else f"/{version}"
    raise WrongParameters(f"{where} has no {name}{wanted}; it has {some(known) or 'no version of that name'}")


def _of_version(name: str, folder: Path, files: list[str], top_k: int) -> Iterator[dict[str, Any]]:
    """From a process of its own, in which the version's code is the only vgg."""
    asked = {"model": str(folder.absolute()), "files": files, "top_k": top_k}
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MLFLOW_RUN_ID")}
    command = [sys.executable, "-P", answering.__file__]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, encoding="utf-8",
        errors="replace",
    ) as child:  # fmt: skip
        assert child.stdin and child.stdout
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:
                json.dump(asked, child.stdin)
            missing = len(files)
            for line in child.stdout:
                answer = json.loads(line)
                if "failure" in answer:
                    raise Refused(
                        f"{name}: the model cannot be loaded: {answer['failure']}. Its packages are in its "
                        "requirements.txt; if files are damaged, register it again."
                    )
                missing -= 1
                yield answer
            if child.wait() or missing:
                log.seek(0)
                last = log.read().strip().rpartition("\n")[2]
                raise Refused(f"{name}: the model ended with exit code {child.returncode}: {last[:300]}")
        finally:
            child.kill()


def _of_training(folder: str, files: list[str], top_k: int) -> Iterator[dict[str, Any]]:
    """As the paper tests a single scale (§4.1): dense at Q = S, or the middle of a range; mirrored if trained so.

    An imported network at the scale of the publishers' figures, not mirrored.
    """
    from components.register.version.package import description
    from runtime.cores import usable_cores
    from runtime.store.place import downloaded
    from vgg.evaluation.classifier import Classifier
    from vgg.network.trained import Trained
    from vgg.params.evaluate import at_one_scale
    from vgg.params.train import TrainParams

    trained = Trained.open(downloaded(folder))
    origin.expect_classifier(trained.manifest, folder)
    if record := origin.imported(trained.manifest):
        scale, flip, ceil_pooling = origin.publishers_scale(trained.manifest), False, record["ceil_pooling"]
    else:
        params = TrainParams.model_validate_json(json.dumps(trained.manifest["run"]["train"]))
        scale, flip, ceil_pooling = params.validation_scale, params.flip, False
    evaluate = {**at_one_scale(scale, flip).model_dump(), "ceil_pooling": ceil_pooling}
    classifier = Classifier.of(description(trained, evaluate, MAX_PIXELS), trained.step.weights(), usable_cores())
    yield from answering.answers(lambda images: classifier.answers(images, top_k), files)
