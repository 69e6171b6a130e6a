"""What the answers of an MLflow server and the exceptions of its client mean, in the user's words."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

from components.tracking.address import shown, tracking_uri
from runtime.errors import Problem, Refused, StorageFailure, Unreachable, WrongParameters

OLDEST_SERVER = 3  # major version; 2.x has no logged models, which a model version needs
TRANSIENT_STATUS = (408, 425, 429)  # and all of 500 and above
TRANSIENT_CODES = (
    "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED",
    "ABORTED", "RESOURCE_CONFLICT",
)  # fmt: skip
TRANSIENT_TLS = ("EOF occurred", "UNEXPECTED_EOF", "timed out")  # all other errors of TLS stay
SERVES_NO_ARTIFACTS = "disabled due to the mlflow server running with"
MAX_QUOTE = 300  # characters of a foreign text in a message
LOGIN = (
    "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (on a cluster, the secret vgg-tracking), or "
    "MLFLOW_TRACKING_TOKEN"
)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn exceptions of MLflow and the libraries below it into problems with a message and an exit code."""
    try:
        yield
    except Exception as error:
        if (found := problem(error)) is error or found is None:
            raise
        raise found from error


def problem(error: Exception) -> Problem | None:
    """What an exception of MLflow's client means; None for one that is unknown."""
    import requests
    from mlflow.exceptions import MlflowException, RestException
    from sqlalchemy.exc import SQLAlchemyError

    chain = list(_chain(error))
    if found := next((link for link in chain if isinstance(link, Problem)), None):
        return found
    uri = tracking_uri()
    where = f"MLflow at {shown(uri)}{_through(uri)}"
    for link in chain:
        if isinstance(link, requests.HTTPError) and link.response is not None:
            return judge(uri, link.response.status_code, link.response.text)
        if isinstance(link, SQLAlchemyError | sqlite3.Error):
            return database_problem(uri, link)
        if isinstance(link, ValueError) and re.match(r"Failed to convert .* for MLFLOW_", str(link)):
            return WrongParameters(str(link))
        if isinstance(link, ModuleNotFoundError):
            return Refused(f"{where} needs the Python package {link.name}, which is not installed")
    if found := _connection_problem(where, chain):
        return found
    mlflow = next((link for link in chain if isinstance(link, MlflowException)), None)
    if mlflow is None:
        return None
    said = _quoted(str(mlflow))
    if mlflow.error_code == "ENDPOINT_NOT_FOUND":
        return Refused(f"{where} does not know a request; is it older than {OLDEST_SERVER}.0? It says: {said}")
    if status := re.search(r"failed with error code (\d{3})", str(mlflow)):  # not every status has an error code
        return judge(uri, int(status[1]), str(mlflow).partition("Response body: ")[2].strip("'"))
    if mlflow.error_code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        return Refused(f"{where} refuses the credentials: {LOGIN}. It says: {said}")
    if uri.startswith("http") and mlflow.error_code in TRANSIENT_CODES and isinstance(mlflow, RestException):
        return Unreachable(f"{where} fails: {said}")
    return Refused(f"{where} refuses: {said}")


def _through(uri: str) -> str:
    """Which proxy the client asks, and how it would not; "" without one.  Companies set http_proxy on all machines."""
    from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy

    proxy = select_proxy(uri, get_environ_proxies(uri)) if uri.startswith("http") else None
    if not proxy:
        return ""
    host = urlsplit(uri).hostname
    return f", asked through the proxy {shown(prepend_scheme_if_needed(proxy, 'http'))} (directly: no_proxy={host}),"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what caused it, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _connection_problem(where: str, chain: list[BaseException]) -> Problem | None:
    """The problem of an exception that says that no answer came."""
    import requests
    from urllib3.exceptions import LocationParseError

    last = chain[-1].args[-1] if chain[-1].args and isinstance(chain[-1].args[-1], Exception) else chain[-1]
    innermost = re.sub(r"^.*(?=\[Errno)|\(_ssl\.c:\d+\)", "", str(last)).strip()
    for link in chain:
        if isinstance(link, requests.exceptions.InvalidURL | LocationParseError | UnicodeError):
            return WrongParameters(f"MLFLOW_TRACKING_URI={shown(tracking_uri())}: {link}")
        if isinstance(link, requests.exceptions.SSLError | ssl.SSLError):
            return _tls_problem(where, f"{link} {innermost}", innermost)
        if isinstance(link, OSError) and "TLS" in str(link):  # the file with certificates does not exist
            return Refused(f"{where}: {link}. Check MLFLOW_TRACKING_SERVER_CERT_PATH and REQUESTS_CA_BUNDLE.")
    for link in chain:
        if isinstance(link, requests.exceptions.RequestException | ConnectionError | TimeoutError):
            return Unreachable(f"{where} does not answer: {innermost}. Start it, or set MLFLOW_TRACKING_URI.")
    return None


