"""Search files for a secret, in plain text and in common encodings.

VALUE=… python -m security.canary --env VALUE PLACE…

A place is a file or a folder.  Archives are searched too: gzip, zip, and tar with gzipped members, as `podman save`
writes them.  The value is searched for in plain text, percent-encoded, escaped for JSON, in hexadecimal, and in base64
at any offset within a longer text.  The secret is never printed.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import os
import tarfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from components.program import Parser, run
from runtime import environment
from runtime.errors import BadData, Refused, WrongParameters

MIN_LENGTH = 12  # of a canary, bytes: a shorter one may occur by chance
CHUNK = 1 << 20
GZIP = b"\x1f\x8b"
Stream = IO[bytes] | gzip.GzipFile


def main(argv: Sequence[str] | None = None) -> None:
    flags = Parser("security.canary", __doc__)
    flags.add_argument(
        "--env", action="append", required=True, metavar="NAME", help="environment variable with a secret"
    )
    flags.add_argument("places", nargs="+", metavar="PLACE")
    args = flags.parse_args(argv)
    secrets = environment.passed_on(tuple(args.env))
    if missing := [name for name in args.env if name not in secrets]:
        raise WrongParameters(f"--env {missing[0]}: is not set; it must contain the secret")
    found = [f"{name}: {line}" for name in args.env for line in find(secrets[name], *map(Path, args.places))]
    if found:
        raise Refused("\n".join(found))
    print(f"{', '.join(args.env)}: not found in {', '.join(args.places)}")


def find(secret: str, *places: Path | tuple[str, bytes]) -> list[str]:
    """All occurrences of a secret, a line each: file, member, form.  places: paths, or (name, bytes).

    Raises BadData for a place that does not exist, WrongParameters for a secret that is too short.
    """
    if len(secret.encode()) < MIN_LENGTH:
        raise WrongParameters(f"a canary must have at least {MIN_LENGTH} bytes")
    patterns = forms(secret)
    return [
        f"{name}: {form}"
        for place in places
        for name, file in _files(place)
        for form in sorted(_forms_in(file, patterns))
    ]


def forms(secret: str) -> dict[str, bytes]:
    """What to search for, by the name of the form.  Forms that equal the secret itself are left out."""
    data = secret.encode()
    found = {
        "as it is": data,
        "percent-encoded": urllib.parse.quote(secret, safe="").encode(),
        "percent-encoded, slashes kept": urllib.parse.quote(secret).encode(),
        "escaped for JSON": json.dumps(secret)[1:-1].encode(),
        "hexadecimal": data.hex().encode(),
        "hexadecimal, upper case": data.hex().upper().encode(),
    }
    for offset in range(3):  # of the first byte within a group of three
        # the characters at both ends depend on the bytes around the secret
        whole = base64.b64encode(b"\0" * offset + data)
        inner = whole[(0, 2, 3)[offset] : len(whole) if (len(data) + offset) % 3 == 0 else -4]
        found[f"base64, offset {offset}"] = inner
        found[f"base64 for URLs, offset {offset}"] = inner.translate(bytes.maketrans(b"+/", b"-_"))
    unique = {pattern: name for name, pattern in reversed(found.items())}
    return {name: pattern for pattern, name in unique.items()}


def _files(place: Path | tuple[str, bytes]) -> Iterator[tuple[str, Stream]]:
    """Every stream of bytes in a place, with its name; packed ones also unpacked."""
    if isinstance(place, tuple):
        yield from _unpacked(place[0], io.BytesIO(place[1]))
        return
    if not place.exists():
        raise BadData(f"{place}: does not exist")
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if path.is_symlink():
            yield str(path), io.BytesIO(os.readlink(path).encode())
        elif path.is_file():
            with open(path, "rb") as file:
                yield from _unpacked(str(path), file)
        yield f"{path} (its name)", io.BytesIO(os.fsencode(path.name))


def _unpacked(name: str, file: IO[bytes]) -> Iterator[tuple[str, Stream]]:
    yield name, file
    file.seek(0)
    magic = file.read(4)
    file.seek(0)
    # a damaged or encrypted archive has been searched as it is
    with contextlib.suppress(zipfile.BadZipFile, tarfile.TarError, RuntimeError, NotImplementedError):
        if magic[:2] == GZIP:
            yield f"{name} (unpacked)", gzip.GzipFile(fileobj=file)
        elif magic == b"PK\x03\x04":
            archive = zipfile.ZipFile(file)
            for member in archive.infolist():
                with archive.open(member) as inner:
                    yield f"{name}: {member.filename}", inner
        elif tarfile.is_tarfile(file):
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as layers:
                for layer in layers:
                    packed = layers.extractfile(layer) if layer.isfile() else None
                    if packed and packed.read(2) == GZIP:
                        packed.seek(0)
                        yield f"{name}: {layer.name} (unpacked)", gzip.GzipFile(fileobj=packed)


def _forms_in(file: Stream, patterns: dict[str, bytes]) -> set[str]:
    """The forms that a stream contains, also across the ends of chunks."""
    found, overlap = set[str](), max(map(len, patterns.values())) - 1
    tail = b""
    try:
        while chunk := file.read(CHUNK):
            window = tail + chunk
            found |= {name for name, pattern in patterns.items() if pattern in window}
            tail = window[-overlap:]
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile):
        pass  # truncated or not gzip: the readable part has been searched
    return found


if __name__ == "__main__":
    run(main)
