"""Box annotations of images: VOC XML in an archive or a folder, and Kaggle's tables.

Archives are streamed, never extracted; sizes and counts are bounded.  Annotations are named by their path, from which
joining.py finds the image: neither the order of an archive nor the file name inside an XML can be relied on.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import BadData
from vgg.localisation.voc import MAX_XML_BYTES, Annotation, Malformed, parse, parse_row
from vgg.sharding.names import escaped, local, text

MAX_UNPACKED_BYTES = 2**33  # of an archive; ILSVRC's training boxes have 0.8 GiB
MAX_OTHER_BYTES = 2**24  # of what is between two annotations in an archive
MAX_ANNOTATIONS = 5_000_000
CHUNK = 2**20

ENDING = ".xml"
GZIP = b"\x1f\x8b"
HEADER = "ImageId,PredictionString"  # of Kaggle's tables
AGAIN = "Download it again."


class Annotations(ABC):
    """All annotations of a split, for one reading.

    name: of the source.  malformed: after reading, a line for every annotation that could not be read.
    """

    def __init__(self, name: str) -> None:
        self.name, self.malformed = name, list[str]()
        self._size, self._count, self._sha256 = 0, 0, ""

    @abstractmethod
    def _read(self) -> Iterator[Annotation]:
        """Yields annotations, notes malformed ones, and fills _size and _sha256."""

    def __iter__(self) -> Iterator[Annotation]:
        """Raises BadData if the source itself cannot be read."""
        for annotation in self._read():
            self._count += 1
            if self._count > MAX_ANNOTATIONS:
                raise BadData(f"{self.name}: more than {MAX_ANNOTATIONS:,} annotations")
            yield annotation

    def origin(self) -> dict[str, Any]:
        """After reading, for a manifest: name, bytes, sha256, number of annotations."""
        return {"name": self.name, "size": self._size, "sha256": self._sha256, "num_annotations": self._count}

    def _parsed(self, xml: bytes, path: str) -> Iterator[Annotation]:
        try:
            yield parse(xml, path)
        except Malformed as reason:
            self._note(path, str(reason))

    def _note(self, path: str, reason: str) -> None:
        self.malformed.append(f"{self.name}: {shown(path)}: {reason}")


def shown(name: str) -> str:
    """A name for messages: as it is, or escaped if it would not print."""
    return name if name.isprintable() else escaped(name)


class ArchivedXml(Annotations):
    """The XMLs of a tar, gzip-compressed or not, as ILSVRC's bbox archives."""

    def __init__(self, name: str, opened: Callable[[], BinaryIO], md5: str | None = None) -> None:
        """opened: opens the file.  md5: as published, compared before anything is read; None: not compared."""
        super().__init__(name)
        self._opened, self._md5 = opened, md5

    def _read(self) -> Iterator[Annotation]:
        with self._opened() as file:
            sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
            while chunk := file.read(CHUNK):
                self._size += len(chunk)
                sha256.update(chunk)
                md5.update(chunk)
            self._sha256 = sha256.hexdigest()
            if self._md5 and md5.hexdigest() != self._md5:
                raise BadData(
                    f"{self.name}: md5 {md5.hexdigest()}, published {self._md5}: damaged or another file. {AGAIN}"
                )
            file.seek(0)
            is_packed = file.read(len(GZIP)) == GZIP
            file.seek(0)
            stream = _Bounded(gzip.GzipFile(fileobj=file) if is_packed else file)
            try:
                yield from self._members(stream)
            except (tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError, _TooMuch, RecursionError) as error:
                raise BadData(f"{self.name}: not a complete tar: {error}. {AGAIN}") from None

    def _members(self, stream: _Bounded) -> Iterator[Annotation]:
        with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]  # it only calls read()
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep half a million
                stream.since = 0
                name = member.name
                if member.isdir() or not name.lower().endswith(ENDING) or name.rpartition("/")[2].startswith("."):
                    continue
                path = name[: -len(ENDING)]
                content = tar.extractfile(member) if member.isreg() and member.size <= MAX_XML_BYTES else None
                if content is None:
                    self._note(path, f"more than {MAX_XML_BYTES:,} bytes" if member.isreg() else "not a regular file")
                    continue
                yield from self._parsed(content.read(), path)
            end = tar.offset
        while stream.read(CHUNK):  # to the end, so that gzip compares its checksum
            pass
        # tarfile takes a damaged header for the end
        if stream.end_of_data > end or stream.total < end + 2 * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"damaged, or cut short, at byte {end:,} of its content")


