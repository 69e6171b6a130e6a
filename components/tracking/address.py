"""The address of MLflow, MLFLOW_TRACKING_URI: what can never work is refused before any work."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from urllib.parse import urlsplit, urlunsplit

from runtime import environment
from runtime.errors import WrongParameters
from runtime.wording import did_you_mean

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
EXAMPLES = "http://HOST:5000 for a server, or sqlite:////FOLDER/mlflow.db"


def tracking_uri() -> str:
    """The valid address of MLflow.  Raises WrongParameters as check_address does."""
    return check_address(environment.TRACKING_URI.get())


def check_address(text: str) -> str:
    """The address without blanks and slashes at its end.

    Raises WrongParameters for an address that can never work: an unknown scheme, no host, MLflow's file store.
    """
    uri = text.strip()
    scheme = uri.partition(":")[0].lower()
    if scheme in ("http", "https"):
        _check_url(uri)
        return uri.rstrip("/")
    if scheme in ("databricks", "databricks-uc", "uc"):
        raise _wrong(uri, f"the registry of Databricks works differently and is not supported; use {EXAMPLES}")
    if missing := re.match(r"(https?)/+(?=[^/])", uri):
        raise _wrong(uri, f"write {missing[1]}://{uri[missing.end() :]}")
    if scheme == "file" or ":" not in uri:
        raise _wrong(
            uri,
            "MLflow 3 no longer supports its file store; use sqlite:////FOLDER/mlflow.db. To keep what is in the "
            "folder: mlflow migrate-filestore --help",
        )
    if scheme == "sqlite" and not re.match(r"sqlite:///(?!:memory:).", uri):
        raise _wrong(uri, "write sqlite:///FILE for a relative path and sqlite:////FILE for an absolute one")
    known = {*DATABASES, "http", "https", *(point.name for point in entry_points(group="mlflow.tracking_store"))}
    if scheme.partition("+")[0] in known:
        return uri
    if re.match(r"[\w.-]+:\d+(/|$)", uri):
        raise _wrong(uri, f"write http://{uri}")
    raise _wrong(uri, f"unknown scheme {scheme}{did_you_mean(scheme, known)}; use {EXAMPLES}")


def _check_url(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:  # a port that is no number, half an IPv6 address
        raise _wrong(uri, f"{error}; use http://HOST:5000") from None
    if not host or re.search(r"\s", uri):
        raise _wrong(uri, "no host name; use http://HOST:5000" if not host else "it contains blanks")
    if parts.query or parts.fragment:
        raise _wrong(uri, f"a page of its web interface; use {urlunsplit((*parts[:3], '', '')).rstrip('/')}")


def _wrong(uri: str, reason: str) -> WrongParameters:
    return WrongParameters(f"MLFLOW_TRACKING_URI={shown(uri)}: {reason}")


def shown(uri: str) -> str:
    """An address without user and password."""
    return re.sub(r"(?<=//)[^/]*@", "", uri)
