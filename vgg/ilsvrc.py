"""The archives of ILSVRC-2012 and ILSVRC-2010 as they were published: images are read by offset, nothing is extracted.

A class index is the rank of its WNID.  The devkits number classes otherwise (ILSVRC2012_ID, ILSVRC2010_ID); their
numbers are always led back to WNIDs, by the table in meta.mat.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vgg.errors import BadData
from vgg.images import BadImage
from vgg.sources import ImageClass, Original, Report, Source
from vgg.tars import Member, members

MAX_IMAGE_BYTES = 2**26  # 64 MiB, of a member, and of what it unpacks to
MAX_DEVKIT_BYTES = 2**28  # 256 MiB unpacked
READ_BYTES = 2**22  # 4 MiB at a time when checksums are computed
GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Archive:
    """A published file: its name and its published md5, None where none was found."""

    name: str
    md5: str | None = None


@dataclass(frozen=True, slots=True)
class Images:
    """A split: its archive, images in all, and the fewest and most images of a class."""

    archive: Archive
    num_images: int
    per_class: tuple[int, int]


@dataclass(frozen=True)
class Edition:
    """The facts of a year.

    name: begins the names of its val and test images, and of the id in meta.mat.  patches: images that replace those
    of the same name.  test: None if its labels were never published; else they are the lines of test_labels.
    boxes: bounding boxes, checked and listed if they are there.  has_cost_matrix: meta.mat holds the cost of one class
    taken for another (hierarchical error).
    """

    name: str
    num_classes: int
    devkit: Archive
    train: Images
    val: Images
    test: Images | None = None
    test_labels: Archive | None = None
    patches: Archive | None = None
    boxes: tuple[Archive, ...] = ()
    has_cost_matrix: bool = False


EDITIONS = {
    "ilsvrc2012": Edition(
        name="ILSVRC2012",
        num_classes=1000,
        devkit=Archive("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf"),
        train=Images(Archive("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e"), 1_281_167, (732, 1300)),
        val=Images(Archive("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622"), 50_000, (50, 50)),
        boxes=(
            Archive("ILSVRC2012_bbox_train_v2.tar.gz", "9271167e2176350e65cfe4e546f14b17"),
            Archive("ILSVRC2012_bbox_val_v3.tgz", "f4cd18b5ea29fe6bbea62ec9c20d80f0"),
        ),
    ),
    "ilsvrc2010": Edition(
        name="ILSVRC2010",
        num_classes=1000,
        devkit=Archive("ILSVRC2010_devkit-1.0.tar.gz"),
        train=Images(Archive("ILSVRC2010_images_train.tar"), 1_261_406, (668, 3047)),
        val=Images(Archive("ILSVRC2010_images_val.tar"), 50_000, (50, 50)),
        test=Images(Archive("ILSVRC2010_images_test.tar"), 150_000, (150, 150)),
        test_labels=Archive("ILSVRC2010_test_ground_truth.txt"),
        patches=Archive("patch_images.tar"),
        has_cost_matrix=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Synset:
    """A row of meta.mat: a class, or an inner node of their hierarchy.  children: ids."""

    ilsvrc_id: int
    wnid: str
    words: str
    gloss: str
    num_children: int
    children: list[int]
    wordnet_height: int
    num_train_images: int


@dataclass(frozen=True)
class Devkit:
    """What the devkit says.

    synsets: all of them, by id.  classes: those without children, by WNID: their position is the class index.
    rank: class index of every ILSVRC id.  val: class index of image number i + 1.
    cost_matrix: uint8 (classes, classes), by class index.
    """

    synsets: list[Synset]
    classes: list[Synset]
    rank: dict[int, int]
    val: list[int]
    cost_matrix: NDArray[np.uint8] | None


class Archives(Source):
    """The images of an edition, from a folder that holds its archives.

    splits: train, val, and test where its labels were published and both files are there.  Pickled, it is a path and
    the facts of the year.
    """

    published = True

    def __init__(self, root: Path, edition: Edition) -> None:
        """Raises BadData if archives are missing or the devkit is not the edition's."""
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
        self.classes = [ImageClass(synset.wnid, synset.words) for synset in self._devkit.classes]

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "edition": self.edition, "splits": self.splits, "classes": self.classes, "_fds": {}}

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
        return _ground_truth(text, str(self.root / labels.name), images, self._devkit.rank)

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
                f"{self.root / archive}: {len(unused)} patches replace no image of {split}: {_first(unused)}. "
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
                + _first(wrong, "\n")
                + (f"\nmissing: {_first(missing)}" if missing else "")
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


