"""The API server of Kubeflow Pipelines: new enough, and asked with patience.

The generated client (kfp_server_api) is used, not kfp.Client: that one has no timeouts, keeps the context of earlier
sessions in a file, and takes 25 s of tracebacks to say that nobody listens.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pipelines.access import HOW_TO_GET_IN, Access
from vgg.errors import Problem, Refused, Unreachable, WrongParameters

log = logging.getLogger("vgg.submit")
T = TypeVar("T")

OLDEST = (2, 15)  # resources as run arguments
TIMEOUT = (10.0, 60.0)  # seconds to connect, and of silence
FIRST_PATIENCE = 5.0  # seconds for the first answer: a wrong address should not take longer to be told
SETTLING_SECONDS = 60.0  # for something that changes, until it is known whether it did
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0


class Unsure(Exception):
    """A request was lost, or answered with an error of the server's own: it may have been applied or not."""


class Server:
    """A connection.  patience: seconds without an answer after which it is given up."""

    def __init__(self, access: Access, patience: float) -> None:
        import kfp_server_api as api
        import urllib3

        self.access, self.host, self.patience = access, access.host, patience
        config = api.Configuration()
        access.configure(config)
        config.retries = urllib3.Retry(0, raise_on_redirect=False)  # one loop of our own; a redirect is a login page
        self.client = api.ApiClient(config, cookie=access.cookies)
        self.runs = api.RunServiceApi(self.client)
        self.experiments = api.ExperimentServiceApi(self.client)
        self.pipelines = api.PipelineServiceApi(self.client)
        self.uploads = api.PipelineUploadServiceApi(self.client)
        self.recurring = api.RecurringRunServiceApi(self.client)
        self.multi_user, self.version = False, "unknown"

    def greet(self) -> None:
        """Ask for the version.  Raises Unreachable, and Refused if it is too old or nobody is let in."""
        about = self.find(self.read, "/apis/v2beta1/healthz", patience=min(self.patience, FIRST_PATIENCE))
        if about is None:  # before 2.0
            about = self.find(self.read, "/apis/v1beta1/healthz") or {}
        # the API server says tag_name; its UI, which passes the API through, has names of its own
        self.multi_user = bool(about.get("multi_user") or about.get("apiServerMultiUser"))
        self.version = str(about.get("tag_name") or about.get("apiServerTagName") or "unknown")
        oldest = ".".join(map(str, OLDEST))
        if not (number := re.match(r"v?(\d+)\.(\d+)", self.version)):
            log.warning("%s does not say its version (%s); %s or later is needed", self.host, self.version, oldest)
        elif (int(number[1]), int(number[2])) < OLDEST:
            raise Refused(
                f"{self.host}: Kubeflow Pipelines {self.version} is too old; this package needs {oldest} or later "
                "(an older server ignores resources that are run arguments). Upgrade it."
            )

    def read(self, path: str, **options: Any) -> Any:
        """JSON of an address for which the generated client has no method, or not all fields."""
        try:
            return json.loads(self._raw(path, **options))
        except ValueError:
            raise self._login_page() from None

    def log_of(self, run_id: str, pod: str) -> str | None:
        """What a pod's main container has written, as long as pod or archive are there; None if not."""
        try:
            text = self._raw(f"/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log", _request_timeout=TIMEOUT).decode(
                "utf-8", "replace"
            )
        except _trouble():
            return None
        # the status is sent before the log is looked for: a failure comes with 200, behind whatever was found
        text = re.sub(r'\{"error_message":.*', "", text, flags=re.DOTALL)
        return self.access.clean(text) if text.strip() else None

    def _raw(self, path: str, **options: Any) -> bytes:
        as_it_is = {"header_params": {"Accept": "*/*"}, "auth_settings": ["Bearer"], "_preload_content": False}
        return bytes(self.client.call_api(path, "GET", **as_it_is, **options).data)

    def ask(self, call: Callable[..., T], *arguments: Any, patience: float | None = None, **options: Any) -> T:
        """A request that changes nothing, again and again until it is answered.

        Raises Unreachable when the patience is used up, and what explain() makes of an answer that will not change.
        """
        began, failures = time.monotonic(), 0
        while True:
            try:
                return call(*arguments, _request_timeout=TIMEOUT, **options)
            except _trouble() as error:
                pause = pause_after(failures)
                if not passing(error) or time.monotonic() - began + pause > (patience or self.patience):
                    raise self.explain(error) from None
                if failures == 1:
                    log.warning("%s Trying again.", self.explain(error))
                time.sleep(pause)
                failures += 1

    def find(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T | None:
        """As ask(); None where the server says that there is no such thing."""
        from kfp_server_api import ApiException

        def absent_or(*words: Any, **more: Any) -> T | None:
            try:
                return call(*words, **more)
            except ApiException as error:
                if error.status == 404:
                    return None
                raise

        return self.ask(absent_or, *arguments, **options)

    def send(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """A request that changes something, once.  Raises Unsure when nobody knows whether it was applied."""
        try:
            return call(*arguments, _request_timeout=TIMEOUT, **options)
        except _trouble() as error:
            if passing(error) or getattr(error, "status", 0) == 409:
                raise Unsure(str(self.explain(error))) from None
            raise self.explain(error) from None

    def made_once(self, look: Callable[[], T | None], make: Callable[[], T]) -> T:
        """What look() finds, or else what make() makes.

        What was applied and answered with an error, or made by somebody else meanwhile, is found by looking again.
        """
        began, failures = time.monotonic(), 0
        while True:
            if (found := look()) is not None:
                return found
            try:
                return make()
            except Unsure as error:
                pause = pause_after(failures)
                if time.monotonic() - began + pause > min(self.patience, SETTLING_SECONDS):
                    raise Unreachable(f"{error} Nothing has come of it; run the same command again.") from None
                time.sleep(pause)
                failures += 1

    def explain(self, error: Exception) -> Problem:
        """The message of a failed request."""
        status = int(getattr(error, "status", 0) or 0)
        if not status:
            reason = self.access.clean(str(getattr(error, "reason", None) or error))
            return Unreachable(f"{self.host}: no answer: {reason}. Is the address right, and the port forwarded?")
        said = self.access.clean(_said(getattr(error, "body", None)) or str(getattr(error, "reason", ""))).rstrip(".")
        shown = f"Shown was {self.access.shown}: has it expired?" if self.access.shown else "Nothing was shown to it."
        if 300 <= status < 400:
            target = urlsplit((getattr(error, "headers", None) or {}).get("Location", ""))
            if target.scheme == "https" and target.hostname == urlsplit(self.host).hostname and self.host[4] == ":":
                return WrongParameters(f"{self.host}: is served with https://; give that to --host")
            return self._login_page()
        if status == 401:
            return Refused(f"{self.host}: not let in (401). {shown} {HOW_TO_GET_IN}")
        if status == 403:
            return Refused(
                f"{self.host}: not allowed (403): {said}. {shown} Check rights, --namespace. {HOW_TO_GET_IN}"
            )
        return (Unreachable if passing(error) else Refused)(f"{self.host}: {status}: {said}.")

    def _login_page(self) -> Problem:
        shown = f" although it was shown {self.access.shown}" if self.access.shown else ""
        return Refused(f"{self.host}: something else than the API answers, as login pages do{shown}. {HOW_TO_GET_IN}")


def pause_after(failures: int) -> float:
    return float(min(FIRST_PAUSE * 2**failures, LONGEST_PAUSE))


def passing(error: Exception) -> bool:
    """Whether another try may help."""
    status = int(getattr(error, "status", 0) or 0)
    return not status or status in (408, 429) or (status >= 500 and status != 501)


def _trouble() -> tuple[type[Exception], ...]:
    """What a request raises."""
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    return ApiException, HTTPError, OSError


def _said(body: Any) -> str:
    """The text of an answer: of gRPC's gateway, of the upload's own handler, or of whatever stands in front."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body or "")
    try:
        fields = json.loads(text)
        details = fields.get("details") or [{}]
        text = details[0].get("message") or fields.get("message") or fields.get("error_message") or text
    except (ValueError, AttributeError, TypeError, KeyError, IndexError):
        pass  # a text, then
    return " ".join(text.split())[:500]
