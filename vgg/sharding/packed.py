"""Results of packing, per shard, and what is built from them: our index, indexes for DALI and timm, the manifest."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime import manifest
from runtime.errors import BadData
from runtime.shards.shardset import row_type
from runtime.wording import counted, listing, some
from vgg.params.shard import ShardParams
from vgg.sharding.inspect import NUM_SUMS
from vgg.sharding.sources import ImageClass

log = logging.getLogger("vgg.shards")

Row = tuple[int, int, int, int, int, int, str]


@dataclass
class Packed:
    """The result of one shard.  rows: (offset, size, label, width, height, crc32c, key) of every image.  sums: as in
    inspect.Inspected, over all images.  bad: images left out.  entry, dali_entry: entries of the manifest."""

    path: str
    rows: list[Row] = field(default_factory=list)
    amended: list[dict[str, str]] = field(default_factory=list)
    remarks: list[dict[str, str]] = field(default_factory=list)
    bad: list[dict[str, str]] = field(default_factory=list)
    sums: list[int] = field(default_factory=lambda: [0] * NUM_SUMS)
    entry: dict[str, Any] = field(default_factory=dict)
    dali_entry: dict[str, Any] = field(default_factory=dict)

    @property
    def dali_name(self) -> str:
        return self.path.removesuffix(".tar") + ".idx"

    def dali_index(self) -> bytes:
        """For DALI's readers.webdataset (index_paths, v1.2 of its wds2idx): offset and size of every file."""
        lines = [f"v1.2 {len(self.rows)}"]
        for offset, size, label, *_, key in self.rows:
            label_offset = offset - 1024  # a block with the label and a header come before the image
            lines.append(f"cls {label_offset} {len(str(label))} {key}.cls jpg {offset} {size} {key}.jpg")
        return ("\n".join(lines) + "\n").encode()


def index_bytes(shards: list[Packed]) -> bytes:
    """The index of a split: rows of shardset.row_type, as .npy."""
    key_bytes = max((len(row[6]) for shard in shards for row in shard.rows), default=1)
    rows = [(number, *row[:6], row[6].encode()) for number, shard in enumerate(shards) for row in shard.rows]
    file = io.BytesIO()
    np.save(file, np.array(rows, row_type(key_bytes)), allow_pickle=False)
    return file.getvalue()


def timm_info(packed: dict[str, list[Packed]]) -> dict[str, bytes]:
    """_info.json for timm: the shards of every split and the number of images in each, by file name."""
    splits = {
        split: {
            "name": split,
            "num_samples": sum(len(shard.rows) for shard in shards),
            "filenames": [shard.path for shard in shards],
            "shard_lengths": [len(shard.rows) for shard in shards],
        }
        for split, shards in packed.items()
    }
    return {"_info.json": (json.dumps({"splits": splits}, indent=1) + "\n").encode()}


def describe(
    packed: dict[str, list[Packed]], duplicates: list[list[str]], strays: Sequence[dict[str, str]]
) -> dict[str, Any]:
    """The part of the manifest that describes the images.

    images_sha256 does not depend on the order of the images in the shards.  duplicates: from duplicates().
    strays: what was left out besides images, as Packed.bad.
    """
    shards = [shard for split_shards in packed.values() for shard in split_shards]
    return {
        "splits": {
            split: {
                "index": f"{split}.index.npy",
                "num_images": sum(len(shard.rows) for shard in split_shards),
                "shards": [{"path": shard.path, "num_images": len(shard.rows)} for shard in split_shards],
            }
            for split, split_shards in packed.items()
        },
        "pixels": _mean_and_std([shard.sums for shard in packed["train"]]),
        "images_sha256": manifest.digest_of(sorted(_samples(packed))),
        "amended": [item for shard in shards for item in shard.amended],
        "remarks": [item for shard in shards for item in shard.remarks],
        "quarantined": [*strays, *(item for shard in shards for item in shard.bad)],
        "duplicates": duplicates,
    }


