"""The boxes of a set of shards: an artefact of its own beside them, so that adding boxes changes no shard.

    {train,val}.boxes.npy    a row per box: number of the image (row of the split's index), class, pixels as in the file
    manifest.json            shards and classes it belongs to, sources, counts, anomalies; written last

The same annotations and shards give the same bytes.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import manifest
from runtime.errors import BadData, Refused, WrongParameters
from runtime.shards.shardset import ShardSet
from runtime.targets import Directory, holding
from runtime.wording import counted, listing, some
from vgg.localisation.annotations import Annotations, ArchivedXml, FolderXml, KaggleTable
from vgg.localisation.boxes import half_open
from vgg.localisation.instances import Instances
from vgg.localisation.joining import KINDS, Join, OnMismatch
from vgg.sharding.editions import EDITIONS
from vgg.sharding.scenes import DigitScenes

log = logging.getLogger("vgg.boxes")

SCHEMA = "vgg.boxes/1"
SPLITS = ("train", "val")
SOURCES = ("digit-scenes", "folder", "ilsvrc2012", "kaggle")  # shard.source of which boxes are known
ROW = np.dtype(
    [("number", "<i8"), ("label", "<i4"), ("xmin", "<i4"), ("ymin", "<i4"), ("xmax", "<i4"), ("ymax", "<i4")]
)
OWN_FILES = re.compile(r"((train|val)\.boxes\.npy|manifest\.json)(\.\d+-[0-9a-f]{8}\.tmp)?")
KAGGLE = "ILSVRC/Annotations/CLS-LOC"


def annotations_of(kind: str, images: Path, split: str, check_md5: bool) -> Annotations:
    """The annotations of a split, where a source (shard.source) has them.  images: its folder.

    Raises BadData if they are not there, WrongParameters if the source has none.
    """
    if kind == "digit-scenes":
        scenes = DigitScenes()
        return ArchivedXml(f"digit-scenes_bbox_{split}.tar", lambda: io.BytesIO(scenes.annotation_archive(split)))
    if kind == "ilsvrc2012":
        archive = EDITIONS[kind].boxes[SPLITS.index(split)]
        path = images / archive.name
        if not path.is_file():
            raise _nothing(kind, [path], "Download it (image-net.org), do not unpack it.")
        return ArchivedXml(archive.name, lambda: open(path, "rb"), archive.md5 if check_md5 else None)
    if kind == "kaggle":
        folder, table = f"{KAGGLE}/{split}", f"LOC_{split}_solution.csv"
        if (images / folder).is_dir():  # preferred: it tells the sizes of the images
            return FolderXml(folder, images / folder)
        if (images / table).is_file():
            return KaggleTable(table, images / table)
        raise _nothing(kind, [images / folder, images / table], "Unpack the whole download.")
    if kind == "folder":
        for folder in (f"annotations/{split}", split):  # apart, or beside the images
            if (images / folder).is_dir():
                return FolderXml(folder, images / folder)
        raise _nothing(kind, [images / "annotations" / split, images / split], "Put XMLs there, <class>/<image>.xml.")
    raise WrongParameters(f"shard.source {kind!r}: no boxes are known; only {', '.join(SOURCES)} have some")


def _nothing(kind: str, places: Sequence[Path], remedy: str) -> BadData:
    where = " nor ".join(map(str, places))
    return BadData(f"{where}: missing; the boxes of shard.source {kind!r} are read there. {remedy}")


def write(
    kind: str,
    images: Path,
    shards: ShardSet,
    directory: Path,
    *,
    pixel_origin: int,
    on_box_mismatch: OnMismatch,
    check_md5: bool,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the boxes of all images of a source to a directory; returns the manifest.

    kind: shard.source.  images: folder of the source.  shards: of this source.
    pixel_origin: number of the first pixel in the annotations, 0 or 1.
    on_box_mismatch: what to do with annotations of an image of another size: "fail", "scale" their boxes, or "drop"
    them.  check_md5: first compare archives with their published md5.  report: called with (annotated images, images).
    Raises BadData, naming them, for annotations that cannot be read or joined and for validation images without a box
    of their class; WrongParameters if the source has no boxes or the directory holds files of something else.
    """
    if kind not in SOURCES:
        raise WrongParameters(f"shard.source {kind!r}: no boxes are known; only {', '.join(SOURCES)} have some")
    target = Directory(directory)
    if others := [name for name in target.names() if not OWN_FILES.fullmatch(name)]:
        raise WrongParameters(f"{directory}: holds other files: {some(others)}. Choose an empty folder for the boxes.")
    for name in (manifest.NAME, *(name for name in target.names() if name != manifest.NAME)):
        target.delete(name)  # the manifest first: unfinished from here on
    origins, splits, entries, anomalies = {}, {}, [], {}
    for split in SPLITS:
        annotations = annotations_of(kind, images, split, check_md5)
        join = _joined(annotations, shards, split, pixel_origin, on_box_mismatch, report)
        rows = np.array(join.rows, ROW)
        entries.append(target.write(_name(split), holding(_npy(rows))))
        origins[split], anomalies[split] = annotations.origin(), join.anomalies.described()
        splits[split] = {
            "boxes": _name(split),
            "num_images": len(shards.split(split)),
            "num_boxes": len(rows),
            "num_own_boxes": join.num_own_boxes,
            "num_with_box": len(shards.split(split)) - len(join.without_box),
        }
    body = {
        "dataset": kind,
        "shards": shards.digest,
        "classes_sha256": shards.classes_sha256,
        "parameters": {"pixel_origin": pixel_origin, "on_box_mismatch": on_box_mismatch},
        "sources": origins,
        "splits": splits,
        "anomalies": anomalies,
    }
    finished = manifest.compose(SCHEMA, body, entries)
    target.write(manifest.NAME, holding(manifest.text(finished)))
    return finished


