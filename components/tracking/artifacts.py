"""Storing the files of a run where MLflow's server wants them: in the server, in an object store, in a folder."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from components.tracking import access
from components.tracking.access import EXPERIMENT, ask
from components.tracking.address import shown, tracking_uri
from components.tracking.problems import SERVES_NO_ARTIFACTS, judge, problem
from runtime.errors import Refused

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRANSFER_SECONDS = 600
CURE = (
    "Start the server with --artifacts-destination and without --no-serve-artifacts, so that it stores them itself, "
    f"and rename experiment {EXPERIMENT}, which keeps its old location."
)


def store(client: MlflowClient, run_id: str, path: str, folder: str) -> None:
    """Store a file in a folder of the run.  Raises Problem if that fails."""
    check_destination(client, run_id)
    try:
        client.log_artifact(run_id, path, folder)
    except Exception as error:  # of any store's library
        raise problem(error) or _unusable(client.get_run(run_id).info.artifact_uri, str(error)) from error


@contextlib.contextmanager
def transfer() -> Iterator[None]:
    """While the files of a model go to or from the server, requests may take TRANSFER_SECONDS.

    A server answers when its store has all of a file, or begins to when it has fetched all of it: a VGG-16 of 553 MB at
    100 Mbit/s takes 45 s.  A timeout that the user has set is kept.  In the main thread.
    """
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as TIMEOUT

    before = TIMEOUT.get()  # type: ignore[no-untyped-call]
    TIMEOUT.set(TRANSFER_SECONDS if before == access.REQUEST_SECONDS else before)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        TIMEOUT.set(before)  # type: ignore[no-untyped-call]


def download(uri: str, folder: str) -> Path:
    """Download a model of the registry, or one of its files, to the folder.  Raises what the store's library does."""
    import mlflow

    with transfer():
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder))


def check_destination(client: MlflowClient, run_id: str) -> None:
    """Raises Refused if this machine cannot store files of the run where the server wants them.

    A folder of the server's disk is good only if it is the same folder here: MLflow's client would write them to this
    machine's disk, without an error, and the server would never see them.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.utils.uri import is_local_uri

    uri, by_http = client.get_run(run_id).info.artifact_uri, tracking_uri().startswith("http")
    try:
        get_artifact_repository(uri)
    except ImportError as error:
        raise _unusable(uri, f"{error}; install the package here, or let the server store them") from error
    except Exception as error:
        raise _unusable(uri, str(error)) from error
    if by_http and is_local_uri(uri):  # type: ignore[no-untyped-call]
        _check_shared(uri, run_id)
    elif by_http and uri.startswith("mlflow-artifacts:/") and not urlsplit(uri).netloc:
        path = quote(urlsplit(uri).path.lstrip("/"))
        answer = ask(tracking_uri(), f"/api/2.0/mlflow-artifacts/artifacts?path={path}")
        if SERVES_NO_ARTIFACTS in answer.text:
            raise Refused(f"{judge(tracking_uri(), answer.status_code, answer.text)}. {CURE}")


def _check_shared(uri: str, run_id: str) -> None:
    """Raises Refused unless the server sees a file that is written to the folder here."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    folder = Path(local_file_uri_to_path(uri))  # type: ignore[no-untyped-call]
    marker, created = folder / f"vgg-{uuid.uuid4().hex}", [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
        seen = marker.name in ask(tracking_uri(), f"/api/2.0/mlflow/artifacts/list?run_id={quote(run_id)}").text
    except OSError as error:
        raise _unusable(uri, f"a folder of the server, and here: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            marker.unlink()
            for path in created:
                path.rmdir()
    if not seen:
        raise _unusable(uri, "a folder of the server's own disk, which this machine does not share")


def _unusable(uri: str, reason: str) -> Refused:
    return Refused(f"MLflow at {shown(tracking_uri())}: files cannot be stored at {shown(uri)}: {reason}. {CURE}")
