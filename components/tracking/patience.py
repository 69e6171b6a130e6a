"""Requests to the registry, repeated for a while if the server fails: only those that may be applied twice."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from components.tracking.problems import problem
from runtime.errors import Problem, Unreachable
from runtime.retry import Outage, Retry

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

T = TypeVar("T")
log = logging.getLogger("vgg.register")

GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's codes for a missing model, version or alias
# several writers of one row at once: of the next number, more often than MLflow tries, or of a new alias
COLLISIONS = ("Model Version creation error", "IntegrityError", "UniqueViolation")
SECONDS = 30.0  # less than the expiry of a lease


class _Answers:
    """Which failures are temporary (runtime.retry.Classifier): a server that does not answer, a database in use."""

    errors = (Exception,)

    def is_temporary(self, error: Exception) -> bool:
        return isinstance(problem(error), Unreachable) or any(text in str(error) for text in COLLISIONS)

    def refusal(self, error: Exception) -> Exception:
        return error  # as MLflow raised it: callers distinguish what is missing

    def gave_up(self, error: Exception, seconds: float) -> Problem:  # noqa: ARG002  # of the protocol
        return problem(error) or Unreachable(str(error))

    def brief(self, error: Exception) -> str:
        return str(problem(error) or error)


def patiently(request: Callable[[], T]) -> T:
    """The answer of a request that may be applied twice.  Raises Unreachable, or what MLflow raised."""
    outage = Outage("MLflow", log, quiet_failures=2)
    return Retry(_Answers(), SECONDS, outage).call(request)  # type: ignore[arg-type]


def find(client: MlflowClient, name: str, description: str = "") -> RegisteredModel | None:
    """A registered model; None if it does not exist.  description: for one that is made to find out.

    For users who are not administrators, MLflow answers 403 for the alias of a model that does not exist.  Without a
    default permission to read, it also answers 403 for the model itself; then only an attempt to create the model
    distinguishes a hidden one from a missing one.  Its creator gets MANAGE, which the first version requires.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        if error.error_code != "PERMISSION_DENIED":
            raise
        hidden = error
    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        raise (hidden if error.error_code == "RESOURCE_ALREADY_EXISTS" else error) from None
    return None


def create_version(client: MlflowClient, name: str, about: str, source: str, **more: Any) -> None:
    """Create a version of a registered model, which is made if it does not exist.  Not to be applied twice.

    about: description of the registered model.
    """
    from mlflow.exceptions import MlflowException

    def create() -> None:
        client.create_model_version(name, source, await_creation_for=0, **more)

    try:
        create()
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"):
            raise
        if find(client, name, about) is None:
            with contextlib.suppress(MlflowException):  # another process was faster, or create() says what is wrong
                client.create_registered_model(name, description=about)
        create()
