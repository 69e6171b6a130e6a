"""Where the API server of Kubeflow Pipelines is, and what lets us in.

    KF_PIPELINES_ENDPOINT        its address, where --host does not say it
    KF_PIPELINES_TOKEN           a bearer token (or --token-file, which is read anew for every request)
    KF_PIPELINES_SA_TOKEN_PATH   the projected token of a pod, where it is not in its usual place
    KF_PIPELINES_COOKIES         the session of a login page: NAME=VALUE; NAME=VALUE
    SSL_CERT_FILE                certificates of a private authority

None of it is a command line argument, where everybody on the machine could read it.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from vgg.errors import WrongParameters

log = logging.getLogger("vgg.submit")

IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
POD_TOKEN = "/var/run/secrets/kubeflow/pipelines/token"  # noqa: S105  # where a projected token is mounted
HOW_TO_GET_IN = (
    "Set KF_PIPELINES_TOKEN (or --token-file) to a token, or KF_PIPELINES_COOKIES to the cookies of a session in the "
    "browser; in a pod, mount a service account token for the audience pipelines.kubeflow.org and set "
    "KF_PIPELINES_SA_TOKEN_PATH to its path."
)


class Access:
    """Address and credentials.  shown: what they are, for messages; '' if there are none."""

    def __init__(self, host: str | None, token_file: str | None) -> None:
        """Raises WrongParameters for an address that is none, and a token that cannot be read."""
        self.host, self.shown = address(host), ""
        self._secrets: list[str] = []
        self._token = os.environ.get("KF_PIPELINES_TOKEN", "").strip()
        self._file = token_file or os.environ.get("KF_PIPELINES_SA_TOKEN_PATH")
        if not self._file and Path(POD_TOKEN).exists():
            self._file = POD_TOKEN
        self.cookies = os.environ.get("KF_PIPELINES_COOKIES")
        if self._token and not token_file:
            self._file, self.shown = None, "the token of KF_PIPELINES_TOKEN"
        elif self._file:
            self.shown = f"the token in {self._file}"
        if self.cookies:
            self.shown += f"{' and ' if self.shown else ''}the cookies of KF_PIPELINES_COOKIES"
            self._secrets += [self.cookies, *re.findall(r"=([^;\s]{6,})", self.cookies)]
        self.token()
        if self.shown and self.host.startswith("http:") and not _stays_inside(urlsplit(self.host).hostname or ""):
            log.warning("%s: what lets you in travels unencrypted; use https", self.host)

    def token(self) -> str:
        """The bearer token as it is now: the cluster renews the one in a file.  Raises WrongParameters."""
        token = self._token
        if self._file:
            try:
                token = Path(self._file).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise WrongParameters(f"{self._file}: no token can be read there: {error}") from None
        if token and token not in self._secrets:
            self._secrets.append(token)
        return token

    def configure(self, config: Any) -> None:
        """Set up the generated client's configuration."""
        config.host = self.host
        parts = urlsplit(self.host)
        if not proxy_bypass(parts.netloc):
            config.proxy = getproxies().get(parts.scheme)  # HTTPS_PROXY, NO_PROXY: the client does not know them
        config.ssl_ca_cert = os.environ.get("SSL_CERT_FILE")
        if self.token():
            config.api_key["authorization"] = "set by the hook"
            config.api_key_prefix["authorization"] = "Bearer"
            config.refresh_api_key_hook = lambda renewed: renewed.api_key.update(authorization=self.token())

    def clean(self, text: str) -> str:
        """A text without what lets us in, whoever put it there."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def address(host: str | None) -> str:
    given = host or os.environ.get("KF_PIPELINES_ENDPOINT")
    if not given and os.environ.get("KUBERNETES_SERVICE_HOST"):
        given = IN_CLUSTER
    if not given:
        raise WrongParameters("say --host URL (Kubeflow Pipelines' API), --local, or --compile FILE")
    parts = urlsplit(given)
    if parts.username or parts.password:
        raise WrongParameters("--host: no passwords in an address, where everybody sees them. Use KF_PIPELINES_TOKEN.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise WrongParameters(f"--host {given}: write it with http:// or https://")
    return given.rstrip("/")


def _stays_inside(host: str) -> bool:
    """Whether what goes there stays on this machine or in this cluster."""
    return host in ("localhost", "::1") or host.startswith("127.") or "." not in host or ".svc" in host
