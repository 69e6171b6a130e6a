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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.closure import ROOT
from components.register.package import Package, requirements
from components.tracking import server
from components.tracking.tracker import Tracker
from runtime import environment
from runtime.errors import Refused, Unreachable

if TYPE_CHECKING:
    from mlflow.exceptions import MlflowException

log = logging.getLogger("vgg.register")

DESCRIPTION = "VGG (arXiv 1409.1556): JPEG bytes to classes"
CHAMPION, PREVIOUS = "champion", "previous"
PROBABILITY_TOLERANCE = 0.02  # bf16 and batch sizes differ between evaluation and serving


@dataclass(frozen=True)
class Champion:
    version: str
    weights_sha256: str
    evaluation: dict[str, Any]


@contextmanager
def open_registry(name: str) -> Iterator[Registry]:
    """Open a registered model, with exclusive use of MLflow in this process.

    Raises Unreachable if the server cannot be reached, Refused if it refuses the credentials or denies a permission.
    """
    with server.MLFLOW_LOCK, _translate_errors(name):
        yield Registry(name)


@contextmanager
def _translate_errors(name: str) -> Iterator[None]:
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    try:
        yield
    except (requests.exceptions.ConnectionError, OperationalError) as error:
        raise Unreachable(
            f"MLflow at {server.tracking_uri()}: {error}. Start it, or set MLFLOW_TRACKING_URI."
        ) from error
    except MlflowException as error:
        if error.error_code == "UNAUTHENTICATED":
            raise Refused(
                f"MLflow at {server.tracking_uri()} refuses the credentials: check MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD (on a cluster, the secret vgg-tracking)."
            ) from error
        if error.error_code == "PERMISSION_DENIED":
            raise Refused(
                f"MLflow at {server.tracking_uri()} denies user {environment.TRACKING_USERNAME.get() or '?'} "
                f"a permission on registered model {name!r}: {error}. An administrator can grant MANAGE on it, or "
                "delete it if it is empty: the user who creates a model gets MANAGE."
            ) from error
        if _is_network_error(error):
            raise Unreachable(
                f"MLflow at {server.tracking_uri()}: {error}. Start it, or set MLFLOW_TRACKING_URI."
            ) from error
        raise


def _is_network_error(error: MlflowException) -> bool:
    """Whether the server was not reached, or a proxy answered instead (without JSON, so no RestException)."""
    import requests
    from mlflow.exceptions import RestException

    if isinstance(error.__cause__ or error.__context__, requests.exceptions.RequestException):
        return True
    by_http = server.tracking_uri().startswith("http")
    return by_http and not isinstance(error, RestException) and error.get_http_status_code() >= 500  # type: ignore[no-untyped-call]


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
        self.client = server.connect()

    def champion(self) -> Champion | None:
        """The version with the alias champion; None if no version has it yet."""
        from mlflow.exceptions import MlflowException

        if not self._exists():
            return None
        try:
            found = self.client.get_model_version_by_alias(self.name, CHAMPION)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return Champion(found.version, found.tags["weights_sha256"], json.loads(found.tags["evaluation"]))

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
        """Returns (version, whether it is new)."""
        for found in self.client.search_model_versions(f"name = '{self.name}'"):
            if found.tags.get("weights_sha256") == package.trained.weights_sha256:
                return found.version, False
        return self._create(package, provenance, tracker.run_id(self.client)), True

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

    def promote(self, version: str, champion: Champion | None) -> None:
        if champion and champion.version != version:
            self.client.set_registered_model_alias(self.name, PREVIOUS, champion.version)
        self.client.set_registered_model_alias(self.name, CHAMPION, version)


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
