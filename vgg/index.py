"""What a directory of shards holds, and how it is read: by index, verified.

    {train,val}-%05d.tar     plain WebDataset tars, members <key>.cls and <key>.jpg
    {train,val}.index.npy    a row per image: where its JPEG lies, its label, size and checksum
    manifest.json            classes, counts, parameters, mean pixel; sha256 of every file; written last

The tar headers are for other readers.  Ours goes by the index: random access, exact resume, a checksum per image.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from PIL import Image

from vgg import manifest
from vgg.errors import Refused
from vgg.images import BadImage, decode

SCHEMA = "vgg.shards/1"
MAX_OPEN = 128  # shards a process holds open: twice what is shuffled together, far below a usual limit of 1,024
NUM_READERS = 4  # of verification: sha256 releases the GIL, disks like a queue


def row_type(key_bytes: int) -> np.dtype[Any]:
    """A row of the index.  offset, size: of the JPEG inside its shard, bytes.  width, height: pixels."""
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


@dataclass
class Split:
    """The images of one split.  rows: the index, a structured array of row_type, memory-mapped."""

    directory: Path
    name: str
    shards: list[str]
    rows: np.ndarray
    _files: dict[int, int] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # a worker process opens its own

    def read(self, number: int) -> bytes:
        """The JPEG of row `number`.  Raises Refused, naming shard and key, if its checksum does not match."""
        row = self.rows[number]
        shard = int(row["shard"])
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.directory / self.shards[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], int(row["size"]), int(row["offset"]))
        if google_crc32c.value(data) != row["crc32c"]:
            raise Refused(
                f"{self.directory / self.shards[shard]}: {self.key(number)}: the image does not match its checksum. "
                "The shard is damaged: restore it (dvc checkout) or shard again."
            )
        return data

    def image(self, number: int, max_pixels: int) -> Image.Image:
        """The decoded image of row `number`, RGB.  Raises Refused, naming shard and key, if it cannot be decoded."""
        try:
            return decode(self.read(number), max_pixels)
        except BadImage as reason:
            raise Refused(f"{self.directory}/{self.where(number)}: {reason}. Shard again.") from None

    def key(self, number: int) -> str:
        return bytes(self.rows[number]["key"]).decode()

    def where(self, number: int) -> str:
        """Shard and key of an image, for messages."""
        return f"{self.shards[int(self.rows[number]['shard'])]}: {self.key(number)}"


class ShardSet:
    """A finished directory of shards.  Opening it verifies the manifest and the indexes; verify() reads everything.

    Raises Refused if anything is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = manifest.read(directory, SCHEMA)
        self.digest = manifest.directory_digest(directory, self.manifest)
        self.wnids: list[str] = [c["wnid"] for c in self.manifest["classes"]]
        self.class_names: list[str] = [c["name"] for c in self.manifest["classes"]]
        self.classes_sha256: str = self.manifest["classes_sha256"]
        self.mean: list[float] = self.manifest["pixels"]["mean"]
        self.std: list[float] = self.manifest["pixels"]["std"]
        for entry in self.manifest["files"]:
            if not entry["path"].endswith(".tar"):
                manifest.verify_file(directory, entry)

    def split(self, name: str) -> Split:
        about = self.manifest["splits"][name]
        rows = np.load(self.directory / about["index"], mmap_mode="r", allow_pickle=False)
        if len(rows) != about["num_images"]:
            raise Refused(
                f"{self.directory / about['index']}: {len(rows)} rows, the manifest says {about['num_images']}"
            )
        return Split(self.directory, name, [shard["path"] for shard in about["shards"]], rows)

    def verify(self, rank: int = 0, world_size: int = 1, report: Callable[[int, int], None] | None = None) -> None:
        """Check size and sha256 of this rank's share of the shards.  report: called with (bytes done, bytes in all)."""
        share = [entry for entry in self.manifest["files"] if entry["path"].endswith(".tar")][rank::world_size]
        total, done = sum(entry["size"] for entry in share), 0
        with ThreadPoolExecutor(NUM_READERS) as readers:
            checks = [readers.submit(manifest.verify_file, self.directory, entry) for entry in share]
            try:
                for entry, check in zip(share, checks, strict=True):
                    check.result()
                    done += entry["size"]
                    if report:
                        report(done, total)
            finally:
                readers.shutdown(cancel_futures=True)
