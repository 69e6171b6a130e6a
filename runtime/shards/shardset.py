"""A directory of shards: its files, and verified random access by index.

    {train,val}-%05d.tar     plain WebDataset tars, members <key>.cls and <key>.jpg
    {train,val}.index.npy    a row per image: location of its JPEG, label, size, checksum
    manifest.json            classes, counts, parameters, mean pixel; sha256 of every file; written last
    {train,val}-%05d.idx, _info.json    the same shards for DALI and timm; label tables of ILSVRC editions

The tar headers and the .idx files are for other readers.  This one uses {train,val}.index.npy: random access, exact
resume, a checksum per image.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from runtime import manifest
from runtime.errors import Refused

SCHEMA = "vgg.shards/2"
BLOCK_SHARDS = 64  # shards that are shuffled together: a node caches that many when shards are in an object store
MAX_OPEN = 128  # open shards per process: twice BLOCK_SHARDS, far below the usual limit of 1,024
NUM_READERS = 4  # threads for verification: sha256 releases the GIL, and disks are faster with a queue


def row_type(key_bytes: int) -> np.dtype[Any]:
    """Type of a row of the index.  offset, size: of the JPEG in its shard, bytes.  width, height: pixels."""
    return np.dtype(
        [
            ("shard", "<u4"),
            ("offset", "<u8"),
            ("size", "<u4"),
            ("label", "<u4"),
            ("width", "<u4"),
            ("height", "<u4"),
            ("crc32c", "<u4"),
            ("key", f"S{key_bytes}"),
        ]
    )


class ShardFiles(Protocol):
    """Access to the bytes of shards; picklable, for worker processes.

    entry: manifest entry of a shard: path, size, sha256.
    """

    def read(self, entry: dict[str, Any], offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset`, fewer if the shard ends before."""

    def heal(self, entry: dict[str, Any]) -> bool:
        """Called when an image did not match its checksum.  Returns whether to read it again."""

    def verify(self, entry: dict[str, Any]) -> None:
        """Raises Refused, naming the file, unless it has the size and sha256 of its entry."""


class LocalShards:
    """Shards in a local folder; files are kept open."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a worker process opens the files itself

    def __del__(self) -> None:
        for fd in self._open.values():
            os.close(fd)

    def read(self, entry: dict[str, Any], offset: int, size: int) -> bytes:
        name = entry["path"]
        try:
            return os.pread(self._descriptor(name), size, offset)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        os.close(self._open.pop(name))  # a file server that was restarted may not know the opened file any more
        return os.pread(self._descriptor(name), size, offset)

    def _descriptor(self, name: str) -> int:
        if name not in self._open:
            if len(self._open) >= MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            try:
                self._open[name] = os.open(self.directory / name, os.O_RDONLY)
            except FileNotFoundError:
                raise Refused(
                    f"{self.directory / name}: missing. Restore it (dvc checkout --force) or shard again."
                ) from None
        return self._open[name]

    def heal(self, entry: dict[str, Any]) -> bool:  # noqa: ARG002
        return False  # no other copy exists

    def verify(self, entry: dict[str, Any]) -> None:
        manifest.verify_file(self.directory, entry)


@dataclass
class Split:
    """The images of one split.

    address: of the shard set, for messages.  shards: manifest entries; rows["shard"] is an index into them.
    rows: the index, a memory-mapped structured array of row_type.
    """

    name: str
    address: str
    shards: list[dict[str, Any]]
    rows: np.ndarray
    files: ShardFiles

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int) -> bytes:
        """The JPEG of row `number`.  Raises Refused, naming shard and key, if its checksum does not match."""
        row = self.rows[number]
        entry, wanted = self.shards[row["shard"]], (int(row["offset"]), int(row["size"]))
        data = self.files.read(entry, *wanted)
        if google_crc32c.value(data) != row["crc32c"] and self.files.heal(entry):
            data = self.files.read(entry, *wanted)
        if google_crc32c.value(data) != row["crc32c"]:
            raise Refused(
                f"{self.address}/{self.where(number)}: the image does not match its checksum. "
                "The shard is damaged: restore it (dvc checkout --force) or shard again."
            )
        return data

    def key(self, number: int) -> str:
        return bytes(self.rows[number]["key"]).decode()

    def where(self, number: int) -> str:
        """Shard and key of an image, for messages."""
        return f"{self.shards[self.rows[number]['shard']]['path']}: {self.key(number)}"


class ShardSet:
    """A finished set of shards.  Opening it verifies the manifest and the indexes; verify() reads everything.

    directory: contains the manifest and the indexes.  files: access to the shards, by default in `directory`.
    address: name of the set in messages, by default the directory.
    Raises Refused if anything is missing or damaged.
    """

    def __init__(self, directory: Path, files: ShardFiles | None = None, address: str | None = None) -> None:
        self.directory, self.address = directory, address or str(directory)
        self.files = files or LocalShards(directory)
        self.manifest = manifest.read(directory, SCHEMA)
        self.digest = manifest.directory_digest(directory, self.manifest)
        self.wnids: list[str] = [c["wnid"] for c in self.manifest["classes"]]
        self.class_names: list[str] = [c["name"] for c in self.manifest["classes"]]
        self.classes_sha256: str = self.manifest["classes_sha256"]
        self.mean: list[float] = self.manifest["pixels"]["mean"]
        self.std: list[float] = self.manifest["pixels"]["std"]
        self._entries: dict[str, dict[str, Any]] = {entry["path"]: entry for entry in self.manifest["files"]}
        for split in self.manifest["splits"].values():
            manifest.verify_file(directory, self._entries[split["index"]])

    def split(self, name: str) -> Split:
        entry = self.manifest["splits"][name]
        try:
            rows = np.load(self.directory / entry["index"], mmap_mode="r", allow_pickle=False)
        except OSError as error:
            if error.errno != errno.ENODEV:  # FUSE with direct_io cannot map files
                raise
            rows = np.load(self.directory / entry["index"], allow_pickle=False)
        if len(rows) != entry["num_images"]:
            raise Refused(f"{self.address}/{entry['index']}: {len(rows)} rows instead of {entry['num_images']}")
        return Split(name, self.address, [self._entries[s["path"]] for s in entry["shards"]], rows, self.files)

    def costs(self) -> NDArray[np.uint8] | None:
        """The cost of taking a class for another, uint8 (classes, classes), which ILSVRC-2010 has; None if unknown."""
        entry = self._entries.get("cost_matrix.npy")
        if entry is None:
            return None
        self.files.verify(entry)
        costs: NDArray[np.uint8] = np.load(io.BytesIO(self.files.read(entry, 0, entry["size"])), allow_pickle=False)
        return costs

    def verify(self, rank: int = 0, world_size: int = 1, report: Callable[[int, int], None] | None = None) -> None:
        """Verify size and sha256 of this rank's share of the files.  Raises Refused, naming the file.

        report: called with (bytes done, total bytes).
        """
        share = self.manifest["files"][rank::world_size]
        total, done = sum(entry["size"] for entry in share), 0
        with ThreadPoolExecutor(NUM_READERS) as readers:
            checks = [readers.submit(self.files.verify, entry) for entry in share]
            try:
                for entry, check in zip(share, checks, strict=True):
                    check.result()
                    done += entry["size"]
                    if report:
                        report(done, total)
            finally:
                readers.shutdown(cancel_futures=True)