def _first(items: Sequence[str], separator: str = ", ") -> str:
    """The first ten, and how many more there are."""
    more = [f"and {len(items) - 10:,} more"] if len(items) > 10 else []
    return separator.join([*items[:10], *more])


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


def read_devkit(path: Path, edition: Edition) -> Devkit:
    """meta.mat and the labels of val, out of a devkit's .tar.gz.  Raises BadData if it is not the edition's."""
    labels_name = f"data/{edition.name}_validation_ground_truth.txt"
    files = _devkit_files(path, ("data/meta.mat", labels_name))
    if missing := [name for name, found in files.items() if found is None]:
        raise _not_the_devkit(path, edition, f"it lacks {', '.join(missing)}")
    synsets, cost_matrix = _meta(path, files["data/meta.mat"] or b"", edition)
    classes = [synset for synset in synsets if synset.num_children == 0]
    ids = [synset.ilsvrc_id for synset in classes]
    if len(classes) != edition.num_classes or len({synset.wnid for synset in synsets}) != len(synsets):
        raise _not_the_devkit(path, edition, f"it has {len(classes)} classes, not {edition.num_classes} distinct ones")
    if sorted(ids) != list(range(1, len(ids) + 1)) or len({synset.ilsvrc_id for synset in synsets}) != len(synsets):
        raise _not_the_devkit(path, edition, f"the ids of its classes are not 1 to {len(ids)}, each once")
    counts = [synset.num_train_images for synset in classes]
    fewest, most = edition.train.per_class
    if (sum(counts), min(counts), max(counts)) != (edition.train.num_images, fewest, most):
        has = f"it tells of {sum(counts):,} images for training, {min(counts)} to {max(counts)} a class"
        raise _not_the_devkit(path, edition, f"{has}; {edition.train.num_images:,}, {fewest} to {most}, are expected")
    rank = {number: label for label, number in enumerate(ids)}
    if cost_matrix is not None:
        order = np.array(ids) - 1
        cost_matrix = np.ascontiguousarray(cost_matrix[np.ix_(order, order)])
    val = _ground_truth(files[labels_name] or b"", f"{path}/{labels_name}", edition.val, rank)
    return Devkit(sorted(synsets, key=lambda synset: synset.ilsvrc_id), classes, rank, val, cost_matrix)


def _not_the_devkit(path: Path, edition: Edition, why: str) -> BadData:
    return BadData(f"{path}: not the devkit of {edition.name}: {why}. Put {edition.devkit.name} of that year there.")


