"""Sources of images: a list of originals per split, and their bytes.

Classes are identified by WNID (WordNet id, or the name of a class folder); a class index is the rank of its WNID.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.errors import BadData
from vgg.data.images import BadImage

Report = Callable[[int, int], None]  # called with (done, total)


@dataclass(frozen=True, slots=True)
class ImageClass:
    """wnid: identifier; name: for people."""

    wnid: str
    name: str


@dataclass(frozen=True, slots=True)
class Original:
    """One image of a source.

    key: unique in its split, [A-Za-z0-9_-] only, no dots (WebDataset cuts a member's name at its first dot).
    label: class index.  name: path in the source.  stamp: changes when the source file changes.
    size: bytes.  offset: position of the first byte, for an image inside an archive.
    """

    split: str
    key: str
    label: int
    name: str
    stamp: str
    size: int
    offset: int = 0

    def identity(self) -> tuple[str | int, ...]:
        """All fields, for a digest."""
        return self.split, self.key, self.label, self.name, self.stamp, self.size, self.offset

    @property
    def renamed(self) -> bool:
        """The key does not show the name: it ends with a digest of the name."""
        return self.key.endswith("-" + _short_digest(self.name))


class Source(ABC):
    """Sources are small and picklable: read() is called in worker processes."""

    splits: tuple[str, ...] = ("train", "val")
    classes: list[ImageClass]

    @abstractmethod
    def originals(self, split: str) -> list[Original]:
        """All images of a split, in a fixed order."""

    @abstractmethod
    def read(self, original: Original) -> bytes:
        """The image's bytes, unchanged.  Raises BadImage if they cannot be read."""

    def verify(self, report: Report | None = None) -> None:  # noqa: B027  # most sources have no checksums
        """Compare files of the source with published checksums, if any.  Raises BadData.

        report: called with (bytes done, bytes in total).
        """

    def metadata(self) -> dict[str, Any]:
        """Files of the source, as JSON for the manifest."""
        return {}

    def tables(self) -> dict[str, bytes]:
        """Label tables to write beside the shards, by file name."""
        return {}


class Digits(Source):
    """The 1,797 handwritten digits in scikit-learn (UCI, 8x8, 17 grey levels), as 32x32 JPEGs with ILSVRC-like names.

    Every sixth image of a class is for validation: 1,501 training and 296 validation images, the same everywhere.
    """

    SIDE = 32
    NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # not at the top: it imports all of scipy in every worker

        digits = load_digits()
        self.classes = [ImageClass(f"n{digit:08d}", f"digit {name}") for digit, name in enumerate(self.NAMES)]
        self._labels = digits.target.tolist()
        self._images = np.rint(digits.images * (255 / 16)).astype(np.uint8)

    def originals(self, split: str) -> list[Original]:
        found, seen = [], [0] * len(self.classes)
        for number, label in enumerate(self._labels):
            is_val = seen[label] % 6 == 5
            seen[label] += 1
            if is_val == (split == "val"):
                key = f"{self.classes[label].wnid}_{seen[label]}" if split == "train" else f"digits_val_{number:08d}"
                found.append(Original(split, key, label, name=str(number), stamp="1", size=self.SIDE**2 * 3))
        return found

    def read(self, original: Original) -> bytes:
        grey = Image.fromarray(self._images[int(original.name)])
        large = grey.resize((self.SIDE, self.SIDE), Image.Resampling.BICUBIC).convert("RGB")
        file = io.BytesIO()
        large.save(file, "JPEG", quality=95)
        return file.getvalue()


class Folder(Source):
    """<root>/{train,val}/<class>/<image>, as torchvision's ImageFolder reads it.

    Every file counts, by content and not by extension; only names that start with a dot are ignored.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for split in self.splits:
            if not (root / split).is_dir():
                raise BadData(
                    f"{root / split}: no such folder. shard.source 'folder' reads {root}/train/<class>/<image> and "
                    f"{root}/val/<class>/<image>; put or link your images there."
                )
        names = {split: self._class_names(split) for split in self.splits}
        for split, other in (("val", "train"), ("train", "val")):
            if missing := sorted(names[other] - names[split]):
                raise BadData(
                    f"{root / split}: lacks the classes {', '.join(missing)} of {root / other}. "
                    "Both must have the same classes, with at least one image each."
                )
        if len(names["train"]) < 2:
            raise BadData(f"{root / 'train'}: holds {len(names['train'])} class folders; at least two are needed")
        self.classes = [ImageClass(name, name.replace("_", " ")) for name in sorted(names["train"])]

    def _class_names(self, split: str) -> set[str]:
        with os.scandir(self.root / split) as entries:
            folders = [entry for entry in entries if not entry.name.startswith(".")]
        if stray := sorted(entry.name for entry in folders if not entry.is_dir()):
            raise BadData(f"{self.root / split}: {', '.join(stray)}: not in a class folder; move or remove")
        return {entry.name for entry in folders}

    def originals(self, split: str) -> list[Original]:
        found, empty = [], []
        for label, image_class in enumerate(self.classes):
            names = self._files(split, image_class.wnid)
            if not names:
                empty.append(image_class.wnid)
            for name in names:
                status = os.lstat(self.root / name)
                stamp = f"{status.st_size}:{status.st_mtime_ns}"
                key = _key(image_class.wnid, name)
                found.append(Original(split, key, label, name=name, stamp=stamp, size=status.st_size))
        if empty:
            raise BadData(f"{self.root / split}: no images in the classes {', '.join(empty)}")
        return _unique(found)

    def _files(self, split: str, wnid: str) -> list[str]:
        """Paths of a class's files, relative to the root, sorted; subfolders included."""
        names = []

        def unreadable(error: OSError) -> None:
            raise BadData(f"{error.filename}: {error.strerror}")

        for folder, inner, files in os.walk(self.root / split / wnid, onerror=unreadable, followlinks=False):
            inner[:] = [name for name in inner if not name.startswith(".")]
            links = [name for name in inner if os.path.islink(os.path.join(folder, name))]
            for name in [*files, *links]:
                if not name.startswith("."):
                    names.append(os.path.relpath(os.path.join(folder, name), self.root))
        return sorted(names)

    def read(self, original: Original) -> bytes:
        path = os.path.join(self.root, original.name)
        try:
            if stat.S_ISLNK(os.lstat(path).st_mode):
                folder = self.root.joinpath(*Path(original.name).parts[:2])  # of the class; may itself be a link
                if not Path(path).resolve().is_relative_to(folder.resolve()) and os.stat(path):
                    raise BadImage("a link that leads out of the folder")
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: a FIFO would block
            with open(fd, "rb", buffering=0) as file:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise BadImage("not a regular file")
                return file.read()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None


def _key(wnid: str, name: str) -> str:
    """<class>_<stem>, as in n01440764_10026; names that do not fit this form get a digest of the path."""
    stem = Path(*Path(name).parts[2:]).with_suffix("")
    plain = str(stem) if str(stem).startswith(f"{wnid}_") else f"{wnid}_{stem}"
    if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", plain):
        return plain
    return re.sub(r"[^A-Za-z0-9_-]+", "-", plain)[:64] + "-" + _short_digest(name)


def _short_digest(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:12]


def _unique(originals: list[Original]) -> list[Original]:
    """Files that differ only in extension (a.jpg, a.png) would share a key: add a digest of the path."""
    count: dict[str, int] = {}
    for original in originals:
        count[original.key] = count.get(original.key, 0) + 1
    return [o if count[o.key] == 1 else replace(o, key=f"{o.key}-{_short_digest(o.name)}") for o in originals]
