"""The API server of Kubeflow Pipelines: a check of its version, and requests with retries.

This uses the generated client (kfp_server_api) instead of kfp.Client, which has no timeouts, stores a context in a file
between sessions, and takes 25 s and several tracebacks to report a refused connection.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pipelines.kfp.access import HOW_TO_GET_IN, Access
from runtime.errors import Problem, Refused, Unreachable, WrongParameters
from runtime.retry import Outage, Retry

log = logging.getLogger("vgg.submit")
T = TypeVar("T")

OLDEST = (2, 15)  # the first that accepts resources as run arguments
TIMEOUT = (10.0, 60.0)  # seconds to connect, and of silence
FIRST_PATIENCE = 5.0  # seconds for the first answer: a wrong address is reported soon
QUIET_FAILURES = 1
SETTLING_SECONDS = 60.0  # to find out whether a change was applied
# The server sends the status 200 before it looks for a log and then appends a failure to the text (2.15-2.17).
LOG_FAILURE = re.compile(r'\{"error_message":.*', re.DOTALL)


class Unsure(Exception):
    """A request was lost or answered with a server error: it is unknown whether it was applied."""


class Server:
    """A connection.  patience: seconds without an answer after which a request fails."""

    def __init__(self, access: Access, patience: float) -> None:
        import kfp_server_api as api
        import urllib3

        self.access, self.host, self.patience, self.errors = access, access.host, patience, ApiErrors(access)
        config = api.Configuration()
        access.configure(config)
        config.retries = urllib3.Retry(0, raise_on_redirect=False)  # see runtime.retry; a redirect is a login page
        self.client = api.ApiClient(config, cookie=access.cookies)
        self.runs = api.RunServiceApi(self.client)
        self.experiments = api.ExperimentServiceApi(self.client)
        self.pipelines = api.PipelineServiceApi(self.client)
        self.uploads = api.PipelineUploadServiceApi(self.client)
        self.recurring = api.RecurringRunServiceApi(self.client)
        self.multi_user, self.version = False, "unknown"

    def greet(self) -> None:
        """Read the version.  Raises Unreachable, and Refused if it is too old or access is denied."""
        health = self.find(self.read, "/apis/v2beta1/healthz", patience=min(self.patience, FIRST_PATIENCE))
        if health is None:  # before 2.0
            health = self.find(self.read, "/apis/v1beta1/healthz") or {}
        # the field names of the API server, and those of its UI, which also serves the API
        self.multi_user = bool(health.get("multi_user") or health.get("apiServerMultiUser"))
        self.version = str(health.get("tag_name") or health.get("apiServerTagName") or "unknown")
        oldest = ".".join(map(str, OLDEST))
        if not (number := re.match(r"v?(\d+)\.(\d+)", self.version)):
            log.warning("%s does not report its version (%s); %s or later is needed", self.host, self.version, oldest)
        elif (int(number[1]), int(number[2])) < OLDEST:
            raise Refused(
                f"{self.host}: Kubeflow Pipelines {self.version} is too old; this package needs {oldest} or later "
                "(an older server ignores resources that are run arguments). Upgrade the server."
            )

    def read(self, path: str, **options: Any) -> Any:
        """JSON of a path for which the generated client has no method, or not all fields."""
        try:
            return json.loads(self._raw(path, **options))
        except ValueError:
            raise self.errors.login_page() from None

    def log_of(self, run_id: str, pod: str) -> str | None:
        """The log of a pod's main container; None if neither the pod nor an archive of it exists."""
        try:
            text = self._raw(f"/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log", _request_timeout=TIMEOUT).decode(
                "utf-8", "replace"
            )
        except self.errors.errors:
            return None
        text = LOG_FAILURE.sub("", text)
        return self.access.clean(text) if text.strip() else None

    def _raw(self, path: str, **options: Any) -> bytes:
        raw = {"header_params": {"Accept": "*/*"}, "auth_settings": ["Bearer"], "_preload_content": False}
        return bytes(self.client.call_api(path, "GET", **raw, **options).data)

    def ask(self, call: Callable[..., T], *arguments: Any, patience: float | None = None, **options: Any) -> T:
        """The answer of a request that changes nothing, repeated as needed.

        Raises Unreachable when the patience is used up, and what explain() makes of a refusal.
        """
        outage = Outage(self.host, log, TIMEOUT[1], QUIET_FAILURES)
        retry = Retry(self.errors, patience or self.patience, outage)
        return retry.call(lambda: call(*arguments, _request_timeout=TIMEOUT, **options))

    def find(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T | None:
        """As ask(); None for status 404."""
        from kfp_server_api import ApiException

        def found_or_none(*positional: Any, **named: Any) -> T | None:
            try:
                return call(*positional, **named)
            except ApiException as error:
                if error.status == 404:
                    return None
                raise

        return self.ask(found_or_none, *arguments, **options)

    def send(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """A request that changes something, once.  Raises Unsure if it is unknown whether it was applied."""
        try:
            return call(*arguments, _request_timeout=TIMEOUT, **options)
        except self.errors.errors as error:
            if self.errors.is_temporary(error) or getattr(error, "status", 0) == 409:
                raise Unsure(str(self.errors.explain(error))) from None
            raise self.errors.explain(error) from None

    def made_once(self, look: Callable[[], T | None], make: Callable[[], T]) -> T:
        """What look() finds, or else what make() makes.

        If a request was applied in spite of an error, or something else has made the same meanwhile, the next look()
        finds it.
        """

        def look_or_make() -> T:
            found = look()
            return make() if found is None else found

        retry = Retry(_Settling(), min(self.patience, SETTLING_SECONDS), Outage(self.host, log))
        return retry.call(look_or_make)


class ApiErrors:
    """A runtime.retry.Classifier."""

    def __init__(self, access: Access) -> None:
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError

        self.access, self.host = access, access.host
        self.errors: tuple[type[Exception], ...] = (ApiException, HTTPError, OSError)

    def is_temporary(self, error: Exception) -> bool:
        status = _status(error)
        return not status or status in (408, 429) or (status >= 500 and status != 501)

    def refusal(self, error: Exception) -> Problem:
        return self.explain(error)

    def gave_up(self, error: Exception, seconds: float) -> Problem:  # noqa: ARG002
        return self.explain(error)

    def brief(self, error: Exception) -> str:
        return f"{_status(error) or 'no answer'}: {self._reason(error)}"

    def explain(self, error: Exception) -> Problem:
        """The message of a failed request."""
        status, reason = _status(error), self._reason(error)
        if not status:
            return Unreachable(f"{self.host}: no answer: {reason}. Is the address right, and the port forwarded?")
        if 300 <= status < 400:
            target = urlsplit((getattr(error, "headers", None) or {}).get("Location", ""))
            if target.scheme == "https" and target.hostname == urlsplit(self.host).hostname and self.host[4] == ":":
                return WrongParameters(f"{self.host}: is served with https://; use that for --host")
            return self.login_page()
        if status == 401:
            return Refused(f"{self.host}: access denied (401). {self._credentials()} {HOW_TO_GET_IN}")
        if status == 403:
            return Refused(
                f"{self.host}: not allowed (403): {reason}. {self._credentials()} Check permissions and --namespace. "
                f"{HOW_TO_GET_IN}"
            )
        return (Unreachable if self.is_temporary(error) else Refused)(f"{self.host}: {status}: {reason}.")

    def login_page(self) -> Problem:
        return Refused(
            f"{self.host}: not an answer of the API, perhaps a login page. {self._credentials()} {HOW_TO_GET_IN}"
        )

    def _credentials(self) -> str:
        shown = self.access.shown
        return f"Credentials sent: {shown}. Have they expired?" if shown else "No credentials were sent."

    def _reason(self, error: Exception) -> str:
        reason = str(getattr(error, "reason", None) or error)
        if _status(error):
            reason = _message(getattr(error, "body", None)) or str(getattr(error, "reason", ""))
        return self.access.clean(reason).rstrip(".")


class _Settling:
    """A runtime.retry.Classifier for changes of which it is unknown whether they were applied."""

    errors: tuple[type[Exception], ...] = (Unsure,)

    def is_temporary(self, error: Exception) -> bool:  # noqa: ARG002
        return True

    def refusal(self, error: Exception) -> Problem:
        return Unreachable(str(error))

    def gave_up(self, error: Exception, seconds: float) -> Problem:
        return Unreachable(f"{error} Nothing was changed within {seconds:.0f} s; run the same command again.")

    def brief(self, error: Exception) -> str:
        return str(error).rstrip(".")


def _status(error: Exception) -> int:
    """The HTTP status; 0 if there was no answer."""
    return int(getattr(error, "status", 0) or 0)


def _message(body: Any) -> str:
    """The message of an answer: of gRPC's gateway, of the upload handler, or of a proxy in front of them."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body or "")
    try:
        fields = json.loads(text)
        details = fields.get("details") or [{}]
        text = details[0].get("message") or fields.get("message") or fields.get("error_message") or text
    except (ValueError, AttributeError, TypeError, KeyError, IndexError):
        pass  # plain text
    return " ".join(text.split())[:500]