def _devkit_files(path: Path, names: Iterable[str]) -> dict[str, bytes | None]:
    """The files of a .tar.gz whose paths end with these names (folders differ between copies); None if missing."""
    files: dict[str, bytes | None] = dict.fromkeys(names)
    unpacker = zlib.decompressobj(31)
    try:
        data = unpacker.decompress(path.read_bytes(), MAX_DEVKIT_BYTES)
        if not unpacker.eof:
            raise ValueError(f"cut short, or more than {MAX_DEVKIT_BYTES:,} bytes")
        # as a stream: it cannot be led backwards, and so not in circles
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as tar:
            for info in tar:
                name = "/".join(info.name.split("/")[-2:])
                if name in files and info.isreg():
                    if files[name] is not None:
                        raise ValueError(f"{name} stands in it twice")
                    file = tar.extractfile(info)
                    files[name] = file.read() if file else None
    except (zlib.error, tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise BadData(f"{path}: not a whole .tar.gz: {error}. Download it again.") from None
    return files


def _meta(path: Path, data: bytes, edition: Edition) -> tuple[list[Synset], NDArray[np.uint8] | None]:
    """The synsets of a meta.mat by WNID, and its cost matrix by id - 1."""
    from scipy.io import loadmat  # here and not in every worker: it takes a third of a second

    numbers = (f"{edition.name}_ID", "num_children", "wordnet_height", "num_train_images")
    texts = ("WNID", "words", "gloss")
    wanted = ["synsets", "cost_matrix"] if edition.has_cost_matrix else ["synsets"]
    try:
        meta = loadmat(io.BytesIO(data), squeeze_me=True, variable_names=wanted)
    except Exception as error:  # a reader of a format this loose fails in any way
        raise _not_the_devkit(path, edition, f"meta.mat cannot be read ({error})") from None
    if missing := [name for name in wanted if name not in meta]:
        raise _not_the_devkit(path, edition, f"its meta.mat has no {', '.join(missing)}")
    table = np.ravel(meta["synsets"])  # squeezed: a single row has no dimension left, nor has a single child
    if missing := [name for name in (*numbers, *texts, "children") if name not in (table.dtype.names or ())]:
        raise _not_the_devkit(path, edition, f"the synsets of its meta.mat have no {', '.join(missing)}")
    synsets = []
    for row in table:
        try:
            number, num_children, height, num_train_images = (_whole(row[name]) for name in numbers)
            wnid, words, gloss = ("".join(np.ravel(row[name])) for name in texts)  # an empty text is an empty array
            children = [_whole(child) for child in np.ravel(row["children"])]
        except (ValueError, TypeError):
            raise _not_the_devkit(path, edition, "the synsets of its meta.mat are not text and numbers") from None
        if not re.fullmatch(r"n\d{8}", wnid, re.ASCII):
            raise _not_the_devkit(path, edition, f"{wnid!r} is not a WNID")
        synsets.append(Synset(number, wnid, words, gloss, num_children, children, height, num_train_images))
    synsets.sort(key=lambda synset: synset.wnid)
    if not edition.has_cost_matrix:
        return synsets, None
    cost = np.asarray(meta["cost_matrix"])
    shape = (edition.num_classes, edition.num_classes)
    if cost.shape != shape or cost.dtype.kind not in "uif" or not np.array_equal(cost, cost.astype(np.uint8)):
        raise _not_the_devkit(path, edition, f"its cost_matrix is not {shape} whole numbers from 0 to 255")
    return synsets, cost.astype(np.uint8)


def _whole(value: Any) -> int:
    """A whole number that MATLAB may have kept as a float.  Raises ValueError or TypeError if it is none."""
    number = int(np.asarray(value).item())
    if number != value:
        raise ValueError(value)
    return number


def _ground_truth(text: bytes, where: str, images: Images, rank: dict[int, int]) -> list[int]:
    """Class indices from lines of ILSVRC ids.

    Raises BadData unless there is one for every image, each of a class, and as many of every class as there must be.
    """
    lines = text.split()
    again = f"It does not belong to {images.archive.name}; get both again, of one year."
    if len(lines) != images.num_images:
        raise BadData(f"{where}: {len(lines):,} labels for {images.num_images:,} images. {again}")
    for number, line in enumerate(lines, 1):
        if not line.isdigit() or int(line) not in rank:
            raise BadData(f"{where}: line {number}: {line.decode('ascii', 'backslashreplace')!r} is no class. {again}")
    labels = [rank[int(line)] for line in lines]
    counts, (fewest, most) = Counter(labels), images.per_class
    wrong = [f"id {i}: {counts[label]}" for i, label in rank.items() if not fewest <= counts[label] <= most]
    if wrong:
        raise BadData(f"{where}: not {fewest} images of each class, but of {_first(wrong)}. {again}")
    return labels