def _joined(
    annotations: Annotations,
    shards: ShardSet,
    split: str,
    pixel_origin: int,
    on_mismatch: OnMismatch,
    report: Callable[[int, int], None] | None,
) -> Join:
    """Raises BadData for everything that is wrong with the annotations of a split."""
    prefix = f"{split}/"
    renamed = {k.removeprefix(prefix): n for k, n in shards.manifest["renamed"].items() if k.startswith(prefix)}
    images = shards.split(split)
    join = Join(images, shards.wnids, renamed, pixel_origin, on_mismatch)
    for annotation in annotations:
        join.add(annotation)
        if report and join.num_joined % 1000 == 0:
            report(join.num_joined, len(images))
    join.finish()
    if report:
        report(len(images), len(images))
    _refuse(annotations.malformed, "annotation", "that cannot be read", "Repair or remove them.")
    _refuse(join.ambiguous, "annotation", "of an unknown image", "Put them into folders named by class.")
    _refuse(join.several, "annotation", "too many", "Keep one for each image.")
    if on_mismatch == "fail":
        remedy = "on_box_mismatch: scale brings their boxes to the size of the image, drop leaves them out."
        _refuse(join.mismatched, "annotation", "of an image of another size", remedy)
    if split == "val":
        remedy = f"Every one needs a box, in {annotations.name}: add it, or remove the image and shard again."
        _refuse(join.missing(), "validation image", "without a box of its class", remedy)
    for kind, found in join.anomalies.described().items():
        examples = "; ".join(found["first"][:3])
        log.info("%s: %s %s, as %s", split, f"{found['count']:,}", KINDS[kind], examples)
    return join


def _refuse(found: list[str], noun: str, what: str, remedy: str) -> None:
    if found:
        raise BadData(f"{counted(len(found), noun)} {what}:\n{listing(found)}\n{remedy}", found)


def _npy(rows: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, rows, allow_pickle=False)
    return file.getvalue()


def _name(split: str) -> str:
    return f"{split}.boxes.npy"


@dataclass(frozen=True)
class BoxSet:
    """A finished artefact.  digest: of its directory.  pixel_origin: number of the first pixel in its files, 0 or 1."""

    directory: Path
    shards: ShardSet
    manifest: dict[str, Any]
    digest: str
    pixel_origin: int

    @classmethod
    def open(cls, directory: Path, shards: ShardSet) -> BoxSet:
        """Open and verify it.  Raises Refused if it is missing, damaged, or of other shards or classes."""
        content = manifest.read(directory, SCHEMA)
        for what, ours, theirs in (
            ("classes", content["classes_sha256"], shards.classes_sha256),
            ("shards", content["shards"], shards.digest),
        ):
            if ours != theirs:
                raise Refused(
                    f"{directory}: the boxes are of other {what} ({ours[:12]}) than {shards.address} ({theirs[:12]}). "
                    "Make the boxes again, from these shards."
                )
        for entry in content["files"]:
            manifest.verify_file(directory, entry)
        digest = manifest.directory_digest(directory, content)
        return cls(directory, shards, content, digest, content["parameters"]["pixel_origin"])

    def rows(self, split: str) -> NDArray[Any]:
        """All boxes of a split as in the file, those of other classes too: ROW, in the order of the images."""
        found: NDArray[Any] = np.load(self.directory / self.manifest["splits"][split]["boxes"], allow_pickle=False)
        return found

    def split(self, name: str) -> Instances:
        """The boxes that are of their image's class."""
        rows, labels = self.rows(name), self.shards.split(name).rows["label"]
        own = rows[rows["label"] == labels[rows["number"]]]
        counts = np.bincount(own["number"], minlength=len(labels))
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        sides = np.stack([own[side] for side in ("xmin", "ymin", "xmax", "ymax")], axis=1)
        return Instances(first, half_open(sides, self.pixel_origin))
