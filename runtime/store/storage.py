"""Locations of artefacts.  An argument is a local path, s3://bucket/prefix, or 'store:<path>' below VGG_STORE.

VGG_STORE is not a parameter, so a section of params.yaml hashes the same on a laptop and on a cluster.  An output path
may contain {key}, which is replaced by the digest of the stage's identity: every run gets its own location, and a
retry finds the work of the run before it.  An input may end with '#<digest>', the expected digest of the directory.

Shards in an object store are read through a cache of this node: VGG_CACHE (a folder, by default in the user's cache
folder) of at most VGG_CACHE_BYTES (by default four fifths of its disk).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from runtime import environment, filesystem, manifest
from runtime.errors import Refused, WrongParameters

if TYPE_CHECKING:
    from runtime.shards.cache import Cache
    from runtime.shards.shardset import ShardSet

log = logging.getLogger("vgg")

KEY_DIGITS = 16
UNKNOWN_BYTES = 250 * 10**9  # of a cache whose file system does not tell its size; ImageNet has 147 GB
DIGEST = re.compile(r"#([0-9a-f]{32}\.dir)$")


def resolve(path: str, key: Any = None) -> str:
    """The local path or s3:// address of an argument.  key: JSON value whose digest replaces {key}.

    Raises WrongParameters for any other address.
    """
    location = DIGEST.sub("", path)
    if "{key}" in location:
        if key is None:
            raise WrongParameters(f"{path}: {{key}} is for outputs only")
        location = location.replace("{key}", manifest.digest_of(key)[:KEY_DIGITS])
    if location.startswith("store:"):
        if not (store := environment.STORE.get()):
            raise WrongParameters(
                f"{path}: VGG_STORE is not set; set it to the folder or s3:// address of shards and checkpoints"
            )
        location = os.path.join(store, location.removeprefix("store:"))
    if "://" in location and not is_remote(location):
        raise WrongParameters(f"{location}: neither a local path nor s3://bucket/prefix")
    return location


def is_remote(location: str) -> bool:
    return location.startswith("s3://")


def locate(path: str) -> Path:
    """The local path of an argument that may not be remote.  Raises WrongParameters for s3:// too."""
    location = resolve(path)
    if is_remote(location):
        raise WrongParameters(f"{location}: images are read from a local folder; mount or copy them")
    return Path(location)


def expect(path: str, digest: str) -> None:
    """Raise Refused if an input's '#<digest>' is not `digest`, the actual one."""
    wanted = DIGEST.search(path)
    if wanted and wanted[1] != digest:
        raise Refused(f"{path}: has digest {digest} now, changed since the pipeline recorded it; run its stage again.")


def address(location: Path | str, digest: str) -> str:
    """Location and digest in one text, as a pipeline passes them on."""
    store, text = environment.STORE.get().rstrip("/"), str(location)
    if store and text.startswith(f"{store}/"):
        text = f"store:{text.removeprefix(f'{store}/')}"
    return f"{text}#{digest}"


def open_shards(path: str) -> ShardSet:
    """The shards of an argument, local or in an object store.  Raises Refused if they are not finished or damaged."""
    from runtime.shards.shardset import BLOCK_SHARDS, SCHEMA, ShardSet

    location = resolve(path)
    if not is_remote(location):
        return ShardSet(Path(location))
    from runtime.shards.cache import Cache
    from runtime.store.s3 import Prefix

    prefix = Prefix(location)
    raw = prefix.get(manifest.NAME)
    if raw is None:
        raise Refused(
            f"{location}: has no {manifest.NAME}, so it is not finished. Run the shard stage, or check the address."
        )
    parsed = manifest.parse(raw, SCHEMA, f"{location}/{manifest.NAME}")
    folder = cache_folder()
    cache = Cache(folder / "shards", cache_bytes(folder), prefix.fetch)
    largest = sorted(entry["size"] for entry in parsed["files"])[-BLOCK_SHARDS:]
    if sum(largest) > cache.max_bytes:
        log.warning(
            "VGG_CACHE_BYTES: %s is less than the %s bytes of shards that are shuffled together: they will be "
            "downloaded repeatedly", f"{cache.max_bytes:,}", f"{sum(largest):,}",
        )  # fmt: skip
    directory = folder / "sets" / parsed["sha256"]
    entries = {entry["path"]: entry for entry in parsed["files"]}
    for split in parsed["splits"].values():
        _copy(cache, entries[split["index"]], directory)
    manifest.write_atomically(directory / manifest.NAME, lambda file: file.write(raw))
    return ShardSet(directory, cache, location)


def _copy(cache: Cache, entry: dict[str, Any], directory: Path) -> None:
    """Copy a file from the cache, which may evict it, into a folder."""
    with contextlib.suppress(Refused):
        manifest.verify_file(directory, entry)
        return

    def fill(file: BinaryIO) -> None:
        with open(cache.path(entry), "rb") as cached:
            shutil.copyfileobj(cached, file)

    manifest.write_atomically(directory / entry["path"], fill)
    try:
        manifest.verify_file(directory, entry)
    except Refused:  # the cached file was damaged: fetch it again
        cache.heal(entry)
        manifest.write_atomically(directory / entry["path"], fill)
        manifest.verify_file(directory, entry)


def cache_folder() -> Path:
    """This node's folder for caches.  Raises WrongParameters if it cannot be created."""
    folder = environment.cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        raise WrongParameters(
            f"VGG_CACHE: the folder {folder} cannot be created ({reason}). Set VGG_CACHE to a writable folder."
        ) from None
    return folder


def cache_bytes(folder: Path) -> int:
    return environment.CACHE_BYTES.get() or (filesystem.total_bytes(folder) or UNKNOWN_BYTES) * 4 // 5
