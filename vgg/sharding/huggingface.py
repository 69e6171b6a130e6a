"""Parquet files of Hugging Face, such as imagenet-1k.

Images are packed in permuted order, but one in parquet can only be read together with its row group, which is 100 to a
million images.  So their bytes are copied once, in order, to a scratch file; then each image is one read, as from an
archive.  The scratch file takes as much space as the images (ImageNet: 150 GB).  It has no name: it goes with this
process, however that ends.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from runtime import filesystem
from runtime.errors import BadData, StorageFailure
from runtime.manifest import storage_errors
from runtime.wording import counted, listing, some
from vgg.data.images import BadImage
from vgg.sharding.names import escaped, local, text
from vgg.sharding.parquet import Damaged, Table, read_images, read_table
from vgg.sharding.sources import ImageClass, Original, Source

log = logging.getLogger("vgg.shards")
SPLIT = re.compile(r"(?:^|[-_.])(train|validation|valid|val)(?=[-_.]|$)")  # in the name of a file, or of its folder
PUBLISHED = re.compile(r"(.+)_(n\d{8})\.JPEG", re.ASCII)  # image.path of imagenet-1k: the published name, the WNID
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}", re.ASCII)
CLASSES = "classes.txt"

Keys = dict[str, list[str]]  # of all rows, by split


class HuggingFace(Source):
    """The images of train-*.parquet, and validation-*.parquet or val-*.parquet, in a folder and those below.

    Class names are the lines of classes.txt if it exists, else those in the files' schema.  A class index is the label.
    The paths of imagenet-1k hold WNIDs and published names: then classes, keys and order are those of the archives.
    """

    def __init__(self, root: Path, scratch: Callable[[], Path]) -> None:
        """scratch: gives the folder of the scratch file.  Raises BadData if a split has no files."""
        self.root, self.scratch = root, scratch
        self.files, others = _files(root)
        if missing := [split for split, names in self.files.items() if not names]:
            raise BadData(
                f"{root}: no {' and no '.join(missing)} files. shard.source 'huggingface' reads train-*.parquet, and "
                "validation-*.parquet or val-*.parquet, there and in folders below. To use another split, link its "
                f"files under such names{': ' + some(others) if others else ''}."
            )
        if others:
            log.info("%s of other splits passed over: %s", counted(len(others), "file"), some(others))
        self._scratch_path, self._fd = "", -1

    def __getstate__(self) -> dict[str, Any]:
        return {"_scratch_path": self._scratch_path, "_fd": -1}  # a worker only reads images

    @property
    def classes(self) -> list[ImageClass]:  # type: ignore[override]
        """By label.  Raises BadData, as originals() does."""
        return self._described[1]

    def originals(self, split: str) -> list[Original]:
        """All images of a split: by class and key for train, by key for val.

        The first call copies the images to the scratch file.  Raises BadData that lists everything that is wrong, and
        StorageFailure if there is no space.
        """
        return self._copied[split]

    def read(self, original: Original) -> bytes:
        try:
            if self._fd < 0:
                self._fd = os.open(self._scratch_path, os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._fd, original.size, original.offset)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None

    def metadata(self) -> dict[str, Any]:
        """Name, size in bytes and number of rows of every file."""
        tables = [table for several in self._described[0].values() for table in several]
        return {"files": [{"name": t.name, "size": t.size, "num_rows": len(t.labels)} for t in tables]}

    @cached_property
    def _described(self) -> tuple[dict[str, list[Table]], list[ImageClass], Keys]:
        """Tables by split, classes, keys.  Reads schemas, labels and paths of all files."""
        findings: list[str] = []
        tables = {split: list(self._tables(names, findings)) for split, names in self.files.items()}
        every = [table for several in tables.values() for table in several]
        names = self._class_names(every, findings) if every else []
        for table in every if names else []:
            wrong = [f"row {row}: {label}" for row, label in enumerate(table.labels) if not 0 <= label < len(names)]
            if wrong:
                what = f"{counted(len(wrong), 'label')} of no class (0 to {len(names) - 1})"
                findings.append(f"{table.name}: {what}: {some(wrong)}")
        self._refuse(findings)
        labels = {split: [label for table in several for label in table.labels] for split, several in tables.items()}
        paths = {split: [path for table in several for path in table.paths] for split, several in tables.items()}
        wnids, keys = _published(len(names), labels, paths) or (names, _keys(paths))
        return tables, [ImageClass(wnid, name) for wnid, name in zip(wnids, names, strict=True)], keys

    def _tables(self, names: list[str], findings: list[str]) -> Iterator[Table]:
        for name in names:
            try:
                yield read_table(self.root / local(name), name)
            except Damaged as reason:
                findings.append(f"{name}: {reason}")

    def _class_names(self, tables: list[Table], findings: list[str]) -> list[str]:
        first, path = tables[0], self.root / CLASSES
        if others := [table.name for table in tables if table.classes != first.classes]:
            findings.append(f"other classes than in {first.name}: {some(others)}")
        names = first.classes or []
        try:
            names = path.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            if not names:
                findings.append(
                    f"{first.name}: no class names in its schema. Write them to {path}: line 1 is label 0, and so on"
                )
                return []
        except (OSError, UnicodeDecodeError) as error:
            findings.append(f"{CLASSES}: cannot be read: {error}")
        if repeated := [escaped(name) for name, count in Counter(names).items() if count > 1]:
            findings.append(f"classes with the same name: {some(repeated)}")
        if len(names) < 2:
            findings.append(f"only {counted(len(names), 'class name')}; at least two are needed")
        return names

    @cached_property
    def _copied(self) -> dict[str, list[Original]]:
        """The images of all splits, copied to the scratch file."""
        tables, _, keys = self._described
        folder, needed = self.scratch(), sum(table.image_bytes for several in tables.values() for table in several)
        if (free := filesystem.free_bytes(folder)) is not None and needed > free:
            raise StorageFailure(
                f"{folder}: a copy of the images needs about {needed:,} bytes while the stage runs, {free:,} are free. "
                "Free some space or set VGG_CACHE to another folder, then run the same command again."
            )
        log.info("copying %s bytes of images to %s, to read them in any order", f"{needed:,}", folder)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (open until this process ends)
        self._scratch_path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        findings: list[str] = []
        found: dict[str, list[Original]] = {}
        with storage_errors(folder):
            for split, several in tables.items():
                key, originals = iter(keys[split]), list[Original]()
                for table in several:
                    originals += self._copy(split, table, key, findings)
                found[split] = sorted(originals, key=lambda o: (o.label if o.split == "train" else 0, o.key))
            self._file.flush()
        self._refuse(findings)
        return found

    def _copy(self, split: str, table: Table, keys: Iterator[str], findings: list[str]) -> Iterator[Original]:
        """Append the images of a table to the scratch file."""
        offset, row, missing = self._file.tell(), -1, []
        rows = zip(table.labels, keys, strict=False)  # in this order: no key is taken after the last label
        try:
            for row, (image, (label, key)) in enumerate(
                zip(read_images(self.root / local(table.name)), rows, strict=False)
            ):
                if image is None:
                    missing.append(f"row {row}")
                    continue
                self._file.write(image)
                yield Original(split, key, label, f"{table.name}:{row}", table.stamp, image.size, offset)
                offset += image.size
        except Damaged as reason:
            findings.append(f"{table.name}: row {row + 1} or a later one: {reason}")
        if missing:
            findings.append(f"{table.name}: {counted(len(missing), 'image')} without bytes: {some(missing)}")

    def _refuse(self, findings: list[str]) -> None:
        if findings:
            remedy = "Correct what is named, or download the files again."
            raise BadData(f"{self.root}:\n{listing(findings)}\n{remedy}", findings)


def _files(root: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Names of the parquet files of train and val, and of the others, sorted."""
    files: dict[str, list[str]] = {"train": [], "val": []}
    others: list[str] = []
    levels = ("*.parquet", "*/*.parquet", "*/*/*.parquet")
    for name in sorted(text(str(path.relative_to(root))) for level in levels for path in root.glob(level)):
        words = [found[1] for part in reversed(name.split("/")) if (found := SPLIT.search(part))]
        (files["train" if words[0] == "train" else "val"] if words else others).append(name)
    return files, others


