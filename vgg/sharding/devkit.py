"""An ILSVRC devkit: classes, their hierarchy, and the labels of numbered images (val and test).

Each devkit numbers classes in its own way (ILSVRC2012_ID, ILSVRC2010_ID): an id is always mapped to its WNID by the
table in meta.mat.  A class index is the rank of the WNID.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BadData
from runtime.wording import some
from vgg.sharding.editions import Edition, Images

MAX_DEVKIT_BYTES = 2**28  # 256 MiB unpacked


@dataclass(frozen=True, slots=True)
class Synset:
    """A row of meta.mat: a class, or an inner node of the hierarchy.  children: ids."""

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
    """The contents of a devkit.

    synsets: all of them, sorted by id.  classes: those without children, sorted by WNID; the position is the class
    index.  rank: class index of every ILSVRC id.  val: class index of image number i + 1.
    cost_matrix: uint8 (classes, classes), by class index.
    """

    synsets: list[Synset]
    classes: list[Synset]
    rank: dict[int, int]
    val: list[int]
    cost_matrix: NDArray[np.uint8] | None


def read_devkit(path: Path, edition: Edition) -> Devkit:
    """Read meta.mat and the labels of val from a devkit's .tar.gz.  Raises BadData if it is not of this edition."""
    labels_name = f"data/{edition.name}_validation_ground_truth.txt"
    files = _devkit_files(path, ("data/meta.mat", labels_name))
    if missing := [name for name, found in files.items() if found is None]:
        raise _not_the_devkit(path, edition, f"{', '.join(missing)} is missing")
    synsets, cost_matrix = _meta(path, files["data/meta.mat"] or b"", edition)
    classes = [synset for synset in synsets if synset.num_children == 0]
    ids = [synset.ilsvrc_id for synset in classes]
    if len(classes) != edition.num_classes or len({synset.wnid for synset in synsets}) != len(synsets):
        raise _not_the_devkit(path, edition, f"it has {len(classes)} classes, not {edition.num_classes} distinct ones")
    if sorted(ids) != list(range(1, len(ids) + 1)) or len({synset.ilsvrc_id for synset in synsets}) != len(synsets):
        raise _not_the_devkit(path, edition, f"its class ids are not 1 to {len(ids)}, each once")
    counts = [synset.num_train_images for synset in classes]
    fewest, most = edition.train.per_class
    if (sum(counts), min(counts), max(counts)) != (edition.train.num_images, fewest, most):
        found = f"it lists {sum(counts):,} images for training, {min(counts)} to {max(counts)} per class"
        raise _not_the_devkit(path, edition, f"{found}; expected {edition.train.num_images:,}, {fewest} to {most}")
    rank = {number: label for label, number in enumerate(ids)}
    if cost_matrix is not None:
        order = np.array(ids) - 1
        cost_matrix = np.ascontiguousarray(cost_matrix[np.ix_(order, order)])
    val = ground_truth(files[labels_name] or b"", f"{path}/{labels_name}", edition.val, rank)
    return Devkit(sorted(synsets, key=lambda synset: synset.ilsvrc_id), classes, rank, val, cost_matrix)


def _not_the_devkit(path: Path, edition: Edition, why: str) -> BadData:
    return BadData(f"{path}: not the devkit of {edition.name}: {why}. Download {edition.devkit.name} of that year.")


def _devkit_files(path: Path, names: Iterable[str]) -> dict[str, bytes | None]:
    """Files of a .tar.gz whose paths end with these names (folders differ between copies); None if missing."""
    files: dict[str, bytes | None] = dict.fromkeys(names)
    unpacker = zlib.decompressobj(31)
    try:
        data = unpacker.decompress(path.read_bytes(), MAX_DEVKIT_BYTES)
        if not unpacker.eof:
            raise ValueError(f"truncated, or more than {MAX_DEVKIT_BYTES:,} bytes")
        # as a stream: headers cannot point backwards and cause an endless loop
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as tar:
            for info in tar:
                name = "/".join(info.name.split("/")[-2:])
                if name in files and info.isreg():
                    if files[name] is not None:
                        raise ValueError(f"duplicate {name}")
                    file = tar.extractfile(info)
                    files[name] = file.read() if file else None
    except (zlib.error, tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise BadData(f"{path}: not a complete .tar.gz: {error}. Download it again.") from None
    return files


def _meta(path: Path, data: bytes, edition: Edition) -> tuple[list[Synset], NDArray[np.uint8] | None]:
    """The synsets of a meta.mat, sorted by WNID, and its cost matrix, indexed by id - 1."""
    from scipy.io import loadmat  # not at the top: the import takes a third of a second in every worker

    numbers = (f"{edition.name}_ID", "num_children", "wordnet_height", "num_train_images")
    texts = ("WNID", "words", "gloss")
    wanted = ["synsets", "cost_matrix"] if edition.has_cost_matrix else ["synsets"]
    try:
        meta = loadmat(io.BytesIO(data), squeeze_me=True, variable_names=wanted)
    except Exception as error:  # damaged files make loadmat raise almost anything
        raise _not_the_devkit(path, edition, f"meta.mat cannot be read ({error})") from None
    if missing := [name for name in wanted if name not in meta]:
        raise _not_the_devkit(path, edition, f"its meta.mat has no {', '.join(missing)}")
    table = np.ravel(meta["synsets"])  # squeeze_me turns a single row, or a single child, into a scalar
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
        synsets.append(
            Synset(
                ilsvrc_id=number,
                wnid=wnid,
                words=words,
                gloss=gloss,
                num_children=num_children,
                children=children,
                wordnet_height=height,
                num_train_images=num_train_images,
            )
        )
    synsets.sort(key=lambda synset: synset.wnid)
    if not edition.has_cost_matrix:
        return synsets, None
    cost = np.asarray(meta["cost_matrix"])
    shape = (edition.num_classes, edition.num_classes)
    if cost.shape != shape or cost.dtype.kind not in "uif" or not np.array_equal(cost, cost.astype(np.uint8)):
        raise _not_the_devkit(path, edition, f"its cost_matrix is not {shape} whole numbers from 0 to 255")
    return synsets, cost.astype(np.uint8)


def _whole(value: Any) -> int:
    """An integer that MATLAB may have stored as a float.  Raises ValueError or TypeError for anything else."""
    number = int(np.asarray(value).item())
    if number != value:
        raise ValueError(value)
    return number


def ground_truth(text: bytes, where: str, images: Images, rank: dict[int, int]) -> list[int]:
    """Class indices from lines of ILSVRC ids.

    Raises BadData for a wrong number of labels, an unknown id, or a wrong number of images in a class.
    """
    lines = text.split()
    advice = f"It does not belong to {images.archive.name}; download both again, of the same year."
    if len(lines) != images.num_images:
        raise BadData(f"{where}: {len(lines):,} labels for {images.num_images:,} images. {advice}")
    for number, line in enumerate(lines, 1):
        if not line.isdigit() or int(line) not in rank:
            shown = line.decode("ascii", "backslashreplace")
            raise BadData(f"{where}: line {number}: {shown!r} is not a class id. {advice}")
    labels = [rank[int(line)] for line in lines]
    counts, (fewest, most) = Counter(labels), images.per_class
    wrong = [f"id {i}: {counts[label]}" for i, label in rank.items() if not fewest <= counts[label] <= most]
    if wrong:
        raise BadData(f"{where}: expected {fewest} images per class, found {some(wrong)}. {advice}", wrong)
    return labels