class _TooMuch(ValueError):
    """More bytes than an archive of annotations has."""


class _Bounded:
    """Reads a stream of untrusted length.

    total: bytes so far.  since: bytes since the caller set it to 0.  end_of_data: position behind the last byte that
    is not zero.
    """

    def __init__(self, file: gzip.GzipFile | BinaryIO) -> None:
        self._file, self.total, self.since, self.end_of_data = file, 0, 0, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if content := data.rstrip(b"\0"):
            self.end_of_data = self.total + len(content)
        self.total += len(data)
        self.since += len(data)
        if self.total > MAX_UNPACKED_BYTES or self.since > MAX_OTHER_BYTES:
            raise _TooMuch(f"more than {MAX_UNPACKED_BYTES:,} bytes, or {MAX_OTHER_BYTES:,} without an annotation")
        return data


class FolderXml(Annotations):
    """The XMLs in a folder and its subfolders; links are followed, other files passed over.

    The sha256 is that of lines with the sha256 and path of every XML, sorted by path.
    """

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name)
        self.folder = folder

    def _read(self) -> Iterator[Annotation]:
        total = hashlib.sha256()
        for name in self._walk("", ()):
            path = name[: -len(ENDING)]
            try:
                xml = _regular_file(self.folder / local(name))
            except OSError as error:
                self._note(path, f"cannot be read: {error.strerror}")
                continue
            except Malformed as reason:
                self._note(path, str(reason))
                continue
            self._size += len(xml)
            total.update(f"{hashlib.sha256(xml).hexdigest()}  ".encode() + os.fsencode(local(name)) + b"\n")
            yield from self._parsed(xml, path)
        self._sha256 = total.hexdigest()

    def _walk(self, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        """Paths of all XMLs, sorted.  above: identities of the folders that hold this one, against loops of links."""
        try:
            status = os.stat(self.folder / local(folder))
            identity = (status.st_dev, status.st_ino)
            with os.scandir(self.folder / local(folder)) as entries:
                found = sorted((text(entry.name), entry.is_dir()) for entry in entries if entry.name[0] != ".")
        except OSError as error:
            raise BadData(f"{error.filename}: {error.strerror}") from None
        for name, is_folder in found if identity not in above else ():
            path = f"{folder}/{name}" if folder else name
            if is_folder:
                yield from self._walk(path, (*above, identity))
            elif name.lower().endswith(ENDING):
                yield path


def _regular_file(path: Path) -> bytes:
    """Raises Malformed if it is none, or too large."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: a FIFO would block
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Malformed("not a regular file")
        return file.read(MAX_XML_BYTES + 1)


class KaggleTable(Annotations):
    """LOC_train_solution.csv or LOC_val_solution.csv, a line an image; it does not tell the sizes of images."""

    def __init__(self, name: str, file: Path) -> None:
        super().__init__(name)
        self.file = file

    def _read(self) -> Iterator[Annotation]:
        sha256 = hashlib.sha256()
        with open(self.file, "rb") as file:
            number = 0
            while line := file.readline(MAX_XML_BYTES):
                number += 1
                self._size += len(line)
                sha256.update(line)
                words = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").strip()
                if number == 1:
                    if words != HEADER:
                        raise BadData(f"{self.file}: its first line is not {HEADER}. {AGAIN}")
                    continue
                try:
                    if words:
                        yield parse_row(words)
                except Malformed as reason:
                    self._note(f"line {number:,}", str(reason))
        self._sha256 = sha256.hexdigest()
