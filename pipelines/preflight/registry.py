"""Digests of image tags, from the HTTP API (version 2) of container registries.

Credentials are those of podman and docker: $REGISTRY_AUTH_FILE, or $DOCKER_CONFIG/config.json (~/.docker), with its
credential helpers.  Plain http is used only for a registry on this machine.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from runtime import environment
from runtime.errors import Problem, Refused, Unreachable, WrongParameters

if TYPE_CHECKING:
    import requests

TIMEOUT = (5, 20)  # seconds to connect, and of silence
MANIFESTS = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1", "docker.distribution.manifest.list.v2",
        "oci.image.manifest.v1", "docker.distribution.manifest.v2",
    )
)  # fmt: skip


class Registries:
    """A client for all registries.  One that did not answer is not challenge again."""

    def __init__(self) -> None:
        import requests

        self._session = requests.Session()
        self._down: dict[str, Problem] = {}

    def pinned(self, reference: str) -> str:
        """'<name>@sha256:…' of an image reference.

        Raises Refused if it is not in its registry or cannot be read, Unreachable if the registry does not answer,
        WrongParameters for an invalid reference.
        """
        host, name, tag = parse(reference)
        if host in self._down:
            raise self._down[host]
        import requests

        try:
            return f"{reference.partition('@')[0].removesuffix(f':{tag}')}@{self._digest(host, name, tag, reference)}"
        except requests.RequestException as error:
            self._down[host] = Unreachable(
                f"the registry {host} does not answer ({_brief(error)}). Set VGG_REGISTRY to the registry that the "
                "cluster pulls from, or use --no-image-check if the images are loaded into its nodes"
            )
            raise self._down[host] from None

    def _digest(self, host: str, name: str, tag: str, reference: str) -> str:
        url = f"{_base(host)}/v2/{name}/manifests/{tag}"
        answer = self._ask("HEAD", url, anonymous)
        if answer.status_code == 401:
            answer = self._ask("HEAD", url, self._authentication(answer, host, name))
        if answer.status_code in (401, 403):
            raise Refused(f"{reference}: no permission to read it ({answer.status_code}). Log in: podman login {host}")
        if answer.status_code == 404:
            raise Refused(f"{reference}: not in its registry. Build it (make images) and push it.")
        answer.raise_for_status()
        if not (digest := str(answer.headers.get("Docker-Content-Digest", ""))):
            body = self._session.get(url, headers=answer.request.headers, auth=anonymous, timeout=TIMEOUT)
            body.raise_for_status()
            digest = f"sha256:{hashlib.sha256(body.content).hexdigest()}"
        return digest

    def _ask(self, method: str, url: str, auth: Any) -> requests.Response:
        headers = {"Accept": MANIFESTS}
        return self._session.request(method, url, headers=headers, auth=auth, timeout=TIMEOUT, allow_redirects=True)

    def _authentication(self, answer: requests.Response, host: str, name: str) -> Any:
        """As a registry's 401 asks for: a password, or a token from its realm."""
        from requests.auth import HTTPBasicAuth
        from requests.utils import parse_dict_header

        scheme, _, rest = answer.headers.get("WWW-Authenticate", "").partition(" ")
        user, password, refresh = credentials(host)
        known = HTTPBasicAuth(user, password) if user else anonymous
        if scheme.lower() != "bearer":
            return known
        challenge = parse_dict_header(rest)
        realm = urlsplit(challenge.get("realm", ""))
        if realm.scheme != "https" and not _is_local(realm.hostname or ""):
            raise Refused(f"{host}: requests to send your password unencrypted to {realm.geturl()}; not sent")
        query = {"service": challenge.get("service", ""), "scope": challenge.get("scope", f"repository:{name}:pull")}
        if refresh:
            form = {**query, "grant_type": "refresh_token", "refresh_token": refresh, "client_id": "vgg-imagenet"}
            given = self._session.post(realm.geturl(), data=form, auth=anonymous, timeout=TIMEOUT)
        else:
            given = self._session.get(realm.geturl(), params=query, auth=known, timeout=TIMEOUT)
        if given.status_code in (400, 401, 403):
            return anonymous
        given.raise_for_status()
        token = given.json().get("token") or given.json().get("access_token")
        return lambda request: request.headers.update(Authorization=f"Bearer {token}") or request


def parse(reference: str) -> tuple[str, str, str]:
    """Host, name and tag or digest of an image reference.  Raises WrongParameters."""
    from docker.auth import resolve_repository_name
    from docker.errors import InvalidRepository
    from docker.utils import parse_repository_tag

    repository, tag = parse_repository_tag(reference)
    try:
        host, name = resolve_repository_name(repository)
    except (InvalidRepository, IndexError):
        host = name = ""
    if not name or not tag or not re.fullmatch(r"[\w./:@-]+", reference):
        raise WrongParameters(f"{reference!r} is not an image reference; write registry/name:tag")
    if host == "docker.io":
        return "registry-1.docker.io", name if "/" in name else f"library/{name}", tag
    return host, name, tag


def credentials(host: str) -> tuple[str, str, str]:
    """User, password and refresh token for a registry; '' for what this machine does not have.

    Raises WrongParameters if they cannot be read.
    """
    import docker.auth
    from docker.errors import DockerException

    key = "docker.io" if host == "registry-1.docker.io" else host
    try:
        with warnings.catch_warnings(action="ignore"):  # it also raises what it warns about
            config = docker.auth.load_config(config_path=environment.REGISTRY_AUTH_FILE.get() or None)
            known = config.resolve_authconfig(key) or {}
    except (DockerException, ValueError) as error:
        raise WrongParameters(f"{host}: cannot read its credentials: {error}") from None
    found = {name.lower(): str(value) for name, value in known.items() if value}
    return found.get("username", ""), found.get("password", ""), found.get("identitytoken", "")


def anonymous(request: Any) -> Any:
    """No authentication; without it, requests would read ~/.netrc."""
    return request


def _base(host: str) -> str:
    return f"{'http' if _is_local(urlsplit(f'//{host}').hostname or '') else 'https'}://{host}"


def _is_local(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _brief(error: Exception) -> str:
    """The type and the innermost reason, without addresses of objects."""
    reason = error
    while isinstance(inner := getattr(reason, "reason", None) or next(iter(reason.args), None), Exception):
        reason = inner
    return f"{type(error).__name__}: {str(reason).rpartition('>: ')[2]}"
