"""Access to MLflow: a client for an address that is valid, and the first questions to a server."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from components.tracking.address import shown, tracking_uri
from components.tracking.problems import OLDEST_SERVER, database_problem, judge, translated
from runtime import filesystem
from runtime.errors import Refused, WrongParameters

if TYPE_CHECKING:
    import requests
    from mlflow import MlflowClient

EXPERIMENT = "vgg-imagenet"
CONNECT_SECONDS = 10
REQUEST_SECONDS = 10  # of a request that carries no file
MLFLOW_LOCK = threading.Lock()  # held while MLflow is imported or called: its lazy imports are not thread-safe


def connect(create: bool = True) -> MlflowClient:
    """A client that gives up soon, because events that fail stay in the journal.

    create: whether a database file that does not exist is made; otherwise it is refused.
    Raises WrongParameters for a wrong address, Unreachable if the server does not answer, Refused if it never will: it
    is no MLflow server, it is too old, it refuses the login, the certificate or the host name.
    """
    uri = set_environment()
    if not create and uri.startswith("sqlite") and not database_file(uri).exists():
        raise Refused(f"{shown(uri)}: there is no such database. Set MLFLOW_TRACKING_URI.")
    # MLFLOW_RUN_ID is read by our code, once; the library would delete it, or start another run with it
    import mlflow

    for noisy in ("alembic", "mlflow"):  # the import sets their levels
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises too
    if uri.startswith("http"):
        _greet(uri)
    elif uri.startswith("sqlite"):
        _check_sqlite(uri)
    else:
        _check_database(uri)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with translated(), _one_process(uri):
        return mlflow.MlflowClient()


def set_environment() -> str:
    """Set what MLflow's client reads, or would set itself, unless the user has; returns the address.

    Called in the main thread, before another one uses the client.

    A variable that another thread adds moves the environment, and a process that is started at that moment fails: its
    execve, after a vfork, reads the old one (EFAULT, about which multiprocessing is silent).
    Its own limits are seven retries, which take four minutes, of 120 s each.  Raises WrongParameters as tracking_uri().
    """
    uri = tracking_uri()
    defaults = {
        "MLFLOW_TRACKING_URI": uri, "MLFLOW_REGISTRY_URI": uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_SECONDS), "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # files go through the server: it would sign addresses of its store, which it may reach by a name that is not
        # known here, and then each file fails for minutes
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false", "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    }  # fmt: skip
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it logs every retry
    return uri


@contextlib.contextmanager
def _one_process(uri: str) -> Iterator[None]:
    """Only one process at a time creates the tables of a database file: two at once leave it unusable for ever."""
    if not uri.startswith("sqlite"):
        yield
        return
    with open(f"{database_file(uri)}.lock", "ab") as file:
        filesystem.lock(file, wait=True)
        yield


def database_file(uri: str) -> Path:
    """The file of an address sqlite:///…."""
    return Path(unquote(uri.partition(":///")[2].partition("?")[0]))


def _greet(uri: str) -> None:
    """Ask the API first: a proxy may protect or hide /version.  (A server checks no host name for /version.)"""
    answer = ask(uri, f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={quote(EXPERIMENT)}")
    if not (is_json(answer) and answer.status_code in (200, 404)):
        raise judge(uri, answer.status_code, answer.text, answer.headers.get("Location", ""))
    answer = ask(uri, "/version")
    number = re.fullmatch(r"\s*(\d+)\.\d+\S*\s*", answer.text)
    if answer.status_code == 200 and number and int(number[1]) < OLDEST_SERVER:
        raise Refused(
            f"MLflow at {shown(uri)} is version {answer.text.strip()}, which is too old: {OLDEST_SERVER}.0 or later is "
            "needed. Upgrade that server and its database (mlflow db upgrade), or set MLFLOW_TRACKING_URI to another."
        )


def ask(uri: str, path: str) -> requests.Response:
    """GET with the login and the certificates that MLflow's client would use, without following redirects."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    with translated():
        credentials = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
        return http_request(credentials, path, "GET", raise_on_status=False, allow_redirects=False)  # type: ignore[no-untyped-call]


def is_json(answer: requests.Response) -> bool:
    try:
        return isinstance(json.loads(answer.text), dict)
    except ValueError:
        return False


def _check_database(uri: str) -> None:
    """Raises Unreachable or Refused if a database server cannot be used: MLflow would try to open it for minutes."""
    import sqlalchemy

    try:
        limited = sqlalchemy.make_url(uri).get_backend_name() in ("postgresql", "mysql")
        limit = {"connect_timeout": CONNECT_SECONDS} if limited else {}
        engine = sqlalchemy.create_engine(uri, connect_args=limit, poolclass=sqlalchemy.NullPool)
        engine.connect().close()
    except ImportError:
        return  # MLflow meets it too, and problems.py says which package is needed
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise database_problem(uri, error) from None


def _check_sqlite(uri: str) -> None:
    """Raises Refused if the database cannot be used, for which MLflow would try to open it for minutes."""
    path = database_file(uri)
    if not path.parent.exists():  # made now, a typo would be a second database
        raise WrongParameters(f"MLFLOW_TRACKING_URI={uri}: no folder {path.parent}. Make it, or check the address.")
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=10)) as database:
            database.execute("PRAGMA schema_version")
    except (sqlite3.Error, OSError) as error:
        raise database_problem(uri, error) from None


def has_version(uri: str, name: str, version: str) -> bool:
    """Whether a database file has a version of a registered model; read without MLflow, which takes seconds to load."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{quote(str(database_file(uri)))}?mode=ro", uri=True)
        ) as database:
            query = (
                "SELECT 1 FROM model_versions WHERE name = ? AND version = ? AND current_stage != 'Deleted_Internal'"
            )
            return database.execute(query, (name, version)).fetchone() is not None
    except sqlite3.Error:
        return False
