"""Images in a folder for each training class, with a table of validation labels: the data sets of layouts.py.

A class index is the rank of its WNID.  Keys are the names of the images; training images go by class and key,
validation images by key.  All of this is as from the published archives, so the same pictures give the same shards.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from runtime.errors import BadData
from runtime.wording import counted, some
from vgg.data.images import BadImage
from vgg.sharding.layouts import ENDING, Layout, Row
from vgg.sharding.names import escaped, text
from vgg.sharding.sources import ImageClass, Original, Source

WNID = re.compile(r"n\d{8}", re.ASCII)


class Labelled(Source):
    """The images of a layout.  All that is wrong is reported at once."""

    def __init__(self, root: Path, layout: Layout) -> None:
        """Raises BadData that lists every missing file and folder."""
        self.root, self.layout = root, layout
        missing = [f"{name}/" for name in (layout.train, layout.val) if not (root / name).is_dir()]
        missing += [name for name in self._tables() if not (root / name).is_file()]
        if missing:
            raise BadData(
                f"{root}: {', '.join(missing)} missing: not {layout.title}. Unpack the download there, or link what it "
                "holds."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}  # a worker only reads images

    @property
    def classes(self) -> list[ImageClass]:  # type: ignore[override]
        """By WNID.  Raises BadData, as originals() does."""
        return self._checked[0]

    def originals(self, split: str) -> list[Original]:
        """All images of a split.  Raises BadData that lists everything that is wrong, in both splits."""
        return self._checked[1][split]

    def read(self, original: Original) -> bytes:
        try:
            return (self.root / original.name).read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None

    def metadata(self) -> dict[str, Any]:
        """layout, and name, size in bytes and sha256 of its tables."""
        tables = [(name, (self.root / name).read_bytes()) for name in self._tables()]
        files = [{"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in tables]
        return {"layout": self.layout.title, "tables": files}

    def _tables(self) -> list[str]:
        layout = self.layout
        return [name for name in (layout.labels, layout.classes, layout.listed) if name]

    @cached_property
    def _checked(self) -> tuple[list[ImageClass], dict[str, list[Original]]]:
        check = Check(self.root, self.layout)
        classes = check.classes()
        rank = {image_class.wnid: label for label, image_class in enumerate(classes)}
        splits = {"train": check.train(rank), "val": check.val(rank)}
        if check.strange:
            strange = [f"{escaped(name)} ({why})" for name, why in sorted(check.strange.items())]
            check.note(f"{counted(len(strange), 'file')} with an unexpected name or type", strange)
        if check.findings:
            raise BadData(
                f"{self.root}: not {self.layout.title} as published:\n  "
                + "\n  ".join(check.findings)
                + "\nUnpack the whole download again.",
                check.everything,
            )
        self.passed_over = Counter(check.passed_over)
        return classes, splits


class Check:
    """Reads a data set and compares it with its layout.

    findings: a line for each kind of fault; everything: a line for each fault.  strange: files that are none of its
    images, and why.  passed_over: endings of files of another kind.
    """

    def __init__(self, root: Path, layout: Layout) -> None:
        self.root, self.layout = root, layout
        self.findings: list[str] = []
        self.everything: list[str] = []
        self.passed_over: list[str] = []
        self.strange: dict[str, str] = {}

    def classes(self) -> list[ImageClass]:
        words = self._table(self.layout.classes, self.layout.read_class)
        if listed := self.layout.listed:
            wnids = self._table(listed, lambda line: (line.strip(), ""))
            self._note(listed, "WNID", f"that {self.layout.classes} does not name", wnids.keys() - words.keys())
            words = {wnid: words.get(wnid, wnid) for wnid in wnids}
        where = listed or self.layout.classes
        self._note(where, "name", "without the form of a WNID", [w for w in words if not WNID.fullmatch(w)])
        self._expect(where, "classes", len(words), self.layout.num_classes)
        return [ImageClass(wnid, words[wnid]) for wnid in sorted(words)]

    def train(self, rank: dict[str, int]) -> list[Original]:
        where, inner = self.layout.train, self.layout.inner
        folders = {text(entry.name) for entry in self._entries(where) if os.path.isdir(entry.path)}
        self._note(
            where,
            "folder",
            f"of a class that is not in {self.layout.classes}",
            {name for name in folders if name[0] != "."} - rank.keys(),
        )
        present = [wnid for wnid in rank if wnid in folders]

        def scan(wnid: str) -> dict[str, Original]:
            folder = "/".join(filter(None, (where, wnid, inner)))
            return self._images("train", folder, rf"{wnid}_\d+", lambda _: rank[wnid])

        with ThreadPoolExecutor() as threads:  # they wait for the disk
            found = dict(zip(present, threads.map(scan, present), strict=True))
        self._compare(where, {wnid: len(images) for wnid, images in found.items()}, rank, "train")
        return [images[key] for images in found.values() for key in sorted(images)]

    def val(self, rank: dict[str, int]) -> list[Original]:
        where, labels = self.layout.val, self.layout.labels
        table = self._table(labels, self.layout.read_label, self.layout.header)
        self._note(labels, "label", "that is no class", {wnid for wnid in table.values() if wnid not in rank})
        found = self._images("val", where, self.layout.val_name, lambda key: rank.get(table.get(key, ""), -1))
        self._note(labels, "row", "without an image", table.keys() - found.keys())
        self._note(where, "image", f"without a row in {labels}", found.keys() - table.keys())
        self._compare(where, Counter(table[key] for key in found if key in table), rank, "val")
        return [found[key] for key in sorted(found)]

    def _table(self, name: str, read: Row, header: str | None = None) -> dict[str, str]:
        """The rows of a table by their first column.  Unreadable and repeated lines are findings."""
        try:
            lines = (self.root / name).read_bytes().decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            self.findings.append(f"{name}: {error.strerror if isinstance(error, OSError) else 'not UTF-8'}")
            return {}
        start = 0 if header is None else 1
        if header is not None and lines[:1] != [header]:
            self.findings.append(f"{name}: its first line is not {header}")
        rows: dict[str, str] = {}
        unreadable, repeated = [], []
        for number, line in enumerate(lines[start:], start + 1):
            if line.strip():
                try:
                    key, value = read(line)
                except ValueError:
                    unreadable.append(f"line {number:,}: {escaped(line[:60])}")
                    continue
                if key in rows:
                    repeated.append(f"line {number:,}: {escaped(key)}")
                rows[key] = value
        if unreadable:
            self.note(f"{name}: {counted(len(unreadable), 'line')} of another form", unreadable)
        if repeated:
            self.note(f"{name}: {counted(len(repeated), 'row')} again", repeated)
        return rows

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root / folder) as entries:
                return list(entries)
        except OSError as error:
            self.strange[folder] = str(error.strerror)
            return []

    def _images(self, split: str, folder: str, form: str, label: Callable[[str], int]) -> dict[str, Original]:
        """The images in a folder, by key.  Notes other files with their ending in self.strange."""
        wanted, found = re.compile(form, re.ASCII), dict[str, Original]()
        for entry in self._entries(folder):
            name, key = text(entry.name), entry.name.removesuffix(ENDING)
            path = f"{folder}/{name}"
            if not name.endswith(ENDING) or name.startswith("."):
                self.passed_over.append(".*" if name.startswith(".") else Path(name).suffix.lower())
            elif not wanted.fullmatch(key):
                self.strange[path] = f"expected {form}{ENDING}"
            elif (status := _file_status(entry)) is None:
                self.strange[path] = "no file that can be read"
            else:
                stamp = f"{status.st_size}:{status.st_mtime_ns}"
                found[key] = Original(split, key, label(key), path, stamp, status.st_size)
        return found

    def _compare(self, where: str, found: dict[str, int], rank: dict[str, int], split: str) -> None:
        """Note classes with a wrong number of images, and a wrong total."""
        layout = self.layout
        total, (fewest, most) = (
            (layout.num_train, layout.train_per_class) if split == "train" else (layout.num_val, layout.val_per_class)
        )
        wrong = [f"{wnid} has {found.get(wnid, 0)}" for wnid in rank if not fewest <= found.get(wnid, 0) <= most]
        expected = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        if wrong:
            self.note(f"{where}: {expected} images of a class expected", wrong)
        self._expect(where, "images", sum(found.values()), total)

    def _note(self, where: str, noun: str, what: str, items: Iterable[str]) -> None:
        if found := sorted(items):
            self.note(f"{where}: {counted(len(found), noun)} {what}", [escaped(item) for item in found])

    def note(self, what: str, items: list[str]) -> None:
        self.findings.append(f"{what}: {some(items)}")
        self.everything += [f"{what}: {item}" for item in items]

    def _expect(self, where: str, what: str, found: int, expected: int) -> None:
        if found != expected:
            self.findings.append(f"{where}: {found:,} {what}, expected {expected:,}")


def _file_status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Of a regular file, or of a link's target; None for anything else, a loop or a link to nothing."""
    try:
        status = entry.stat()
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None
