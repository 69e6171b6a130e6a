"""The published archives of ILSVRC-2012 and ILSVRC-2010: images are read by offset, nothing is extracted.

A class index is the rank of its WNID.  Image counts are compared with the devkit's, in total and per class.
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
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import BadData
from runtime.wording import some
from vgg.data.images import BadImage
from vgg.sharding.devkit import Devkit, ground_truth, read_devkit
from vgg.sharding.editions import Archive, Edition
from vgg.sharding.sources import ImageClass, Original, Report, Source
from vgg.sharding.tars import Member, members

MAX_IMAGE_BYTES = 2**26  # 64 MiB, of a member, packed and unpacked
READ_BYTES = 2**22  # 4 MiB at a time when computing checksums
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class OpenTar:
    """An archive that is open for reading.  size: bytes.  stamp: changes when the file changes."""

    name: str
    fd: int
    size: int
    stamp: str

    def members(self) -> Iterator[Member]:
        return members(self.fd, 0, self.size, self.name)

    def original(self, split: str, key: str, label: int, member: Member, where: str = "") -> Original:
        """A member as an image.  where: name of the inner tar, if the member is in one."""
        return Original(
            split,
            key,
            label,
            name=f"{where or self.name}/{member.name}",
            stamp=self.stamp,
            size=member.size,
            offset=member.offset,
        )


class Archives(Source):
    """The images of an edition, from a folder that holds its archives.

    splits: train, val, and test if both its archive and its labels exist.  Pickles as a path and an edition.
    """

    def __init__(self, root: Path, edition: Edition) -> None:
        """Raises BadData if archives are missing."""
        self.root = root
        self.edition = edition
        self._fds: dict[str, int] = {}
        needed = [edition.devkit, edition.train.archive, edition.val.archive, edition.patches]
        if missing := [archive.name for archive in needed if archive and not self._has(archive)]:
            raise BadData(
                f"{root}: {', '.join(missing)} missing. shard.source {edition.name.lower()!r} reads the archives of "
                f"{edition.name} as published (image-net.org, after registration): put or link them there, do not "
                "unpack them."
            )
        self.splits = ("train", "val")
        if edition.test and edition.test_labels:
            pair = (edition.test.archive, edition.test_labels)
            found = [archive.name for archive in pair if self._has(archive)]
            absent = [archive.name for archive in pair if not self._has(archive)]
            if found and absent:
                raise BadData(
                    f"{root}: has {found[0]} but not {absent[0]}. The test set needs both: add {absent[0]}, or move "
                    f"{found[0]} away to continue without the test set."
                )
            if found:
                self.splits = ("train", "val", "test")

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "edition": self.edition, "splits": self.splits, "_fds": {}}

    @cached_property  # read after verify(): a wrong md5 is a clearer message than a parse error
    def classes(self) -> list[ImageClass]:  # type: ignore[override]
        """By WNID.  Raises BadData if the devkit is not the edition's."""
        return [ImageClass(synset.wnid, synset.words) for synset in self._devkit.classes]

    @cached_property
    def _devkit(self) -> Devkit:
        return read_devkit(self.root / self.edition.devkit.name, self.edition)

    def _has(self, archive: Archive) -> bool:
        return (self.root / archive.name).is_file()

    def _present(self) -> list[Archive]:
        """Existing files of the edition: those that are read, and the bounding boxes."""
        edition = self.edition
        images = [edition.train, edition.val, *([edition.test] if edition.test and "test" in self.splits else [])]
        others = [edition.devkit, edition.patches, edition.test_labels if "test" in self.splits else None]
        archives = [*(part.archive for part in images), *others, *edition.boxes]
        return [archive for archive in archives if archive and self._has(archive)]

    def originals(self, split: str) -> list[Original]:
        """All images of a split: train by class and key, val and test by number.

        Raises BadData if the archive is damaged or unusual, or its images are not those of the devkit.
        """
        found = self._train() if split == "train" else self._numbered(split)
        return self._patched(split, found) if self.edition.patches else found

    def _train(self) -> list[Original]:
        rank = {image_class.wnid: label for label, image_class in enumerate(self.classes)}
        expected = {synset.wnid: synset.num_train_images for synset in self._devkit.classes}
        with self._opened(self.edition.train.archive) as tar:
            inner: dict[str, Member] = {}
            for member in tar.members():
                match = re.fullmatch(r"(n\d{8})\.tar", member.name.rpartition("/")[2], re.ASCII)
                if match is None or match[1] in inner:
                    raise self._unexpected(tar.name, member.name, "one tar per class, nXXXXXXXX.tar")
                inner[match[1]] = member
            with ThreadPoolExecutor() as threads:  # they wait for the disk
                scan = partial(self._class_tar, tar, rank)
                by_wnid = dict(zip(inner, threads.map(scan, inner.items()), strict=True))
        self._compare(tar.name, {wnid: len(found) for wnid, found in by_wnid.items()}, expected)
        return [original for wnid in rank for original in sorted(by_wnid[wnid], key=lambda original: original.key)]

    def _class_tar(self, tar: OpenTar, rank: dict[str, int], item: tuple[str, Member]) -> list[Original]:
        """The images of an inner tar, (WNID, member); label -1 if the edition has no such class."""
        wnid, inner = item
        where = f"{tar.name}/{inner.name}"
        form = re.compile(rf"({wnid}_\d+)\.JPEG", re.ASCII)
        found: dict[str, Original] = {}
        for member in members(tar.fd, inner.offset, inner.offset + inner.size, where):
            match = form.fullmatch(member.name.rpartition("/")[2])
            if match is None or match[1] in found:
                raise self._unexpected(where, member.name, f"images {wnid}_<number>.JPEG")
            found[match[1]] = tar.original("train", match[1], rank.get(wnid, -1), member, where)
        return list(found.values())

    def _numbered(self, split: str) -> list[Original]:
        """val or test: line i of the ground truth is the label of the image with number i in its name."""
        images = self.edition.val if split == "val" else self.edition.test
        assert images is not None
        labels = self._devkit.val if split == "val" else self._test_labels()
        stem = f"{self.edition.name}_{split}"
        form = re.compile(rf"({stem}_(\d{{8}}))\.JPEG", re.ASCII)
        found: dict[int, Original] = {}
        with self._opened(images.archive) as tar:
            for member in tar.members():
                match = form.fullmatch(member.name.rpartition("/")[2])
                number = int(match[2]) if match else 0
                if match is None or not 1 <= number <= len(labels) or number in found:
                    wanted = f"{stem}_00000001.JPEG to {stem}_{len(labels):08d}.JPEG, each once"
                    raise self._unexpected(tar.name, member.name, wanted)
                found[number] = tar.original(split, match[1], labels[number - 1], member)
        wnids = [image_class.wnid for image_class in self.classes]
        expected = dict.fromkeys(wnids, images.per_class[0])
        missing = [f"{stem}_{number:08d}" for number in range(1, len(labels) + 1) if number not in found]
        self._compare(tar.name, Counter(wnids[original.label] for original in found.values()), expected, missing)
        return [found[number] for number in sorted(found)]

    def _test_labels(self) -> list[int]:
        images, labels = self.edition.test, self.edition.test_labels
        assert images is not None
        assert labels is not None
        text = (self.root / labels.name).read_bytes()
        return ground_truth(text, str(self.root / labels.name), images, self._devkit.rank)

    def _patched(self, split: str, found: list[Original]) -> list[Original]:
        """The same images, with those replaced for which this split has a patch."""
        assert self.edition.patches is not None
        patches: dict[str, Original] = {}
        with self._opened(self.edition.patches) as tar:
            for member in tar.members():
                if not member.name.endswith(".JPEG"):
                    continue  # a readme
                folder, key = member.name.removesuffix(".JPEG").split("/")[-2:] if "/" in member.name else ("", "")
                if folder not in ("train", "val", "test") or (folder == split and key in patches):
                    raise self._unexpected(tar.name, member.name, "<folder>/train, val or test/<image>.JPEG, each once")
                if folder == split:
                    patches[key] = tar.original(split, key, -1, member)
        unused = sorted(patches.keys() - {original.key for original in found})
        if unused:
            raise BadData(
                f"{self.root / tar.name}: {len(unused)} patches replace no image of {split}: {some(unused)}. "
                f"The archives are not of the same edition; download all of {self.edition.name} again.",
                unused,
            )
        return [
            replace(patches[original.key], label=original.label) if original.key in patches else original
            for original in found
        ]

    def _compare(
        self, archive: str, found: dict[str, int], expected: dict[str, int], missing: Sequence[str] = ()
    ) -> None:
        """Raises BadData that lists the classes with a wrong number of images."""
        wrong = [
            f"{wnid}: found {found.get(wnid, 0)}, expected {expected.get(wnid, 0)}"
            for wnid in sorted({*found, *expected})
            if found.get(wnid, 0) != expected.get(wnid, 0) or wnid not in expected
        ]
        if wrong:
            raise BadData(
                f"{self.root / archive}: the images of {len(wrong)} classes differ from {self.edition.name} "
                f"({sum(found.values()):,} found in total, {sum(expected.values()):,} expected):\n"
                + some(wrong, "\n")
                + (f"\nmissing: {some(missing)}" if missing else "")
                + f"\nDownload {archive} and {self.edition.devkit.name} again, both of {self.edition.name}.",
                [*wrong, *(f"missing: {name}" for name in missing)],
            )

    def _unexpected(self, where: str, name: str, expected: str) -> BadData:
        return BadData(
            f"{self.root / where}: holds {name!r}; expected only {expected}. "
            f"Download the published archive of {self.edition.name}."
        )

    @contextmanager
    def _opened(self, archive: Archive) -> Iterator[OpenTar]:
        fd = os.open(self.root / archive.name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield OpenTar(archive.name, fd, os.fstat(fd).st_size, _stamp(fd))
        finally:
            os.close(fd)

    def read(self, original: Original) -> bytes:
        """The image's bytes, unpacked if the member is gzip-compressed (at least one of 2010 is).

        Raises BadImage if they cannot be read, BadData if the archive has changed since originals().
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
                f"{self.root / archive}: has changed since it was scanned; run again when nothing writes to it"
            )
        return fd

    def verify(self, report: Report | None = None) -> None:
        """Compare archives with their published md5, in parallel.  Raises BadData that lists all wrong ones.

        report: called from this thread with (bytes done, bytes in total).
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
                stopped.set()  # an interrupt must not wait until whole archives are read
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

    def metadata(self) -> dict[str, Any]:
        """edition, and name, size in bytes and published md5 (or null) of every archive."""
        return {
            "edition": self.edition.name,
            "archives": [
                {"name": archive.name, "size": (self.root / archive.name).stat().st_size, "md5": archive.md5}
                for archive in self._present()
            ],
        }

    def tables(self) -> dict[str, bytes]:
        """synsets.json: all synsets, sorted by id; `label` is the class index, null for inner nodes of the hierarchy.

        cost_matrix.npy, if the edition has one: uint8 (classes, classes), by class index.
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
