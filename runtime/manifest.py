"""Finished directories: files and a manifest.json, which is written last.

The manifest lists size, sha256 and md5 of every file in the directory, and a digest of itself, so that a single
corrupted byte is detected and the file is named.  Readers verify before they parse.  Shards and checkpoints both use
this format.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from runtime import filesystem
from runtime.errors import Refused, StorageFailure

NAME = "manifest.json"


class OtherSchema(Refused):
    """An intact manifest of another schema."""


def canonical_json(value: Any) -> bytes:
    """The canonical encoding of a JSON value, for hashing: sorted keys, no spaces, ASCII (names may not be UTF-8)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sealed(body: dict[str, Any]) -> bytes:
    """A JSON object in one line, with its own sha256: what unsealed() returns is what was written."""
    return canonical_json({**body, "sha256": digest_of(body)}) + b"\n"


def unsealed(raw: bytes) -> dict[str, Any] | None:
    """The object that sealed() wrote; None if a single byte of it differs: after a power loss, of a failing disk."""
    try:
        body = json.loads(raw)
        del body["sha256"]
        return dict(body) if sealed(body) == raw else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def file_entry(directory: Path, name: str, md5: bool = True) -> dict[str, Any]:
    """The manifest entry of a file: path, size in bytes, sha256 and, for DVC's cache, md5.

    md5: False for files that DVC does not track; md5 takes longer than sha256.
    """
    path = directory / name
    with open(path, "rb") as file:
        entry = {"path": name, "size": os.fstat(file.fileno()).st_size}
        entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        if md5:
            file.seek(0)
            entry["md5"] = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return entry


def dvc_digest(entries: Iterable[dict[str, Any]]) -> str:
    """The digest that DVC 3 computes for a directory with exactly these files: 32 hex digits and '.dir'."""
    listing = sorted(({"md5": e["md5"], "relpath": e["path"]} for e in entries), key=lambda e: e["relpath"])
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


@contextmanager
def storage_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Raises StorageFailure, with path and free bytes, for OSErrors of a full or failing disk; others get the path.

    path: what is written; errors of write() have no path.  needed: its size in bytes, if known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            if error.filename is None and error.errno == errno.EFBIG:
                error.filename = str(path)
            raise
        where = failed_path(error) or str(path)
        bytes_needed = f"{needed:,} bytes needed, " if needed else ""
        raise StorageFailure(
            f"{where}: {error.strerror} ({bytes_needed}{_free_bytes(Path(where))}). "
            "Free some space or choose another location, then run the same command again; finished work is kept."
        ) from error


def failed_path(error: OSError) -> str | None:
    """The file that an error is about.  Of a copy, Python names the source first, also if the target's disk is full."""
    path = error.filename if error.errno == errno.EIO else error.filename2 or error.filename
    return None if path is None else os.fsdecode(path) if isinstance(path, str | bytes) else str(path)


def _free_bytes(path: Path) -> str:
    """Free space of the disk of a path, in words; the path need not exist."""
    for existing in (path, *path.absolute().parents):
        with suppress(OSError):
            free = filesystem.free_bytes(existing)
            return "free space unknown" if free is None else f"{free:,} bytes free"
    return "free space unknown"


def sibling(directory: Path, ending: str) -> Path:
    """The path next to a directory with its name and an ending, for example '.previous' or '.lock'."""
    directory = directory.resolve()  # the name of "." is empty
    return directory.with_name(directory.name + ending)


def write_atomically(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically and durably.  fill: writes the content."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")  # in pods every PID is 1
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                fill(file)
                file.flush()
                filesystem.fsync(file.fileno())
            os.replace(temporary, path)
            filesystem.fsync_directory(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def text(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest.json; every manifest has exactly one valid encoding."""
    return (json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def compose(schema: str, body: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of a finished directory.  entries: file_entry() of every file in it."""
    manifest = {**body, "schema": schema, "files": entries}
    if all("md5" in entry for entry in entries):
        manifest["dvc_digest"] = dvc_digest(entries)
    manifest["sha256"] = digest_of(manifest)
    return manifest


def write(directory: Path, schema: str, body: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the manifest of a finished directory; returns it."""
    manifest = compose(schema, body, entries)
    write_atomically(directory / NAME, lambda file: file.write(text(manifest)))
    return manifest


def read(directory: Path, schema: str) -> dict[str, Any]:
    """The verified manifest of a finished directory.  Its files are not read.

    Raises Refused if it is missing, damaged, or of another schema.
    """
    path = directory / NAME
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Refused(
            f"{path}: missing, so {directory} is not finished. Run the stage that creates it, or check the path."
        ) from None
    return parse(raw, schema, str(path))


def parse(raw: bytes, schema: str, where: str) -> dict[str, Any]:
    """Parse and verify a manifest.  Raises Refused, naming `where`, if it is damaged or of another schema."""
    try:
        manifest = json.loads(raw)
        body = {name: value for name, value in manifest.items() if name != "sha256"}
        intact = digest_of(body) == manifest["sha256"] and raw == text(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise Refused(f"{where}: damaged (its digest does not match). Restore it (dvc checkout) or create it again.")
    if manifest["schema"] != schema:
        raise OtherSchema(f"{where}: contains {manifest['schema']}, expected {schema}. Check the path.")
    return dict(manifest)


def schema_of(raw: bytes) -> str:
    """The schema that a manifest states, unverified; empty if it has none.  parse() verifies it."""
    try:
        return str(json.loads(raw)["schema"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def verify_file(directory: Path, entry: dict[str, Any]) -> None:
    """Raises Refused, naming the file, unless it has the size and sha256 of its manifest entry."""
    path = directory / entry["path"]
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            found = hashlib.file_digest(file, "sha256").hexdigest() if size == entry["size"] else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Refused(f"{path}: missing. Restore it (dvc checkout) or create {directory} again.") from None
    if found is None:
        what = f"has {size:,} bytes instead of {entry['size']:,}"
    elif found != entry["sha256"]:
        what = "does not have the sha256 of its manifest"
    else:
        return
    raise Refused(f"{path}: {what}. It is damaged: restore it (dvc checkout) or create {directory} again.")


def directory_digest(directory: Path, manifest: dict[str, Any]) -> str:
    """The digest that dvc.lock records for the directory, including the manifest.  Reads only the manifest."""
    return digest_with((directory / NAME).read_bytes(), manifest)


def digest_with(raw: bytes, manifest: dict[str, Any]) -> str:
    """The same of a directory that may be elsewhere.  raw: the bytes of its manifest."""
    own = {"path": NAME, "md5": hashlib.md5(raw, usedforsecurity=False).hexdigest()}
    return dvc_digest([*manifest["files"], own])
