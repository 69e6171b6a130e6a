"""Where artefacts lie.  An argument is a local path, s3://bucket/prefix, or 'store:<path>' below VGG_STORE.

VGG_STORE is an address and no parameter, so that a section hashes the same on a laptop and on a cluster.  An output
path may hold {key}: it becomes the digest of what the stage is made from, which gives every run a place of its own and
lets a retried one find what it had done.  An input may carry '#<digest>', which must then be the directory's.

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

from vgg import manifest
from vgg.errors import Refused, WrongParameters

if TYPE_CHECKING:
    from vgg.cache import Cache
    from vgg.index import ShardSet

log = logging.getLogger("vgg")

KEY_DIGITS = 16
DIGEST = re.compile(r"#([0-9a-f]{32}\.dir)$")


def resolve(path: str, key: Any = None) -> str:
    """The local path or s3:// address that an argument means.  key: JSON value that {key} stands for the digest of.

    Raises WrongParameters for what is neither.
    """
    place = DIGEST.sub("", path)
    if "{key}" in place:
        if key is None:
            raise WrongParameters(f"{path}: {{key}} stands only in outputs")
        place = place.replace("{key}", manifest.digest_of(key)[:KEY_DIGITS])
    if place.startswith("store:"):
        if "VGG_STORE" not in os.environ:
            raise WrongParameters(
                f"{path}: VGG_STORE is not set; it names the folder or s3:// address where shards and checkpoints live"
            )
        place = os.path.join(os.environ["VGG_STORE"], place.removeprefix("store:"))
    if "://" in place and not is_remote(place):
        raise WrongParameters(f"{place}: neither a local path nor s3://bucket/prefix")
    return place


def is_remote(place: str) -> bool:
    return place.startswith("s3://")


def locate(path: str) -> Path:
    """The local path of an argument that has to be one.  Raises WrongParameters for s3:// too."""
    place = resolve(path)
    if is_remote(place):
        raise WrongParameters(f"{place}: images are read from a folder; mount it, or copy them here")
    return Path(place)


def expect(path: str, digest: str) -> None:
    """Raise Refused if an input's '#<digest>' is not the digest of what lies there."""
    wanted = DIGEST.search(path)
    if wanted and wanted[1] != digest:
        raise Refused(
            f"{path}: holds {digest} now. It has been changed since the pipeline recorded it; run its stage again."
        )


def address(place: Path | str, digest: str) -> str:
    """Place and digest in one text, as a pipeline passes it on."""
    store, text = os.environ.get("VGG_STORE", "").rstrip("/"), str(place)
    if store and text.startswith(f"{store}/"):
        text = f"store:{text.removeprefix(f'{store}/')}"
    return f"{text}#{digest}"


def open_shards(path: str) -> ShardSet:
    """The shards of an argument, local or in an object store.  Raises Refused if they are not finished or damaged."""
    from vgg.index import BLOCK_SHARDS, SCHEMA, ShardSet

    place = resolve(path)
    if not is_remote(place):
        return ShardSet(Path(place))
    from components.s3 import Prefix
    from vgg.cache import Cache

    prefix = Prefix(place)
    raw = prefix.get(manifest.NAME)
    if raw is None:
        raise Refused(
            f"{place}: has no {manifest.NAME}, so it is not finished. Run the shard stage, or check the address."
        )
    about = manifest.parse(raw, SCHEMA, f"{place}/{manifest.NAME}")
    folder = cache_folder()
    cache = Cache(folder / "shards", cache_bytes(folder), prefix.fetch)
    largest = sorted(entry["size"] for entry in about["files"])[-BLOCK_SHARDS:]
    if sum(largest) > cache.max_bytes:
        log.warning(
            "VGG_CACHE_BYTES: %s is less than the %s bytes of shards that are shuffled together: they will be fetched "
            "over and over", f"{cache.max_bytes:,}", f"{sum(largest):,}",
        )  # fmt: skip
    directory = folder / "sets" / about["sha256"]
    entries = {entry["path"]: entry for entry in about["files"]}
    for split in about["splits"].values():
        _copy(cache, entries[split["index"]], directory)
    manifest.write_atomically(directory / manifest.NAME, lambda file: file.write(raw))
    return ShardSet(directory, cache, place)


def _copy(cache: Cache, entry: dict[str, Any], directory: Path) -> None:
    """A file out of the cache, where it could be evicted, into a folder where it stays."""
    with contextlib.suppress(Refused):
        return manifest.verify_file(directory, entry)

    def fill(file: BinaryIO) -> None:
        with open(cache.path(entry), "rb") as cached:
            shutil.copyfileobj(cached, file)

    return manifest.write_atomically(directory / entry["path"], fill)


def cache_folder() -> Path:
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vgg"
    folder = Path(os.environ.get("VGG_CACHE") or usual)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_bytes(folder: Path) -> int:
    chosen = os.environ.get("VGG_CACHE_BYTES")
    if chosen is None:
        return shutil.disk_usage(folder).total * 4 // 5
    if not chosen.isdigit() or not int(chosen):
        raise WrongParameters(f"VGG_CACHE_BYTES: {chosen!r} is no number of bytes")
    return int(chosen)
