"""python -m components.shard verify <manifest.json or its folder, local or s3://>: checks a whole data set.

Reads every file, several at a time, and compares it with the manifest.  For a damaged shard it reports the damaged or
missing images and headers, or the shard whose bytes it holds.  Exit 0 if all files are intact, else 78 with a list.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np

from components import program, progress
from runtime import manifest
from runtime.errors import Refused
from runtime.shards.shardset import SCHEMA
from runtime.store import storage
from runtime.wording import listing, some
from vgg.sharding.pack import member_head, padding

NUM_READERS = 8
CHUNK_BYTES = 1 << 20


class Location(Protocol):
    """A folder, or a prefix of an object store."""

    def names(self) -> list[str]: ...
    def get(self, name: str) -> bytes | None: ...
    def stream(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, in chunks.  Raises Refused if it is missing."""


class Directory:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def names(self) -> list[str]:
        return [path.name for path in self.directory.iterdir()] if self.directory.is_dir() else []

    def get(self, name: str) -> bytes | None:
        path = self.directory / name
        return path.read_bytes() if path.is_file() else None

    def stream(self, name: str) -> Iterator[bytes]:
        try:
            with open(self.directory / name, "rb", buffering=0) as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except (FileNotFoundError, IsADirectoryError):
            raise Refused("missing") from None


def main(argv: Sequence[str]) -> None:
    flags = program.Parser("components.shard verify", __doc__)
    flags.add_argument("manifest", help="manifest.json or its folder, a local path, store:<path> or s3://bucket/prefix")
    args: argparse.Namespace = flags.parse_args(argv)
    address = storage.resolve(args.manifest).removesuffix(f"/{manifest.NAME}").removesuffix(manifest.NAME) or "."
    location: Location = Directory(Path(address))
    if storage.is_remote(address):
        from runtime.store.s3 import Prefix

        location = Prefix(address)
    with progress.Progress("verify", unit="bytes") as bar:
        check = Check(location, address)
        check.run(bar)
    if check.damaged:
        raise Refused(
            f"{address}: {len(check.damaged)} of {check.num_files} files are damaged:\n{listing(check.damaged)}\n"
            "Restore them (dvc checkout --force, or a copy), or run the shard stage again.",
            [*check.damaged, *check.images],
        )
    program.log.info("%s: %d files, %s bytes, all intact", address, check.num_files, f"{check.num_bytes:,}")


class Check:
    """One verification.  After run(), damaged has a line for every file that differs from the manifest, and images one
    for every image of these files that is lost or damaged."""

    def __init__(self, location: Location, address: str) -> None:
        """Raises Refused if the manifest itself is missing or damaged."""
        self.location, self.address = location, address
        raw = location.get(manifest.NAME)
        if raw is None:
            raise Refused(f"{address}: no {manifest.NAME}: not a finished data set. Check the address.")
        self.manifest = manifest.parse(raw, SCHEMA, f"{address}/{manifest.NAME}")
        self.entries: dict[str, dict[str, Any]] = {entry["path"]: entry for entry in self.manifest["files"]}
        self.num_files, self.num_bytes = len(self.entries), sum(entry["size"] for entry in self.entries.values())
        self.damaged: list[str] = []
        self.images: list[str] = []

    def run(self, report: progress.Progress) -> None:
        done, wrong = 0, {}
        with ThreadPoolExecutor(NUM_READERS) as readers:
            running = {readers.submit(self._fingerprint, name): name for name in self.entries}
            try:
                for finished in as_completed(running):
                    name, (size, sha256) = running[finished], finished.result()
                    done += self.entries[name]["size"]
                    report(done, self.num_bytes)
                    if (size, sha256) != (self.entries[name]["size"], self.entries[name]["sha256"]):
                        wrong[name] = (size, sha256)
            finally:
                readers.shutdown(cancel_futures=True)
        self.damaged = [f"{name}: {self._describe(name, *wrong[name])}" for name in sorted(wrong)]
        if unknown := sorted(set(self.location.names()) - self.entries.keys() - {manifest.NAME}):
            program.log.warning("%s: not part of this data set: %s", self.address, some(unknown))

    def _fingerprint(self, name: str) -> tuple[int, str]:
        """(bytes, sha256) of a file; (-1, "") if it is missing."""
        size, digest = 0, hashlib.sha256()
        try:
            for chunk in self.location.stream(name):
                size += len(chunk)
                digest.update(chunk)
        except Refused:
            return -1, ""
        return size, digest.hexdigest()

    def _describe(self, name: str, size: int, sha256: str) -> str:
        """The damage of a file with this size and sha256, as precisely as the index allows."""
        if size < 0:
            return "missing"
        if twin := next((path for path, entry in self.entries.items() if entry["sha256"] == sha256), None):
            return f"holds the bytes of {twin}"
        expected = self.entries[name]["size"]
        length = f"has {size:,} bytes instead of {expected:,}" if size != expected else ""
        rows = self._rows(name)
        if rows is None:
            return length or "wrong sha256"
        data = b"".join(self.location.stream(name))
        lost = [key(row) for row in rows if row["offset"] + row["size"] > len(data)]
        damaged = [key(row) for row in rows if key(row) not in lost and not is_intact(data, row)]
        headers = [key(row) for row in rows if key(row) not in lost and not has_intact_headers(data, row)]
        for what, keys in (("lost", lost), ("damaged", damaged), ("header or label damaged", headers)):
            self.images += [f"{name}: {key}: {what}" for key in keys]
        findings = [
            length,
            f"{len(lost)} of its {len(rows)} images are lost: {some(lost)}" if lost else "",
            f"{len(damaged)} of its {len(rows)} images are damaged: {some(damaged)}" if damaged else "",
            f"the tar headers or labels of {some(headers)} are damaged" if headers else "",
            "" if lost or damaged or headers else "all images are intact; padding or trailing bytes differ",
        ]
        return "; ".join(finding for finding in findings if finding)

    def _rows(self, name: str) -> np.ndarray | None:
        """The rows of a shard, from its split's index; None if the file is not a shard or the index is damaged."""
        for split in self.manifest["splits"].values():
            shards = [shard["path"] for shard in split["shards"]]
            if name not in shards:
                continue
            raw = self.location.get(split["index"]) or b""
            if hashlib.sha256(raw).hexdigest() != self.entries[split["index"]]["sha256"]:
                return None
            rows = np.load(io.BytesIO(raw), allow_pickle=False)
            selected: np.ndarray = rows[rows["shard"] == shards.index(name)]
            return selected
        return None


def key(row: Any) -> str:
    return bytes(row["key"]).decode()


def is_intact(data: bytes, row: Any) -> bool:
    return bool(google_crc32c.value(data[row["offset"] : row["offset"] + row["size"]]) == row["crc32c"])


def has_intact_headers(data: bytes, row: Any) -> bool:
    """Whether the label's member and the image's header, just before the image, are as packing writes them."""
    label, end = str(row["label"]).encode(), int(row["offset"])
    expected = member_head(f"{key(row)}.cls", len(label)) + label + padding(len(label))
    expected += member_head(f"{key(row)}.jpg", int(row["size"]))
    return data[end - len(expected) : end] == expected
