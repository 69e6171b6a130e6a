"""Opens the source named by shard.source."""

from __future__ import annotations

from pathlib import Path

from vgg.sharding.editions import EDITIONS
from vgg.sharding.ilsvrc import Archives
from vgg.sharding.sources import Digits, Folder, Source


def open_source(kind: str, images: Path) -> Source:
    """images: the folder to read (unused for the digits)."""
    if kind == "digits":
        return Digits()
    if kind == "folder":
        return Folder(images)
    return Archives(images, EDITIONS[kind])