def _tls_problem(where: str, text: str, reason: str) -> Problem:
    if any(transient in text for transient in TRANSIENT_TLS):
        return Unreachable(f"{where} ends the connection: {reason}")
    if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text:
        return Refused(f"{where} does not speak TLS: {reason}. Write http:// in MLFLOW_TRACKING_URI?")
    if "CERTIFICATE_REQUIRED" in text or "HANDSHAKE_FAILURE" in text:
        return Refused(f"{where} refuses the connection: {reason}. Does it want MLFLOW_TRACKING_CLIENT_CERT_PATH?")
    return Refused(
        f"{where}: its certificate is not trusted: {reason}. Set MLFLOW_TRACKING_SERVER_CERT_PATH (or "
        "REQUESTS_CA_BUNDLE) to the file of the authority that signed it."
    )


def judge(uri: str, status: int, text: str, location: str = "") -> Problem:
    """What an unexpected answer of a server means.  text: its body.  location: where it redirects to."""
    host = urlsplit(uri).netloc.rpartition("@")[2]
    where, said = f"MLflow at {shown(uri)}{_through(uri)}", _quoted(text)
    if SERVES_NO_ARTIFACTS in text:  # answered with 503
        return Refused(f"{where} runs with --no-serve-artifacts: {said}")
    if status >= 500 or status in TRANSIENT_STATUS:
        return Unreachable(f"{where} answers with status {status}: {said}")
    if status == 401:
        return Refused(f"{where} refuses the credentials: {LOGIN}. It says: {said}")
    if status == 403 and "Invalid Host header" in text:
        bare = host.rpartition(":")[0] or host
        return Refused(
            f"{where} refuses the host name {host}: {said}. Start it with --allowed-hosts '{bare},{host}' (names with "
            "and without the port), or set MLFLOW_TRACKING_URI to a name that it allows."
        )
    if status == 403:
        return Refused(f"{where} denies access: {LOGIN}. It says: {said}")
    if 300 <= status < 400:
        return Refused(
            f"{where} redirects to {shown(location)}. If that is a login page, a proxy wants "
            f"a login: {LOGIN}. If the server has moved, set MLFLOW_TRACKING_URI to the new address."
        )
    if status in (200, 404):
        return Refused(
            f"MLFLOW_TRACKING_URI={shown(uri)}: no MLflow server answers there (status {status}: {said}). Check host, "
            f"port and path; a --static-prefix belongs to the address. If it is a login page: {LOGIN}."
        )
    return Refused(f"{where} refuses requests with status {status}: {said}")


def _quoted(text: str) -> str:
    """The words of an answer, without HTML, in one short line."""
    if re.search(r"(?i)<(!doctype|html|body|h1|p)\b", text):
        text = re.sub(r"(?is)<(script|style|title).*?</\1>|<[^>]*>", " ", text)
    line = " ".join(text.split())
    return repr(line[:MAX_QUOTE] + ("…" if len(line) > MAX_QUOTE else "")) if line else "nothing"


def database_problem(uri: str, error: BaseException) -> Problem:
    """What an error of a database means.  uri: its address."""
    from sqlalchemy.exc import ArgumentError

    reason = " ".join(str(getattr(error, "orig", None) or error).split())
    where = f"the MLflow database {shown(uri)}"
    if isinstance(error, ArgumentError):  # an unknown driver, or an address that SQLAlchemy cannot read
        return WrongParameters(f"MLFLOW_TRACKING_URI={shown(uri)}: {reason}")
    if "locked" in reason:
        return Unreachable(f"{where} is in use by another process: {reason}")
    if "full" in reason or "disk I/O error" in reason:
        return StorageFailure(f"{where}: {reason}. Free some space on its disk.")
    if uri.startswith("sqlite"):
        return Refused(
            f"{where} cannot be used: {reason}. Check that its folder exists and is writable and that the file is an "
            "MLflow database, or set MLFLOW_TRACKING_URI."
        )
    if re.search("authentication failed|[Aa]ccess denied|does not exist|Unknown database", reason):
        return Refused(f"{where} refuses: {reason}. Check user, password and name of the database.")
    return Unreachable(f"{where}: {reason}. Start it, or set MLFLOW_TRACKING_URI.")
