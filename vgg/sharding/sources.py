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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from runtime.errors import BadData
from runtime.wording import counted, listing
from vgg.data.images import BadImage
from vgg.sharding.names import encoded, local, text

Report = Callable[[int, int], None]  # called with (done, total)

# names of files that are never images: hidden ones, notes of Windows, lists and descriptions of the images
NOT_IMAGES = re.compile(r"\..*|thumbs\.db|desktop\.ini|.*\.(txt|csv|xml|json|md)", re.IGNORECASE | re.DOTALL)
LIKE_IMAGES = re.compile(r".*\.(jpe?g|png|webp|bmp|gif|tiff?|p[bgp]m)", re.IGNORECASE | re.DOTALL)


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


class Stray(NamedTuple):
    """Something in a source that cannot become an image of a class; it counts as an unusable image.

    split, name: as of an Original.  reason: for people.
    """

    split: str
    name: str
    reason: str


class Source(ABC):
    """Sources are small and picklable: read() is called in worker processes."""

    splits: tuple[str, ...] = ("train", "val")
    classes: list[ImageClass]
    strays: Sequence[Stray] = ()
    passed_over: Mapping[str, int] = MappingProxyType({})  # numbers of files that are never images, by ending
    linked_folders: Sequence[str] = ()

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
    images: uint8 (1797, 8, 8), by the number that is an original's name.
    """

    SIDE = 32
    NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # not at the top: it imports all of scipy in every worker

        digits = load_digits()
        self.classes = [ImageClass(f"n{digit:08d}", f"digit {name}") for digit, name in enumerate(self.NAMES)]
        self._labels = digits.target.tolist()
        self.images = np.rint(digits.images * (255 / 16)).astype(np.uint8)

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
        grey = Image.fromarray(self.images[int(original.name)])
        large = grey.resize((self.SIDE, self.SIDE), Image.Resampling.BICUBIC).convert("RGB")
        file = io.BytesIO()
        large.save(file, "JPEG", quality=95)
        return file.getvalue()


class Folder(Source):
    """<root>/{train,val}/<class>/<image>, as torchvision's ImageFolder reads it: links are followed.

    Every file counts, by content and not by extension, but those that no one means as images (NOT_IMAGES).
    """

    strays: list[Stray]
    passed_over: Counter[str]
    linked_folders: list[str]

    def __init__(self, root: Path) -> None:
        """Raises BadData if a split is missing or has no class folder with files, or there are fewer than two classes.

        All other faults of the layout are strays, to be reported with the unusable images.
        """
        self.root = root
        self.strays, self.passed_over, self.linked_folders = [], Counter(), []
        for split in self.splits:
            if not (root / split).is_dir():
                raise BadData(
                    f"{root / split}: no such folder. shard.source 'folder' reads {root}/train/<class>/<image> and "
                    f"{root}/val/<class>/<image>; put or link your images there."
                )
        folders = {split: self._class_folders(split) for split in self.splits}
        names = {name for split in self.splits for name, files in folders[split].items() if files}
        for split in self.splits:
            known = {stray.name for stray in self.strays}
            empty = [f"{split}/{name}" for name in sorted(folders[split].keys() - names)]
            self.strays += [Stray(split, name, "a folder without images") for name in empty if name not in known]
            if not names & folders[split].keys():
                raise self._no_classes(split, f"holds no class folder with images; expected {split}/<class>/<image>")
        if len(names) < 2:
            raise self._no_classes("train", f"holds {counted(len(names), 'class folder')}; at least two are needed")
        self.classes = [ImageClass(name, name.replace("_", " ")) for name in sorted(names)]
        self._files = folders

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def _no_classes(self, split: str, what: str) -> BadData:
        found = [f"{stray.name}: {stray.reason}" for stray in self.strays if stray.split == split]
        return BadData(f"{self.root / split}: {what}" + (f":\n{listing(found)}" if found else ""), found)

    def _class_folders(self, split: str) -> dict[str, list[str]]:
        """Paths of all files, relative to the root and sorted, by class folder."""
        found, above = {}, (self._identity("."), self._identity(split))
        for entry in self._entries(split):
            folder = text(entry.name)
            name = f"{split}/{folder}"
            if self._is_folder(entry, name):
                found[folder] = sorted(self._walk(split, name, above))
            elif not self._is_passed_over(entry.name):
                exists = os.path.exists(self.root / local(name))
                self.strays.append(Stray(split, name, "not in a class folder" if exists else "a link to nothing"))
        return found

    def _walk(self, split: str, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        """Paths of a folder's files, relative to the root; subfolders included.  above: the folders that hold it."""
        identity = self._identity(folder)
        if identity in above:
            self.strays.append(Stray(split, folder, "a link to a folder that holds it"))
            return
        for entry in self._entries(folder):
            name = f"{folder}/{text(entry.name)}"
            if self._is_folder(entry, name):
                inner = list(self._walk(split, name, (*above, identity)))
                if not inner and LIKE_IMAGES.fullmatch(entry.name):
                    self.strays.append(Stray(split, name, "a folder, not an image"))
                yield from inner
            elif not self._is_passed_over(entry.name):
                yield name

    def _identity(self, folder: str) -> tuple[int, int]:
        try:
            status = os.stat(self.root / local(folder))
        except OSError as error:
            raise BadData(f"{error.filename}: {error.strerror}") from None
        return status.st_dev, status.st_ino

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """Raises BadData if the folder cannot be read: nothing is known of its images."""
        try:
            with os.scandir(self.root / local(folder)) as entries:
                return sorted(entries, key=lambda entry: text(entry.name))
        except OSError as error:
            raise BadData(f"{error.filename}: {error.strerror}") from None

    def _is_folder(self, entry: os.DirEntry[str], name: str) -> bool:
        """Whether to walk into it: folders whose names start with a dot are passed over as files are."""
        try:
            is_folder = entry.is_dir() and not entry.name.startswith(".")
        except OSError:  # a loop of links
            return False
        if is_folder and entry.is_symlink():
            self.linked_folders.append(name)
        return is_folder

    def _is_passed_over(self, name: str) -> bool:
        if NOT_IMAGES.fullmatch(name) is None:
            return False
        self.passed_over[".*" if name.startswith(".") else Path(name).suffix.lower()] += 1
        return True

    def metadata(self) -> dict[str, Any]:
        """passed_over: numbers of files that are never images, by ending."""
        return {"passed_over": dict(self.passed_over)} if self.passed_over else {}

    def originals(self, split: str) -> list[Original]:
        found = []
        for label, image_class in enumerate(self.classes):
            for name in self._files[split].get(image_class.wnid, ()):
                try:
                    status = os.stat(
                        self.root / local(name)
                    )  # of the target: a link that stays may lead to another image
                    size, stamp = status.st_size, f"{status.st_size}:{status.st_mtime_ns}"
                except OSError:
                    size, stamp = 0, "unreadable"  # read() says why
                found.append(Original(split, _key(image_class.wnid, name), label, name=name, stamp=stamp, size=size))
        return _unique(found)

    def read(self, original: Original) -> bytes:
        path = os.path.join(self.root, local(original.name))
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: a FIFO would block
            with open(fd, "rb", buffering=0) as file:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise BadImage("not a regular file")
                return file.read()
        except FileNotFoundError as error:
            is_link = os.path.islink(path)
            why = f"a link to nothing: {os.readlink(path)}" if is_link else f"cannot be read: {error.strerror}"
            raise BadImage(why) from None
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None


def _key(wnid: str, name: str) -> str:
    """<class>_<stem>, as in n01440764_10026; names that do not fit this form get a digest of the path."""
    stem = Path(*Path(name).parts[2:]).with_suffix("")
    plain = str(stem) if str(stem).startswith(f"{wnid}_") else f"{wnid}_{stem}"
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}", plain):  # with a dash first it would look like an option
        return plain
    return re.sub(r"[^A-Za-z0-9_-]+", "-", plain).lstrip("-")[:64] + "-" + _short_digest(name)


def _short_digest(name: str) -> str:
    return hashlib.sha256(encoded(name)).hexdigest()[:12]


def _unique(originals: list[Original]) -> list[Original]:
    """Files that differ only in extension (a.jpg, a.png) would share a key: add a digest of the path."""
    count: dict[str, int] = {}
    for original in originals:
        count[original.key] = count.get(original.key, 0) + 1
    return [o if count[o.key] == 1 else replace(o, key=f"{o.key}-{_short_digest(o.name)}") for o in originals]