def _published(num_classes: int, labels: dict[str, list[int]], paths: Keys) -> tuple[list[str], Keys] | None:
    """WNIDs and keys in the paths of imagenet-1k; None if they are not of that form, each WNID for one label."""
    wnids: dict[int, str] = {}
    keys: Keys = {}
    for split, several in paths.items():
        keys[split] = []
        for label, path in zip(labels[split], several, strict=True):
            match = PUBLISHED.fullmatch(path.rpartition("/")[2])
            if match is None or wnids.setdefault(label, match[2]) != match[2]:
                return None
            keys[split].append(match[1])
    if len(wnids) < num_classes or len(set(wnids.values())) < num_classes or not _usable(keys):
        return None
    return [wnids[label] for label in range(num_classes)], keys


def _keys(paths: Keys) -> Keys:
    """The names of the images if they are plain and unique in their split, else numbers."""
    stems = {
        split: [path.rpartition("/")[2].rpartition(".")[0] for path in several] for split, several in paths.items()
    }
    if _usable(stems):
        return stems
    return {split: [f"{split}_{row:08d}" for row in range(len(several))] for split, several in paths.items()}


def _usable(keys: Keys) -> bool:
    return all(len(set(several)) == len(several) and all(map(KEY.fullmatch, several)) for several in keys.values())
