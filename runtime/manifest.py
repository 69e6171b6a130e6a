"""A finished directory: its files, and a manifest.json written last that says so.

The manifest lists size, sha256 and md5 of every file beside it and carries a digest of itself, so one flipped byte
anywhere in the directory is found, and the file is named.  Readers verify before they parse.  Shards and checkpoints
both stand on this one primitive.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import Refused, StorageFailure

NAME = "manifest.json"


class OtherSchema(Refused):
    """An undamaged manifest, of another kind of directory."""


def canonical_json(value: Any) -> bytes:
    """The one text of a JSON value, which is what is hashed: sorted keys, no spaces, ASCII (a name may be no UTF-8)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_entry(directory: Path, name: str, md5: bool = True) -> dict[str, Any]:
    """What the manifest says of one file: path, size in bytes, sha256, and the md5 that DVC keys its cache by.

    md5: false for what DVC never sees; it takes longer than the sha256.
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
    """The digest DVC 3 gives a directory that holds exactly these files: 32 hex digits and '.dir'."""
    listing = sorted(({"md5": e["md5"], "relpath": e["path"]} for e in entries), key=lambda e: e["relpath"])
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full or failing disk into one message with the path and the room that is left."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG):
            raise
        place = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(place).free
        raise StorageFailure(
            f"{error.filename or path}: {error.strerror} ({free:,} bytes free). "
            "Make room or choose another place, then run the same command again; finished work is kept."
        ) from error


def sibling(directory: Path, ending: str) -> Path:
    """The path beside a directory that has its name and an ending: '.previous', '.lock'."""
    directory = directory.resolve()  # the name of "." is empty
    return directory.with_name(directory.name + ending)


def fsync_directory(directory: Path) -> None:
    """Make renames and deletions inside a directory survive a power failure."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Let `fill` write a file that appears at `path` whole or not at all, and stays after a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")  # in pods all are process 1
    try:
        with storage_errors(path):
            with open(temporary, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and programs, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def text(manifest: dict[str, Any]) -> bytes:
    """The one text of a manifest.json."""
    return (json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def compose(schema: str, body: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of a finished directory.  `entries` are the file_entry() of every file in it."""
    manifest = {**body, "schema": schema, "files": entries}
    if all("md5" in entry for entry in entries):
        manifest["dvc_digest"] = dvc_digest(entries)
    manifest["sha256"] = digest_of(manifest)
    return manifest


def write(directory: Path, schema: str, body: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Declare a directory finished; returns its manifest."""
    manifest = compose(schema, body, entries)
    write_atomically(directory / NAME, lambda file: file.write(text(manifest)))
    return manifest


def read(directory: Path, schema: str) -> dict[str, Any]:
    """The manifest of a finished directory, itself verified.  The files beside it are not read yet.

    Raises Refused if it is missing, damaged, or of another schema.
    """
    path = directory / NAME
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Refused(
            f"{path}: missing, so {directory} is not finished. Run the stage that makes it, or check the path."
        ) from None
    return parse(raw, schema, str(path))


def parse(raw: bytes, schema: str, where: str) -> dict[str, Any]:
    """A manifest from its text.  Raises Refused, naming `where`, if it is damaged or of another schema."""
    try:
        manifest = json.loads(raw)
        body = {name: value for name, value in manifest.items() if name != "sha256"}
        intact = digest_of(body) == manifest["sha256"] and raw == text(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise Refused(f"{where}: damaged (its digest does not match). Restore it (dvc checkout) or make it again.")
    if manifest["schema"] != schema:
        raise OtherSchema(f"{where}: holds {manifest['schema']}, but {schema} is needed here. Check the path.")
    return dict(manifest)


def schema_of(raw: bytes) -> str:
    """What a manifest says that it is; parse() finds out whether it is one."""
    try:
        return str(json.loads(raw)["schema"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def verify_file(directory: Path, entry: dict[str, Any]) -> None:
    """Raise Refused, naming the file, unless it has the size and sha256 that the manifest says."""
    path = directory / entry["path"]
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            found = hashlib.file_digest(file, "sha256").hexdigest() if size == entry["size"] else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Refused(f"{path}: missing. Restore it (dvc checkout) or make {directory} again.") from None
    if found is None:
        what = f"has {size:,} bytes instead of {entry['size']:,}"
    elif found != entry["sha256"]:
        what = "does not have the sha256 of its manifest"
    else:
        return
    raise Refused(f"{path}: {what}. It is damaged: restore it (dvc checkout) or make {directory} again.")


def directory_digest(directory: Path, manifest: dict[str, Any]) -> str:
    """The digest dvc.lock records for the whole directory, manifest included.  Reads only the manifest."""
    return dvc_digest([*manifest["files"], file_entry(directory, NAME)])