def _mean_and_std(sums: list[list[int]]) -> dict[str, list[float]]:
    """Mean of R, G and B over all pixels, standard deviation over every 15th row of large images, 0 to 255; 4 decimals.

    sums: as in inspect.Inspected, of every shard; exact integers, so the order of addition does not matter.
    """
    n, *rest = (sum(column) for column in zip(*sums, strict=True))
    totals, m, sampled, squares = rest[:3], rest[3], rest[4:7], rest[7:]
    variances = [(square * m - total * total) / m**2 for total, square in zip(sampled, squares, strict=True)]
    return {
        "mean": [round(total / n, 4) for total in totals],
        # images of a single flat colour have no deviation: divide by one grey level instead of zero
        "std": [round(max(1.0, variance**0.5), 4) for variance in variances],
    }


def _samples(packed: dict[str, list[Packed]]) -> Iterator[tuple[str, str, int, int]]:
    """(split, key, bytes, crc32c) of every image."""
    for split, shards in packed.items():
        for shard in shards:
            for row in shard.rows:
                yield split, row[6], row[1], row[5]


def duplicates(packed: dict[str, list[Packed]], read: Callable[[str, str], bytes]) -> list[list[str]]:
    """Groups of images with the same bytes, as 'split/key'.  Warns of images in two splits or classes.

    read: the bytes of an image by (split, key); called only for images that share size and checksum.
    """
    candidates: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for split, key, size, crc in _samples(packed):
        candidates.setdefault((size, crc), []).append((split, key))
    groups: dict[str, list[str]] = {}
    for suspects in candidates.values():
        for split, key in suspects if len(suspects) > 1 else ():
            groups.setdefault(hashlib.sha256(read(split, key)).hexdigest(), []).append(f"{split}/{key}")
    found = sorted(sorted(group) for group in groups.values() if len(group) > 1)
    named = {name for group in found for name in group}
    splits = {name: name.split("/")[0] for name in named}
    labels = {
        name: row[2]
        for split, shards in packed.items()
        for shard in shards
        for row in shard.rows
        if (name := f"{split}/{row[6]}") in named
    }
    for what, of in (("split", splits), ("class", labels)):
        across = [group for group in found if len({of[name] for name in group}) > 1]
        if across:
            examples = some([" = ".join(group) for group in across])
            is_ = "is" if len(across) == 1 else "are"
            log.warning(
                "%s %s in more than one %s (see 'duplicates' in the manifest): %s",
                counted(len(across), "image"), is_, what, examples,
            )  # fmt: skip
    return found


def refuse_unusable(
    params: ShardParams, classes: list[ImageClass], bad: list[dict[str, str]], packed: dict[str, list[Packed]]
) -> None:
    """Raises BadData for more unusable images than the parameters allow, or classes without a usable image.

    bad: what was left out, as Packed.bad, strays included.
    """
    bare = classes_without_images(
        classes, {split: {row[2] for shard in shards for row in shard.rows} for split, shards in packed.items()}
    )
    allowed = params.max_quarantined if params.on_bad_image == "quarantine" else 0
    names = [f"{item['name']}: {item['reason']}" for item in bad]
    counts = f"{counted(len(bad), 'unusable image')} ({allowed:,} allowed)"
    if bare:
        found = "1 class" if len(bare) == 1 else f"{len(bare):,} classes"
        heading = f"{found} without a usable image" + (f", {counts}" if bad else "")
        raise BadData(
            f"{heading}:\n{listing([*bare, *names])}\n"
            "Every class needs an image in every split: repair or add some, or remove the class everywhere.",
            [*bare, *names],
        )
    if len(bad) > allowed:
        quarantines = params.on_bad_image == "quarantine"
        remedy = f"shard.max_quarantined: {len(bad)}" + ("" if quarantines else " and shard.on_bad_image: quarantine")
        raise BadData(f"{counts}:\n{listing(names)}\nRepair or remove them, or set {remedy}.", names)
    if bad:
        log.warning("%s left out (listed in the manifest):\n%s", counted(len(bad), "unusable image"), listing(names))


def classes_without_images(classes: list[ImageClass], labels: dict[str, set[int]]) -> list[str]:
    """A line for every class and split without an image: it would be learned or measured by nothing.

    labels: of the images of a split.
    """
    return [
        f"{split}/{image_class.wnid}: no usable image of this class"
        for split, found in labels.items()
        for label, image_class in enumerate(classes)
        if label not in found
    ]
