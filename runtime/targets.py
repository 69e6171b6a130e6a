"""Targets: the folder or object store prefix that a stage writes to, with one interface for both.

Files are written atomically, and their checksums are computed while writing.  Locks are flocks, which the kernel
releases when a process is killed.  Targets are picklable: every process
that packs shards writes its own files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from runtime import filesystem, manifest
from runtime.errors import Preempted

Fill = Callable[[BinaryIO], object]


def holding(data: bytes) -> Fill:
    """A Fill that writes these bytes."""
    return lambda file: file.write(data)


class Target(Protocol):
    """A place for files.  name: its address, for messages."""

    name: str

    def names(self) -> list[str]:
        """Names of all files, sorted; in a folder without the hidden ones, of Finder, Jupyter or NFS."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it does not exist."""

    def write(self, name: str, fill: Fill) -> dict[str, Any]:
        """Write a file with `fill`; returns its manifest entry (path, size, sha256, md5).

        Raises StorageFailure when the disk is full, Unreachable when the store does not answer.
        """

    def holds(self, entry: dict[str, Any]) -> bool:
        """Whether the file of a manifest entry exists with its size and checksums."""

    def delete(self, name: str) -> None:
        """Delete a file, if it exists."""

    def free_bytes(self) -> int | None:
        """Free space, bytes; None if it is not limited or not known."""


class HashingWriter:
    """Writes to a file and computes its checksums on the way, so that the file need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size = file, 0
        self._sha256, self._md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self._sha256.update(data)
        self._md5.update(data)
        return self.file.write(data)

    def entry(self, name: str) -> dict[str, Any]:
        """The manifest entry of the file."""
        return {"path": name, "size": self.size, "sha256": self._sha256.hexdigest(), "md5": self._md5.hexdigest()}


class Directory:
    """A local folder; created if it does not exist."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.name = directory, str(directory)
        directory.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir() if not path.name.startswith("."))

    def read(self, name: str) -> bytes | None:
        try:
            return (self.directory / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, fill: Fill) -> dict[str, Any]:
        entry: dict[str, Any] = {}

        def hashed(file: BinaryIO) -> None:
            writer = HashingWriter(file)
            fill(writer)  # type: ignore[arg-type]  # a Fill only calls write()
            entry.update(writer.entry(name))

        manifest.write_atomically(self.directory / name, hashed)
        return entry

    def holds(self, entry: dict[str, Any]) -> bool:
        try:
            return manifest.file_entry(self.directory, entry["path"], md5="md5" in entry) == entry
        except OSError:
            return False

    def delete(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        return filesystem.free_bytes(self.directory)


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Lock an output directory; the lock of a killed process is released by the kernel.

    Raises Preempted (run again) if another process holds the lock.
    """
    path = manifest.sibling(directory, ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        if not filesystem.lock(file):
            file.seek(0)
            holder = file.read(20).decode(errors="replace")
            raise Preempted(
                f"{directory}: {f'process {holder}' if holder.isdecimal() else 'another process'} is writing there; "
                "wait for it or stop it"
            )
        with contextlib.suppress(OSError):  # only for that message; the disk may be full
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield


class Output:
    """A local output directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the write lock.  Raises Preempted (run again) if another process holds it."""
        with only_writer(self.directory):
            yield

    def download(self) -> Path:
        return self.directory

    def upload(self) -> None: ...
    def download_checkpoints(self) -> None: ...
    def upload_checkpoints(self, only_add: bool = False) -> None: ...
