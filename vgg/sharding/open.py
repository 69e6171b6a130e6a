"""Opens the source named by shard.source."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from vgg.sharding.editions import EDITIONS
from vgg.sharding.huggingface import HuggingFace
from vgg.sharding.ilsvrc import Archives
from vgg.sharding.labelled import Labelled
from vgg.sharding.layouts import LAYOUTS
from vgg.sharding.scenes import DigitScenes
from vgg.sharding.sources import Digits, Folder, Source


def temporary_folder() -> Path:
    return Path(tempfile.gettempdir())


def open_source(kind: str, images: Path, scratch: Callable[[], Path] = temporary_folder) -> Source:
    """images: the folder to read (unused for embedded data).  scratch: gives a folder for large temporary files."""
    if kind == "digits":
        return Digits()
    if kind == "digit-scenes":
        return DigitScenes()
    if kind == "folder":
        return Folder(images)
    if kind == "huggingface":
        return HuggingFace(images, scratch)
    if kind in LAYOUTS:
        return Labelled(images, LAYOUTS[kind])
    return Archives(images, EDITIONS[kind])
