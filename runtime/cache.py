"""A node's own copy of shards that live elsewhere: <sha256>.tar files, fetched once, verified, bounded in bytes.

The name is the content, so two shard sets, ranks or pods share a directory without knowing of each other.  What they
agree on are flocks, which a killed process loses by itself: one per entry (who downloads it) and one for the directory
(who makes room).  A file being downloaded counts with its whole size from the beginning.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import Refused, StorageFailure
from runtime.manifest import storage_errors

Entry = dict[str, Any]  # of a manifest: path, size in bytes, sha256
DOWNLOADS = 5  # of one entry before its bytes are called wrong
TOUCH_SECONDS = 5.0  # how exactly use is remembered, for the least recently used to go first
POLL_SECONDS = 0.05  # between two looks for room while others download
OURS = re.compile(r"[0-9a-f]{64}(\.[a-z0-9]+)?")
PART, LOCK = ".part", ".lock"


class Cache:
    """Files of manifest entries in a directory of at most `max_bytes`.  Picklable; good over a fork.

    fetch: writes the whole content of an entry into a file; raises a Problem.
    Every reading method raises what fetch raises, Refused when its bytes are wrong again and again, and StorageFailure
    when the disk is full or the entry is larger than the cache.
    """

    def __init__(self, directory: Path, max_bytes: int, fetch: Callable[[Entry, BinaryIO], None]) -> None:
        self.directory, self.max_bytes, self.fetch = directory, max_bytes, fetch
        self._touched: dict[str, float] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_touched": {}}

    def path(self, entry: Entry) -> Path:
        """The local file of an entry, fetched if it is not there.  It stays until its room is needed."""
        os.close(self._open(entry))
        return self._place(entry)

    def read(self, entry: Entry, offset: int, size: int) -> bytes:
        """Bytes of an entry; fewer only at its end."""
        # opened anew each time: a descriptor that is kept would keep the room of a file that had to go
        fd = self._open(entry)
        try:
            with storage_errors(self._place(entry)):
                return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def heal(self, entry: Entry) -> bool:
        """Whether the cached file is damaged or gone; the next read fetches it again.

        False is the truth of this moment: another process may have healed it since the read that failed, so read once
        more before the shard itself is called bad.
        """
        with self._locked(self._place(entry)):
            fd = self._present(entry)
            if fd is None:
                return True
            with open(fd, "rb") as file:
                damaged: bool = hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]
            if damaged:
                self._place(entry).unlink(missing_ok=True)
            return damaged

    def verify(self, entry: Entry) -> None:
        """Drop a cached file that is damaged."""
        self.heal(entry)

    def _place(self, entry: Entry) -> Path:
        return self.directory / f"{entry['sha256']}{Path(entry['path']).suffix}"

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with storage_errors(path), open(path.with_name(path.name + LOCK), "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # closing would not do: a process forked meanwhile has the descriptor too
                fcntl.flock(file, fcntl.LOCK_UN)

    def _present(self, entry: Entry) -> int | None:
        """A descriptor of the cached file, or None."""
        try:
            fd = os.open(self._place(entry), os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(fd).st_size == entry["size"]:
            return fd
        os.close(fd)
        return None

    def _open(self, entry: Entry) -> int:
        """A descriptor of the entry's file, which reads it even if the file is evicted the next moment."""
        fd = self._present(entry)
        if fd is None:
            with self._locked(self._place(entry)):
                fd = self._present(entry)
                if fd is None:
                    fd = self._download(entry)
        now = time.monotonic()
        if now - self._touched.get(entry["sha256"], -TOUCH_SECONDS) >= TOUCH_SECONDS:
            self._touched[entry["sha256"]] = now
            os.utime(fd)
        return fd

    def _download(self, entry: Entry) -> int:
        """Fetch an entry whose lock is held, and return a descriptor of it."""
        place = self._place(entry)
        part = place.with_name(place.name + PART)
        try:
            with storage_errors(place):
                self._reserve(part, entry)
                with open(part, "r+b") as file:
                    self._fill(file, entry)
                    os.fsync(file.fileno())
                    os.replace(part, place)
                    return os.dup(file.fileno())
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _fill(self, file: BinaryIO, entry: Entry) -> None:
        for _ in range(DOWNLOADS):
            file.seek(0)
            checked = _Checked(file, entry["size"])
            self.fetch(entry, checked)  # type: ignore[arg-type]  # only write() is wanted
            file.flush()
            if checked.size == entry["size"] and checked.sha256.hexdigest() == entry["sha256"]:
                return
        raise Refused(
            f"{entry['path']}: downloaded {DOWNLOADS} times, never with the size and sha256 of the manifest. It is "
            "damaged where it is stored: restore it or shard again."
        )

    def _reserve(self, part: Path, entry: Entry) -> None:
        """Make a file of the entry's size for a download, once there is room; the least recently used go."""
        size = entry["size"]
        if size > self.max_bytes:
            raise StorageFailure(
                f"{entry['path']}: has {size:,} bytes, but the cache {self.directory} may hold {self.max_bytes:,}. "
                f"Set VGG_CACHE_BYTES to some times {size:,}."
            )
        while True:
            with self._locked(self.directory / "room"):
                if self._room(size, part):
                    with open(part, "wb") as file:
                        file.truncate(size)
                    return
            time.sleep(POLL_SECONDS)

    def _room(self, size: int, part: Path) -> bool:
        """Whether there is room for `size` bytes now, after all eviction that is possible.  The directory is locked."""
        used, evictable = 0, []
        for found in os.scandir(self.directory):
            name = found.name.removesuffix(PART)
            if not OURS.fullmatch(name) or found.name == part.name:
                continue
            with contextlib.suppress(FileNotFoundError):  # renamed or healed meanwhile: then it is counted too high
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
        """Whether nobody downloads an entry of which there is a part."""
        with open(self.directory / (name + LOCK), "wb") as file:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
        return False


class _Checked:
    """Writes through to a file, no further than its size, and hashes what goes by."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self.file, self.limit, self.size, self.sha256 = file, limit, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.sha256.update(data)
        if self.size <= self.limit:
            self.file.write(data)
        return len(data)
