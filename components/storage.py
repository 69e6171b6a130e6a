"""Where artefacts lie.  A path on the command line is a local path, or 'store:<path>' below VGG_STORE.

VGG_STORE is an address and no parameter, so that a section hashes the same on a laptop and on a cluster.  An output
path may hold {key}: it becomes the digest of what the stage is made from, which gives every run a place of its own and
lets a retried one find what it had done.  An input may carry '#<digest>', which must then be the directory's.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from vgg import manifest
from vgg.errors import Refused, WrongParameters

KEY_DIGITS = 16
DIGEST = re.compile(r"#([0-9a-f]{32}\.dir)$")


def locate(path: str, key: Any = None) -> Path:
    """The local path of an argument.  key: JSON value that {key} stands for the digest of.

    Raises WrongParameters for a scheme that cannot be read.
    """
    place = DIGEST.sub("", path)
    if "{key}" in place:
        if key is None:
            raise WrongParameters(f"{path}: {{key}} stands only in outputs")
        place = place.replace("{key}", manifest.digest_of(key)[:KEY_DIGITS])
    if place.startswith("store:"):
        if "VGG_STORE" not in os.environ:
            raise WrongParameters(
                f"{path}: VGG_STORE is not set; it names the folder where shards and checkpoints live"
            )
        place = os.path.join(os.environ["VGG_STORE"], place.removeprefix("store:"))
    if "://" in place:
        raise WrongParameters(f"{place}: only local folders can be read so far; copy it, or mount it and set VGG_STORE")
    return Path(place)


def expect(path: str, digest: str) -> None:
    """Raise Refused if an input's '#<digest>' is not the digest of what lies there."""
    wanted = DIGEST.search(path)
    if wanted and wanted[1] != digest:
        raise Refused(
            f"{path}: holds {digest} now. It has been changed since the pipeline recorded it; run its stage again."
        )


def address(path: Path, digest: str) -> str:
    """Path and digest in one text, as a pipeline passes it on."""
    store = os.environ.get("VGG_STORE")
    place = str(path)
    if store and path.is_relative_to(store):
        place = f"store:{path.relative_to(store)}"
    return f"{place}#{digest}"
