"""python -m components.shard verify <manifest.json or its folder, local or s3://>: is a data set still what it was?

Every file is read and compared with the manifest, several at a time.  Of a broken shard it is said what broke: which
images are damaged or lost, which header, or whose bytes it holds.  Exit 0 if nothing did, 78 with the list otherwise.
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

from components import program, progress, storage
from vgg import manifest
from vgg.errors import Refused
from vgg.index import SCHEMA
from vgg.shards import member_head, padding

NUM_READERS = 8
CHUNK_BYTES = 1 << 20
SHOWN = 5  # keys of damaged images that a line names


class Place(Protocol):
    """What is verified: a folder or a prefix."""

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
    place: Place = Directory(Path(address))
    if storage.is_remote(address):
        from components.s3 import Prefix

        place = Prefix(address)
    with progress.Progress("verify", unit="bytes") as bar:
        found = Check(place, address).run(bar)
    if found.broken:
        listing = "\n".join(f"  {line}" for line in found.broken)
        raise Refused(
            f"{address}: {len(found.broken)} of {found.num_files} files are broken:\n{listing}\n"
            "Restore them (dvc checkout, or a copy), or run the shard stage again."
        )
    program.log.info(
        "%s: %d files, %s bytes, all as the manifest says", address, found.num_files, f"{found.num_bytes:,}"
    )


class Check:
    """One verification.  broken: a line for every file that is not what the manifest says."""

    def __init__(self, place: Place, address: str) -> None:
        """Raises Refused if the manifest itself is missing or damaged."""
        self.place, self.address = place, address
        raw = place.get(manifest.NAME)
        if raw is None:
            raise Refused(f"{address}: has no {manifest.NAME}, so it is no finished data set. Check the address.")
        self.about = manifest.parse(raw, SCHEMA, f"{address}/{manifest.NAME}")
        self.entries: dict[str, dict[str, Any]] = {entry["path"]: entry for entry in self.about["files"]}
        self.num_files, self.num_bytes = len(self.entries), sum(entry["size"] for entry in self.entries.values())
        self.broken: list[str] = []

    def run(self, report: progress.Progress) -> Check:
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
        self.broken = [f"{name}: {self._what_broke(name, *wrong[name])}" for name in sorted(wrong)]
        if strangers := sorted(set(self.place.names()) - self.entries.keys() - {manifest.NAME}):
            program.log.warning("%s: not of this data set: %s", self.address, ", ".join(strangers))
        return self

    def _fingerprint(self, name: str) -> tuple[int, str]:
        """(bytes, sha256) of a file; (-1, "") if it is missing."""
        size, digest = 0, hashlib.sha256()
        try:
            for chunk in self.place.stream(name):
                size += len(chunk)
                digest.update(chunk)
        except Refused:
            return -1, ""
        return size, digest.hexdigest()

    def _what_broke(self, name: str, size: int, sha256: str) -> str:
        if size < 0:
            return "missing"
        if twin := next((path for path, entry in self.entries.items() if entry["sha256"] == sha256), None):
            return f"holds the bytes of {twin}"
        expected = self.entries[name]["size"]
        length = f"has {size:,} bytes instead of {expected:,}" if size != expected else ""
        rows = self._rows(name)
        if rows is None:
            return length or "does not have the sha256 of the manifest"
        data = b"".join(self.place.stream(name))
        lost = [key(row) for row in rows if row["offset"] + row["size"] > len(data)]
        damaged = [key(row) for row in rows if key(row) not in lost and not is_whole(data, row)]
        headers = [key(row) for row in rows if key(row) not in lost and not has_its_headers(data, row)]
        told = [
            length,
            f"{len(lost)} of its {len(rows)} images are lost: {some(lost)}" if lost else "",
            f"{len(damaged)} of its {len(rows)} images are damaged: {some(damaged)}" if damaged else "",
            f"the tar headers or labels of {some(headers)} are damaged" if headers else "",
        ]
        whole = "" if lost or damaged or headers else "its images are whole; padding or what follows them was changed"
        return "; ".join(part for part in (*told, whole) if part)

    def _rows(self, name: str) -> np.ndarray | None:
        """The rows of a shard, from its split's index if that is sound; None if it is no shard, or it is not."""
        for split in self.about["splits"].values():
            shards = [shard["path"] for shard in split["shards"]]
            if name not in shards:
                continue
            raw = self.place.get(split["index"]) or b""
            if hashlib.sha256(raw).hexdigest() != self.entries[split["index"]]["sha256"]:
                return None
            rows = np.load(io.BytesIO(raw), allow_pickle=False)
            of_shard: np.ndarray = rows[rows["shard"] == shards.index(name)]
            return of_shard
        return None


def key(row: Any) -> str:
    return bytes(row["key"]).decode()


def is_whole(data: bytes, row: Any) -> bool:
    return bool(google_crc32c.value(data[row["offset"] : row["offset"] + row["size"]]) == row["crc32c"])


def has_its_headers(data: bytes, row: Any) -> bool:
    """Whether the label's member and the image's header, just before the image, are those that packing wrote."""
    label, end = str(row["label"]).encode(), int(row["offset"])
    expected = member_head(f"{key(row)}.cls", len(label)) + label + padding(len(label))
    expected += member_head(f"{key(row)}.jpg", int(row["size"]))
    return data[end - len(expected) : end] == expected


def some(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN:,} more" if len(keys) > SHOWN else "")
