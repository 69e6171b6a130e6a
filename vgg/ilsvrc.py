"""The archives of ILSVRC-2012 and ILSVRC-2010 as they were published: images are read by offset, nothing is extracted.

A class index is the rank of its WNID.  Counts are compared with the devkit's, in all and class by class.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from vgg.devkit import Devkit, first_of, ground_truth, read_devkit
from vgg.editions import Archive, Edition
from vgg.errors import BadData
from vgg.images import BadImage
from vgg.sources import ImageClass, Original, Report, Source
from vgg.tars import Member, members

MAX_IMAGE_BYTES = 2**26  # 64 MiB, of a member, and of what it unpacks to
READ_BYTES = 2**22  # 4 MiB at a time when checksums are computed
GZIP = b"\x1f\x8b"


class Archives(Source):
    """The images of an edition, from a folder that holds its archives.

    splits: train, val, and test where its labels were published and both files are there.  Pickled, it is a path and
    the facts of the year.
    """

    published = True

    def __init__(self, root: Path, edition: Edition) -> None:
        """Raises BadData if archives are missing."""
        self.root = root
        self.edition = edition
        self._fds: dict[str, int] = {}
        needed = [edition.devkit, edition.train.archive, edition.val.archive, edition.patches]
        if missing := [archive.name for archive in needed if archive and not self._has(archive)]:
            raise BadData(
                f"{root}: lacks {', '.join(missing)}. shard.source {edition.name.lower()!r} reads the archives of "
                f"{edition.name} as they are published (image-net.org, after registration): put or link them there, "
                "do not unpack them."
            )
        self.splits = ("train", "val")
        if edition.test and edition.test_labels:
            pair = (edition.test.archive, edition.test_labels)
            there = [archive.name for archive in pair if self._has(archive)]
            absent = [archive.name for archive in pair if not self._has(archive)]
            if there and absent:
                raise BadData(
                    f"{root}: has {there[0]} but lacks {absent[0]}. The test set needs both: add the one, or move the "
                    "other away to do without the test set."
                )
            if there:
                self.splits = ("train", "val", "test")

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "edition": self.edition, "splits": self.splits, "_fds": {}}

    @cached_property  # not before verify(): a damaged file is better told by its md5
    def classes(self) -> list[ImageClass]:  # type: ignore[override]
        """By WNID.  Raises BadData if the devkit is not the edition's."""
        return [ImageClass(synset.wnid, synset.words) for synset in self._devkit.classes]

    @cached_property
    def _devkit(self) -> Devkit:
        return read_devkit(self.root / self.edition.devkit.name, self.edition)

    def _has(self, archive: Archive) -> bool:
        return (self.root / archive.name).is_file()

    def _present(self) -> list[Archive]:
        """Every file of the edition that is used or, as the bounding boxes, at least there."""
        edition = self.edition
        images = [edition.train, edition.val, *([edition.test] if edition.test and "test" in self.splits else [])]
        others = [edition.devkit, edition.patches, edition.test_labels if "test" in self.splits else None]
        archives = [*(part.archive for part in images), *others, *edition.boxes]
        return [archive for archive in archives if archive and self._has(archive)]

    def originals(self, split: str) -> list[Original]:
        """All images of a split: train by class and key, val and test by number.

        Raises BadData if the archive is not whole and plain, or its images are not those the devkit speaks of.
        """
        found = self._train() if split == "train" else self._numbered(split)
        return self._patched(split, found) if self.edition.patches else found

    def _train(self) -> list[Original]:
        archive = self.edition.train.archive.name
        rank = {image_class.wnid: label for label, image_class in enumerate(self.classes)}
        expected = {synset.wnid: synset.num_train_images for synset in self._devkit.classes}
        with self._opened(archive) as (fd, size, stamp):
            inner: dict[str, Member] = {}
            for member in members(fd, 0, size, archive):
                match = re.fullmatch(r"(n\d{8})\.tar", member.name.rpartition("/")[2], re.ASCII)
                if match is None or match[1] in inner:
                    raise self._stranger(archive, member.name, "one tar a class, nXXXXXXXX.tar")
                inner[match[1]] = member
            with ThreadPoolExecutor() as threads:  # they wait for the disk
                scan = partial(self._class_tar, fd, stamp, rank)
                by_wnid = dict(zip(inner, threads.map(scan, inner.items()), strict=True))
        self._compare(archive, {wnid: len(found) for wnid, found in by_wnid.items()}, expected)
        return [original for wnid in rank for original in sorted(by_wnid[wnid], key=lambda original: original.key)]

    def _class_tar(self, fd: int, stamp: str, rank: dict[str, int], item: tuple[str, Member]) -> list[Original]:
        """The images of an inner tar; label -1 if the edition has no such class."""
        wnid, tar = item
        where = f"{self.edition.train.archive.name}/{tar.name}"
        form = re.compile(rf"({wnid}_\d+)\.JPEG", re.ASCII)
        found: dict[str, Original] = {}
        for member in members(fd, tar.offset, tar.offset + tar.size, where):
            match = form.fullmatch(member.name.rpartition("/")[2])
            if match is None or match[1] in found:
                raise self._stranger(where, member.name, f"images {wnid}_<number>.JPEG")
            name = f"{where}/{member.name}"
            label = rank.get(wnid, -1)
            found[match[1]] = Original("train", match[1], label, name, stamp, member.size, member.offset)
        return list(found.values())

    def _numbered(self, split: str) -> list[Original]:
        """val or test: line i of the ground truth is the image with number i in its name, wherever it stands."""
        images = self.edition.val if split == "val" else self.edition.test
        assert images is not None
        labels = self._devkit.val if split == "val" else self._test_labels()
        archive, stem = images.archive.name, f"{self.edition.name}_{split}"
        form = re.compile(rf"({stem}_(\d{{8}}))\.JPEG", re.ASCII)
        found: dict[int, Original] = {}
        with self._opened(archive) as (fd, size, stamp):
            for member in members(fd, 0, size, archive):
                match = form.fullmatch(member.name.rpartition("/")[2])
                number = int(match[2]) if match else 0
                if match is None or not 1 <= number <= len(labels) or number in found:
                    wanted = f"{stem}_00000001.JPEG to {stem}_{len(labels):08d}.JPEG, each once"
                    raise self._stranger(archive, member.name, wanted)
                name = f"{archive}/{member.name}"
                label = labels[number - 1]
                found[number] = Original(split, match[1], label, name, stamp, member.size, member.offset)
        wnids = [image_class.wnid for image_class in self.classes]
        expected = dict.fromkeys(wnids, images.per_class[0])
        missing = [f"{stem}_{number:08d}" for number in range(1, len(labels) + 1) if number not in found]
        self._compare(archive, Counter(wnids[original.label] for original in found.values()), expected, missing)
        return [found[number] for number in sorted(found)]

    def _test_labels(self) -> list[int]:
        images, labels = self.edition.test, self.edition.test_labels
        assert images is not None
        assert labels is not None
        text = (self.root / labels.name).read_bytes()
        return ground_truth(text, str(self.root / labels.name), images, self._devkit.rank)

    def _patched(self, split: str, found: list[Original]) -> list[Original]:
        """The same images, with the patches of this split in place of those they replace."""
        assert self.edition.patches is not None
        archive, patches = self.edition.patches.name, dict[str, Original]()
        with self._opened(archive) as (fd, size, stamp):
            for member in members(fd, 0, size, archive):
                if not member.name.endswith(".JPEG"):
                    continue  # a readme
                folder, key = member.name.removesuffix(".JPEG").split("/")[-2:] if "/" in member.name else ("", "")
                if folder not in ("train", "val", "test") or (folder == split and key in patches):
                    raise self._stranger(archive, member.name, "<folder>/train, val or test/<image>.JPEG, each once")
                if folder == split:
                    name = f"{archive}/{member.name}"
                    patches[key] = Original(split, key, -1, name, stamp, member.size, member.offset)
        unused = sorted(patches.keys() - {original.key for original in found})
        if unused:
            raise BadData(
                f"{self.root / archive}: {len(unused)} patches replace no image of {split}: {first_of(unused)}. "
                f"The archives are not of one edition; get all of {self.edition.name} again."
            )
        return [
            replace(patches[original.key], label=original.label) if original.key in patches else original
            for original in found
        ]

    def _compare(
        self, archive: str, found: dict[str, int], expected: dict[str, int], missing: Sequence[str] = ()
    ) -> None:
        """Raises BadData that names the classes whose number of images is not the expected one."""
        wrong = [
            f"{wnid}: found {found.get(wnid, 0)}, expected {expected.get(wnid, 0)}"
            for wnid in sorted({*found, *expected})
            if found.get(wnid, 0) != expected.get(wnid, 0) or wnid not in expected
        ]
        if wrong:
            raise BadData(
                f"{self.root / archive}: the images of {len(wrong)} classes are not those of {self.edition.name} "
                f"({sum(found.values()):,} found in all, {sum(expected.values()):,} expected):\n"
                + first_of(wrong, "\n")
                + (f"\nmissing: {first_of(missing)}" if missing else "")
                + f"\nGet {archive} and {self.edition.devkit.name} again, both of {self.edition.name}."
            )

    def _stranger(self, where: str, name: str, wanted: str) -> BadData:
        return BadData(
            f"{self.root / where}: holds {name!r}; there must be {wanted}, and nothing else. "
            f"Get the published archive of {self.edition.name}."
        )

    @contextmanager
    def _opened(self, archive: str) -> Iterator[tuple[int, int, str]]:
        """An open archive: descriptor, bytes, stamp."""
        fd = os.open(self.root / archive, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd, os.fstat(fd).st_size, _stamp(fd)
        finally:
            os.close(fd)

    def read(self, original: Original) -> bytes:
        """The image's bytes, unpacked if the member is gzip-compressed, as at least one of 2010 is.

        Raises BadImage if they cannot be had, BadData if the archive has changed since originals().
        """
        archive = original.name.partition("/")[0]
        if original.size > MAX_IMAGE_BYTES:
            raise BadImage(f"{original.size:,} bytes are more than {MAX_IMAGE_BYTES:,}")
        try:
            if archive not in self._fds:
                self._fds[archive] = self._open_unchanged(archive, original.stamp)
            data = os.pread(self._fds[archive], original.size, original.offset)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from None
        if len(data) != original.size:
            raise BadImage(f"cut short: {len(data):,} of {original.size:,} bytes")
        return _gunzip(data) if data.startswith(GZIP) else data

    def _open_unchanged(self, archive: str, stamp: str) -> int:
        fd = os.open(self.root / archive, os.O_RDONLY | os.O_CLOEXEC)
        if _stamp(fd) != stamp:
            os.close(fd)
            raise BadData(
                f"{self.root / archive}: has changed since it was scanned; run again when nobody writes to it"
            )
        return fd

    def verify(self, report: Report | None = None) -> None:
        """Compare every archive that has a published md5 with it, all at once.  Raises BadData, naming all wrong ones.

        report: called from this thread with (bytes done, bytes in all).
        """
        archives = [archive for archive in self._present() if archive.md5]
        if not archives:
            return
        total = sum((self.root / archive.name).stat().st_size for archive in archives)
        done, stopped = [0] * len(archives), threading.Event()

        def md5(number: int, path: Path) -> str:
            digest, buffer = hashlib.md5(usedforsecurity=False), memoryview(bytearray(READ_BYTES))
            with open(path, "rb", buffering=0) as file:
                while (count := file.readinto(buffer)) and not stopped.is_set():
                    digest.update(buffer[:count])
                    done[number] += count
            return digest.hexdigest()

        with ThreadPoolExecutor(len(archives)) as threads:
            try:
                running = [threads.submit(md5, i, self.root / archive.name) for i, archive in enumerate(archives)]
                while wait(running, timeout=0.5).not_done:
                    if report:
                        report(sum(done), total)
                found = [future.result() for future in running]
            finally:
                stopped.set()  # or an interrupt would wait for whole archives
        if report:
            report(sum(done), total)
        wrong = [
            f"{archive.name}: md5 {digest}, published {archive.md5}"
            for archive, digest in zip(archives, found, strict=True)
            if digest != archive.md5
        ]
        if wrong:
            raise BadData(
                f"{self.root}: not the published archives of {self.edition.name}:\n"
                + "\n".join(wrong)
                + "\nThey are damaged or of another year; download them again."
            )

    def about(self) -> dict[str, Any]:
        """edition, and name, bytes and published md5 (or null) of every archive."""
        return {
            "edition": self.edition.name,
            "archives": [
                {"name": archive.name, "size": (self.root / archive.name).stat().st_size, "md5": archive.md5}
                for archive in self._present()
            ],
        }

    def tables(self) -> dict[str, bytes]:
        """synsets.json: all synsets by id, `label` being the class index, null for inner ones of the hierarchy.

        cost_matrix.npy, if the edition has one: uint8 (classes, classes), rows and columns by class index.
        """
        rank = {synset.wnid: label for label, synset in enumerate(self._devkit.classes)}
        rows = [{**asdict(synset), "label": rank.get(synset.wnid)} for synset in self._devkit.synsets]
        text = json.dumps(rows, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        tables = {"synsets.json": text.encode()}
        if self._devkit.cost_matrix is not None:
            file = io.BytesIO()
            np.save(file, self._devkit.cost_matrix, allow_pickle=False)
            tables["cost_matrix.npy"] = file.getvalue()
        return tables


def _stamp(fd: int) -> str:
    status = os.fstat(fd)
    return f"{status.st_size}:{status.st_mtime_ns}"


def _gunzip(data: bytes) -> bytes:
    unpacker = zlib.decompressobj(31)  # a gzip header and trailer
    try:
        image = unpacker.decompress(data, MAX_IMAGE_BYTES)
    except zlib.error as error:
        raise BadImage(f"gzip-compressed, and damaged: {error}") from None
    if not unpacker.eof:
        raise BadImage(f"gzip-compressed, and cut short or more than {MAX_IMAGE_BYTES:,} bytes")
    if unpacker.unused_data:
        raise BadImage("gzip-compressed, with something behind it")
    return image
