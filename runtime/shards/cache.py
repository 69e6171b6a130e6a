"""A node's cache of remote shards: <sha256>.tar files, downloaded once, verified, bounded in bytes.

Files are named by their content, so several shard sets, ranks and pods can share a directory.  They synchronise with
flocks, which the kernel releases when a process is killed: one per entry (its download) and one for the directory
(eviction).  A file being downloaded counts with its whole size from the start.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from runtime import filesystem
from runtime.errors import Refused, StorageFailure
from runtime.manifest import storage_errors

Entry = dict[str, Any]  # of a manifest: path, size in bytes, sha256
DOWNLOADS = 5  # of one entry before it is refused as damaged
TOUCH_SECONDS = 5.0  # resolution of the time of last use, which decides on eviction
POLL_SECONDS = 0.05  # between two tries to reserve space while others download
OURS = re.compile(r"[0-9a-f]{64}(\.[a-z0-9]+)?")
PART, LOCK = ".part", ".lock"


class Cache:
    """Files of manifest entries in a directory of at most `max_bytes`.  Picklable; fork-safe.

    fetch: writes the whole content of an entry into a file; raises a Problem.
    Every reading method raises what fetch raises, Refused if every download is damaged, and StorageFailure if the disk
    is full or the entry is larger than the cache.
    """

    def __init__(self, directory: Path, max_bytes: int, fetch: Callable[[Entry, BinaryIO], None]) -> None:
        self.directory, self.max_bytes, self.fetch = directory, max_bytes, fetch
        self._touched: dict[str, float] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_touched": {}}

    def path(self, entry: Entry) -> Path:
        """The local file of an entry, downloaded if necessary.  It may be evicted at any time."""
        os.close(self._open(entry))
        return self._location(entry)

    def read(self, entry: Entry, offset: int, size: int) -> bytes:
        """Bytes of an entry; fewer only at its end."""
        # opened for each read: an open descriptor would hold the space of an evicted file
        fd = self._open(entry)
        try:
            with storage_errors(self._location(entry)):
                return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def heal(self, entry: Entry) -> bool:
        """Whether the cached file is damaged or gone; the next read fetches it again.

        On False, read once more before refusing the shard: another process may have healed the file since the read
        that failed.
        """
        with self._locked(self._location(entry)):
            fd = self._present(entry)
            if fd is None:
                return True
            with open(fd, "rb") as file:
                damaged: bool = hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]
            if damaged:
                self._location(entry).unlink(missing_ok=True)
            return damaged

    def verify(self, entry: Entry) -> None:
        """Drop a cached file that is damaged."""
        self.heal(entry)

    def _location(self, entry: Entry) -> Path:
        return self.directory / f"{entry['sha256']}{Path(entry['path']).suffix}"

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with storage_errors(path), open(path.with_name(path.name + LOCK), "wb") as file:
            filesystem.lock(file, wait=True)
            try:
                yield
            finally:
                filesystem.unlock(file)

    def _present(self, entry: Entry) -> int | None:
        """A descriptor of the cached file, or None."""
        try:
            fd = os.open(self._location(entry), os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(fd).st_size == entry["size"]:
            return fd
        os.close(fd)
        return None

    def _open(self, entry: Entry) -> int:
        """A descriptor of the entry's file, which stays readable if the file is evicted."""
        fd = self._present(entry)
        if fd is None:
            with self._locked(self._location(entry)):
                fd = self._present(entry)
                if fd is None:
                    fd = self._download(entry)
        now = time.monotonic()
        if now - self._touched.get(entry["sha256"], -TOUCH_SECONDS) >= TOUCH_SECONDS:
            self._touched[entry["sha256"]] = now
            with contextlib.suppress(OSError):  # a cache of another user, or mounted read-only
                os.utime(fd)
        return fd

    def _download(self, entry: Entry) -> int:
        """Fetch an entry whose lock is held, and return a descriptor of it."""
        path = self._location(entry)
        part = path.with_name(path.name + PART)
        try:
            with storage_errors(path):
                self._reserve(part, entry)
                with open(part, "r+b") as file:
                    self._fill(file, entry)
                    filesystem.fsync(file.fileno())
                    os.replace(part, path)
                    return os.dup(file.fileno())
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _fill(self, file: BinaryIO, entry: Entry) -> None:
        for _ in range(DOWNLOADS):
            file.seek(0)
            checked = _Checked(file, entry["size"])
            self.fetch(entry, checked)  # type: ignore[arg-type]  # needs only write()
            file.flush()
            if checked.size == entry["size"] and checked.sha256.hexdigest() == entry["sha256"]:
                return
        raise Refused(
            f"{entry['path']}: downloaded {DOWNLOADS} times, never with the size and sha256 of the manifest. It is "
            "damaged in the store: restore it or shard again."
        )

    def _reserve(self, part: Path, entry: Entry) -> None:
        """Create a file of the entry's size for a download; wait for space, evicting the least recently used files."""
        size = entry["size"]
        if size > self.max_bytes:
            raise StorageFailure(
                f"{entry['path']}: has {size:,} bytes, but the cache {self.directory} may hold {self.max_bytes:,}. "
                f"Set VGG_CACHE_BYTES to a multiple of {size:,}."
            )
        while True:
            with self._locked(self.directory / "room"):
                if self._make_room(size, part):
                    with open(part, "wb") as file:
                        file.truncate(size)
                    return
            time.sleep(POLL_SECONDS)

    def _make_room(self, size: int, part: Path) -> bool:
        """Evict files until `size` bytes fit; returns whether they do.  The directory is locked."""
        used, evictable = 0, []
        for found in os.scandir(self.directory):
            name = found.name.removesuffix(PART)
            if not OURS.fullmatch(name) or found.name == part.name:
                continue
            with contextlib.suppress(FileNotFoundError):  # renamed or healed meanwhile: the sum is too high then
                status = found.stat()
                used += status.st_size
                if found.name == name or self._abandoned(name):
                    evictable.append((status.st_mtime_ns, found.name, status.st_size))
        for _, name, freed in sorted(evictable):
            if used + size <= self.max_bytes:
                break
            (self.directory / name).unlink(missing_ok=True)
            used -= freed
        return used + size <= self.max_bytes

    def _abandoned(self, name: str) -> bool:
        """Whether no process downloads the entry of a partial file."""
        with open(self.directory / (name + LOCK), "wb") as file:
            return filesystem.lock(file, required=True)


class _Checked:
    """Writes to a file, at most `limit` bytes, and hashes all data."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self.file, self.limit, self.size, self.sha256 = file, limit, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.sha256.update(data)
        if self.size <= self.limit:
            self.file.write(data)
        return len(data)
