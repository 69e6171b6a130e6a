"""Address and credentials of the API server of Kubeflow Pipelines.

    KF_PIPELINES_ENDPOINT        its address, without --host
    KF_PIPELINES_TOKEN           a bearer token (or --token-file, which is read again for every request)
    KF_PIPELINES_SA_TOKEN_PATH   path of a pod's projected token, if not the default
    KF_PIPELINES_COOKIES         cookies of a browser session: NAME=VALUE; NAME=VALUE
    SSL_CERT_FILE                certificates of a private CA

Credentials are not command line arguments, because every user of the machine can read those.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from runtime import environment
from runtime.errors import WrongParameters

log = logging.getLogger("vgg.submit")

IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
POD_TOKEN = "/var/run/secrets/kubeflow/pipelines/token"  # noqa: S105  # where a projected token is mounted
HOW_TO_GET_IN = (
    "Set KF_PIPELINES_TOKEN (or --token-file) to a token, or KF_PIPELINES_COOKIES to the cookies of a browser session; "
    "in a pod, mount a service account token for the audience pipelines.kubeflow.org and set "
    "KF_PIPELINES_SA_TOKEN_PATH to its path."
)


class Access:
    """Address and credentials.  shown: description of the credentials, for messages; '' without any."""

    def __init__(self, host: str | None, token_file: str | None) -> None:
        """Raises WrongParameters for an invalid address, and for a token that cannot be read."""
        self.host, self.shown = address(host), ""
        self._secrets: list[str] = []
        self._token = environment.PIPELINES_TOKEN.get().strip()
        self._file = token_file or environment.PIPELINES_TOKEN_FILE.get()
        if not self._file and Path(POD_TOKEN).exists():
            self._file = POD_TOKEN
        self.cookies = environment.PIPELINES_COOKIES.get() or None
        if self._token and not token_file:
            self._file, self.shown = None, "the token of KF_PIPELINES_TOKEN"
        elif self._file:
            self.shown = f"the token in {self._file}"
        if self.cookies:
            self.shown += f"{' and ' if self.shown else ''}the cookies of KF_PIPELINES_COOKIES"
            self._secrets += [self.cookies, *re.findall(r"=([^;\s]{6,})", self.cookies)]
        self.token()
        if self.shown and self.host.startswith("http:") and not _is_internal(urlsplit(self.host).hostname or ""):
            log.warning("%s: credentials are sent unencrypted; use https", self.host)

    def token(self) -> str:
        """The current bearer token: the cluster renews a token file.  Raises WrongParameters."""
        token = self._token
        if self._file:
            try:
                token = Path(self._file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise WrongParameters(f"{self._file}: cannot read the token: {error}") from None
        if token and token not in self._secrets:
            self._secrets.append(token)
        return token

    def configure(self, config: Any) -> None:
        """Configure the generated client."""
        config.host = self.host
        parts = urlsplit(self.host)
        if not proxy_bypass(parts.netloc):
            config.proxy = getproxies().get(parts.scheme)  # the client ignores HTTPS_PROXY and NO_PROXY
        config.ssl_ca_cert = environment.CA_FILE.get() or None
        if self.token():
            config.api_key["authorization"] = "set by the hook"
            config.api_key_prefix["authorization"] = "Bearer"
            config.refresh_api_key_hook = lambda renewed: renewed.api_key.update(authorization=self.token())

    def clean(self, text: str) -> str:
        """A text with all credentials replaced by ***."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def address(host: str | None) -> str:
    given = host or environment.PIPELINES_ENDPOINT.get()
    if not given and environment.IN_CLUSTER.is_set():
        given = IN_CLUSTER
    if not given:
        raise WrongParameters(
            "give --host URL or set KF_PIPELINES_ENDPOINT (Kubeflow Pipelines' API). Without Kubeflow, "
            "python -m pipelines.submit --local runs the pipeline in containers on this machine."
        )
    parts = urlsplit(given)
    if parts.username or parts.password:
        raise WrongParameters("--host: the address must not contain a password. Use KF_PIPELINES_TOKEN.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise WrongParameters(f"--host {given}: write it with http:// or https://")
    return given.rstrip("/")


def _is_internal(host: str) -> bool:
    """Whether traffic to this host stays on this machine or in this cluster."""
    return host in ("localhost", "::1") or host.startswith("127.") or "." not in host or ".svc" in host
