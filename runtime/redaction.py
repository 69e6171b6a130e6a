"""Texts without secrets.

Passwords and keys are replaced by *** in everything that leaves the process as text: values of environment variables
for passwords, keys and tokens; user and password in addresses; signatures and tokens in the query of an address;
Authorization headers.  Programs call redact_output() first, so that logs, tracebacks and the messages of libraries are
covered, too.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO
from urllib.parse import quote, unquote

from runtime import environment

HIDDEN = "***"
MIN_LENGTH = 6  # of a value that is replaced anywhere: shorter ones occur in ordinary words

MIN_TOKEN_LENGTH = 16  # of a token in the place of a user's name

_USER_INFO = re.compile(r"""([a-z][a-z0-9+.-]*://)([^\s/'"<>]*)@""", re.IGNORECASE)
_QUERY = re.compile(
    r"""([?&;](?:[\w.-]*(?:signature|token|secret|passw|credential|api-?_?key|access-?key-?id)[\w.-]*|sig|pwd)=)"""
    r"""[^&;\s'"<>#]+""",
    re.IGNORECASE,
)
_KEYWORD = re.compile(r"""(\b(?:password|passwd|pwd)=)[^&;\s'"<>#]+""", re.IGNORECASE)  # of a database's DSN
_HEADER = re.compile(
    r"""(\bauthorization\b['"]?\s*[:=]\s*(?:b?['"])?+(?:(?:basic|bearer|token)\s+)?+)[\w+/=.~-]+""", re.IGNORECASE
)
_BEARER = re.compile(r"(\bbearer )[\w+/=.~-]{16,}", re.IGNORECASE)


def redacted(text: str) -> str:
    """The text with every secret replaced by ***.  Doing it twice changes nothing."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    text = _USER_INFO.sub(_without_password, text)
    for pattern in (_QUERY, _KEYWORD, _HEADER, _BEARER):
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return text


def redacted_values(value: Any) -> Any:
    """A JSON value with all its strings redacted and valid UTF-8 (paths may be none); keys stay."""
    if isinstance(value, str):
        return redacted(value).encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {name: redacted_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_values(item) for item in value]
    return value


def _without_password(found: re.Match[str]) -> str:
    user, colon, _ = found[2].partition(":")
    return f"{found[1]}{f'{user}:' if colon else ''}{HIDDEN}@"


def _secrets() -> list[str]:
    """What to replace wherever it occurs: every secret in the forms that texts quote, the longest first."""
    found = set(environment.secret_values())
    for address in environment.addresses():
        found |= set(_passwords(address))
    forms = {
        form
        for secret in found
        for form in (secret, unquote(secret), quote(secret), quote(secret, safe=""), repr(secret)[1:-1],
                     json.dumps(secret)[1:-1])
        if len(form) >= MIN_LENGTH and form.strip("*")
    }  # fmt: skip
    return sorted(forms, key=len, reverse=True)


def _passwords(address: str) -> Iterator[str]:
    """The passwords in an address, or in several.  One with / or # is cut off there by the libraries that quote it."""
    for word in address.split():
        for found in re.finditer(r"://([^/]*?:)?(.*)@", word):
            if found[1]:
                yield from (found[2], *re.split(r"[/?#@]", found[2]))
            elif "/" not in found[2] and len(found[2]) >= MIN_TOKEN_LENGTH:  # else the name of a user
                yield found[2]


class _Redacting:
    """A text stream that redacts what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def redact_output() -> None:
    """Redact what this process prints from now on: messages, logs, warnings, tracebacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Redacting):
            setattr(sys, name, _Redacting(stream))
