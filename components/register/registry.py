"""The MLflow model registry: one version per set of weights, one champion.

MLflow has neither compare-and-swap nor idempotent calls, so before a version is created, an existing one is searched by
the sha256 of its weights.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from components.closure import ROOT
from components.register import champion
from components.register.champion import Champion
from components.register.package import Package, requirements
from components.tracking import access, artifacts
from components.tracking.address import shown, tracking_uri
from components.tracking.problems import problem, translated
from components.tracking.tracker import Tracker
from runtime import environment
from runtime.errors import Refused, Unreachable

log = logging.getLogger("vgg.register")

DESCRIPTION = "VGG (arXiv 1409.1556): JPEG bytes to classes"
PREVIOUS = "previous"  # alias of the champion before the last one
PROBABILITY_TOLERANCE = 0.02  # bf16 and batch sizes differ between evaluation and serving


@contextmanager
def open_registry(name: str) -> Iterator[Registry]:
    """Open a registered model, with exclusive use of MLflow in this process.

    Raises Unreachable if the server does not answer, Refused if it refuses: the login, a permission, or for good.
    """
    with access.MLFLOW_LOCK, translated(), _permissions_explained(name):
        yield Registry(name)


@contextmanager
def _permissions_explained(name: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "PERMISSION_DENIED":
            raise
        raise Refused(
            f"MLflow at {shown(tracking_uri())} denies user {environment.TRACKING_USERNAME.get() or '?'} "
            f"a permission on registered model {name!r}: {error}. An administrator can grant MANAGE on it, or "
            "delete it if it is empty: the user who creates a model gets MANAGE."
        ) from error


def read_evaluation(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        needed = {"headline", "modes", "top1_error", "top5_error", "num_images", "weights_sha256", "data_digest"}
        missing = needed - found.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise Refused(f"{path}: not a readable evaluation: {error}. Run the evaluate stage.") from None
    if missing:
        raise Refused(f"{path}: lacks {', '.join(sorted(missing))}. Run the evaluate stage.")
    return dict(found)


class Registry:
    def __init__(self, name: str) -> None:
        self.name = name
        self.client = access.connect()

    def champion(self) -> Champion | None:
        """The version with the alias champion; None if no version has it.  Raises Refused as champion.read does."""
        from mlflow.exceptions import MlflowException

        if not self._exists():
            return None
        try:
            found = self.client.get_model_version_by_alias(self.name, champion.ALIAS)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return champion.read(self.name, found)

    def _exists(self) -> bool:
        """Whether the registered model exists.

        For users who are not administrators, MLflow answers 403 for the alias of a model that does not exist.  Without
        a default permission to read, it also answers 403 for the model itself; then only an attempt to create the model
        distinguishes a hidden one from a missing one.  Its creator gets MANAGE, which the first version requires.
        """
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_registered_model(self.name)
            return True
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            if error.error_code != "PERMISSION_DENIED":
                raise
            hidden = error
        try:
            self.client.create_registered_model(self.name, description=DESCRIPTION)
        except MlflowException as error:
            raise (hidden if error.error_code == "RESOURCE_ALREADY_EXISTS" else error) from None
        return False

    def register(self, package: Package, provenance: dict[str, Any], tracker: Tracker) -> tuple[str, bool]:
        """Returns (version, whether it is new).  A version whose files are gone is not found again."""
        for found in self.client.search_model_versions(f"name = '{self.name}'"):
            if found.tags.get("weights_sha256") != package.trained.weights_sha256:
                continue
            if _has_files(self.name, found.version):
                return str(found.version), False
            log.warning("%s version %s: has the same weights, but its files are gone", self.name, found.version)
        run_id = tracker.run_id(self.client)
        artifacts.check_destination(self.client, run_id)
        return self._create(package, provenance, run_id), True

    def _create(self, package: Package, provenance: dict[str, Any], run_id: str) -> str:
        import mlflow
        import pandas as pd

        example = pd.DataFrame({"image": package.probes()[0][:1]})
        with tempfile.TemporaryDirectory() as scratch, mlflow.start_run(run_id=run_id):
            files = package.write(Path(scratch), provenance)
            logged = mlflow.pyfunc.log_model(
                name=self.name,
                python_model=str(Path(__file__).with_name("served.py")),
                artifacts=files,
                code_paths=[str(ROOT / "vgg"), str(ROOT / "runtime")],
                signature=_signature(),
                input_example=(example, {"top_k": 5}),
                pip_requirements=requirements(),
            )
        serving_check(logged.model_uri, package)
        result = package.evaluation
        evaluation = {
            name: result[name] for name in ("headline", "top1_error", "top5_error", "num_images", "data_digest")
        }
        tags = {
            "weights_sha256": package.trained.weights_sha256,
            "evaluation": json.dumps(evaluation, sort_keys=True),
            "git.commit": str(provenance["code"]["git"]["commit"]),
            "data.digest": package.shards.digest,
            "provenance": json.dumps(provenance, sort_keys=True),
        }
        created = mlflow.register_model(logged.model_uri, self.name, tags=tags)
        self.client.update_registered_model(self.name, DESCRIPTION)
        self.client.update_model_version(self.name, created.version, package.card(provenance))
        return str(created.version)

    def promote(self, version: str, before: Champion | None) -> None:
        if before and before.version != version:
            self.client.set_registered_model_alias(self.name, PREVIOUS, before.version)
        self.client.set_registered_model_alias(self.name, champion.ALIAS, version)


def _has_files(name: str, version: str | int) -> bool:
    """Whether the files of a version are still there; MLflow lists nothing, or fails, if they are not."""
    import mlflow

    try:
        return any(file.path == "MLmodel" for file in mlflow.artifacts.list_artifacts(f"models:/{name}/{version}"))
    except Exception as error:  # of any store's library
        if isinstance(found := problem(error), Unreachable):
            raise found from error
        return False


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    outputs = {
        "classes": DataType.long,
        "wnids": DataType.string,
        "names": DataType.string,
        "probabilities": DataType.double,
    }
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([ColSpec(Array(kind), name) for name, kind in outputs.items()]),
        params=ParamSchema([ParamSpec("top_k", DataType.long, 5)]),
    )


def serving_check(uri: str, package: Package) -> None:
    """Load the packaged model as a server does, and compare its answers with the evaluation.

    Raises Refused if they differ, or if the model accepts bytes that are not an image.
    """
    import mlflow
    import pandas as pd

    jpegs, classes, probabilities = package.probes()
    model = mlflow.pyfunc.load_model(uri)
    answers = model.predict(pd.DataFrame({"image": jpegs}), params={"top_k": 1})
    served = np.array([row[0] for row in answers["classes"]])
    difference = np.abs(np.array([row[0] for row in answers["probabilities"]]) - probabilities)
    near_tie = probabilities < 0.5 + PROBABILITY_TOLERANCE  # another class may be as likely
    if (((served != classes) & ~near_tie) | (difference > PROBABILITY_TOLERANCE)).any():
        raise Refused(
            f"serving check failed: the packaged model predicts {served.tolist()}, the evaluation {classes.tolist()} "
            f"(probabilities differ by up to {difference.max():.3f}); no version registered."
        )
    try:
        model.predict(pd.DataFrame({"image": [b"not an image"]}))
    except ValueError:  # expected: raised by served.py
        pass
    else:
        raise Refused("serving check failed: the packaged model accepts invalid images; no version registered.")
