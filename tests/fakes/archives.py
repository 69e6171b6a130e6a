"""Small ILSVRC archives with the real layout: tars of tars, a devkit with a real meta.mat, and unusual images.

write_2012 and write_2010 return the Edition that matches the files.  A test can pass changed pictures or synsets.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from runtime.errors import BadData
from vgg.sharding.editions import EDITIONS, Archive, Edition, Images
from vgg.sharding.ilsvrc import Archives
from vgg.sharding.sources import Original

Pictures = dict[str, dict[str, bytes]]  # split -> key -> the bytes of the member


@dataclass(frozen=True)
class Row:
    """A row of meta.mat."""

    id: int
    wnid: str
    words: str
    children: tuple[int, ...] = ()
    height: int = 0


SYNSETS_2012 = [  # ids are not in the order of WNIDs; 5 has a single child
    Row(1, "n03018349", "china cabinet, china closet"),
    Row(2, "n01440764", "tench, Tinca tinca"),
    Row(3, "n02105855", "Shetland sheepdog, Shetland sheep dog, Shetland"),
    Row(4, "n01739381", "vine snake"),
    Row(5, "n03405725", "furniture, piece of furniture", (1,), 1),
    Row(6, "n00015388", "animal, animate being", (4, 2, 3), 2),
    Row(7, "n00001740", "entity", (5, 6), 3),
]
SYNSETS_2010 = [
    Row(1, "n04596742", "wok"),
    Row(2, "n02487347", "macaque"),
    Row(3, "n01440764", "tench, Tinca tinca"),
    Row(4, "n02872752", "book jacket, dust cover"),
    Row(5, "n03094503", "container", (1, 4), 1),
    Row(6, "n00001740", "entity", (5, 2, 3), 2),
]
COST_2010 = np.array([[0, 3, 4, 1], [3, 0, 2, 5], [4, 2, 0, 6], [1, 5, 6, 0]], np.uint8)  # by id
LABELS_2012 = [3, 1, 4, 2, 2, 4, 1, 3]  # ids, line by line
LABELS_2010 = {"val": [2, 2, 4, 1, 3, 4, 3, 1], "test": [1, 4, 3, 2, 1, 2, 3, 4, 4, 3, 2, 1]}

TRAIN_2012 = {
    "n01440764": (10026, 3, 1009, 77, 12),
    "n01739381": (1309, 2, 30, 400),  # 1309: CMYK
    "n02105855": (2933, 5, 6, 7, 80, 9),  # 2933: a PNG, RGBA
    "n03018349": (4028, 1, 12, 9, 15),  # 4028: CMYK
}
TRAIN_2010 = {
    "n01440764": (10026, 3, 1009, 77, 12),
    "n02487347": (1956, 2, 30, 400),  # 1956: gzip-compressed
    "n02872752": (3721, 5, 6, 7, 80, 9),  # 3721: CMYK
    "n04596742": (4225, 1, 12, 9, 15),  # 4225: CMYK; 12: blank, patched
}


COUNTS_2012 = {wnid: len(numbers) for wnid, numbers in TRAIN_2012.items()}
COUNTS_2010 = {wnid: len(numbers) for wnid, numbers in TRAIN_2010.items()}
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def opened(root: Path, write: Callable[..., Edition], *changes: object) -> Archives:
    """The source of newly written archives.  changes: arguments of write_2012 or write_2010."""
    return Archives(root, write(root, *changes))


def by_key(source: Archives, split: str) -> dict[str, Original]:
    found = source.originals(split)
    assert len({original.key for original in found}) == len(found)
    return {original.key: original for original in found}


def message(act: Callable[[], object]) -> str:
    """The message of the BadData that a call raises."""
    with pytest.raises(BadData) as caught:
        act()
    return str(caught.value)


def picture(seed: int, kind: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    """A smooth random picture of one of four sizes."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    size = ((48, 36), (36, 48), (40, 40), (101, 67))[seed % 4]
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def blank() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 50), "white").save(file, "JPEG")
    return file.getvalue()


def rotated(seed: int) -> bytes:
    """A JPEG with an EXIF orientation of 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(seed, exif=exif)


def pictures_2012() -> Pictures:
    """The members of train and val, by key; unusual images are those of the real archives, or similar."""
    train = _train(TRAIN_2012, 0)
    train["n01739381_1309"] = picture(201, mode="CMYK")
    train["n03018349_4028"] = picture(202, mode="CMYK")
    train["n02105855_2933"] = picture(203, "PNG", "RGBA")
    train["n01440764_3"] = picture(204, mode="L")
    train["n03018349_9"] = rotated(205)
    val = _numbered("ILSVRC2012_val", len(LABELS_2012), 300)
    val["ILSVRC2012_val_00000007"] = picture(206, mode="CMYK")
    return {"train": train, "val": val}


def pictures_2010() -> Pictures:
    """The members of train, val, test and, as "patches", of patch_images.tar by path: <split>/<key>."""
    train = _train(TRAIN_2010, 1000)
    train["n02487347_1956"] = gzip.compress(picture(401), mtime=0)
    train["n02872752_3721"] = picture(402, mode="CMYK")
    train["n04596742_4225"] = picture(403, mode="CMYK")
    train["n04596742_12"] = blank()
    val = _numbered("ILSVRC2010_val", len(LABELS_2010["val"]), 1300)
    val["ILSVRC2010_val_00000003"] = blank()
    test = _numbered("ILSVRC2010_test", len(LABELS_2010["test"]), 1400)
    test["ILSVRC2010_test_00000010"] = blank()
    patches = {
        "train/n04596742_12": picture(501),
        "val/ILSVRC2010_val_00000003": picture(502),
        "test/ILSVRC2010_test_00000010": picture(503),
    }
    return {"train": train, "val": val, "test": test, "patches": patches}


def _train(numbers: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, bytes]:
    keys = [f"{wnid}_{number}" for wnid, several in numbers.items() for number in several]
    return {key: picture(seed + i) for i, key in enumerate(keys)}


def _numbered(stem: str, count: int, seed: int) -> dict[str, bytes]:
    return {f"{stem}_{i + 1:08d}": picture(seed + i) for i in range(count)}


def tar(members: Mapping[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of these files, with entries for their folders, as tar(1) writes it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        folders = set()
        for name, data in members.items():
            folder = name.rpartition("/")[0]
            if folder and folder not in folders:
                folders.add(folder)
                info = tarfile.TarInfo(folder)
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1340908245, "jiadeng"
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def tar_of_tars(train: Mapping[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """<wnid>.tar for every class of these images, in order of appearance."""
    classes: dict[str, dict[str, bytes]] = {}
    for key, data in train.items():
        classes.setdefault(key.split("_")[0], {})[f"{key}.JPEG"] = data
    return tar({f"{wnid}.tar": tar(images, form) for wnid, images in classes.items()}, form)


def numbered_tar(images: Mapping[str, bytes], folder: str = "", form: int = tarfile.GNU_FORMAT) -> bytes:
    """A flat tar, the last image first: readers must not rely on the order."""
    return tar({f"{folder}{key}.JPEG": images[key] for key in reversed(images)}, form)


def meta_mat(edition: str, synsets: list[Row], counts: Mapping[str, int], **variables: Any) -> bytes:
    """A MATLAB file with the struct array `synsets`, N x 1, as in the devkits."""
    fields = ("WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images")
    table = np.empty((len(synsets), 1), [(name, object) for name in (f"{edition}_ID", *fields)])
    for i, row in enumerate(synsets):
        children = np.array([row.children], float) if row.children else np.empty((0, 0))
        gloss = f"what is meant by {row.words}" if row.children else ""
        table[i, 0] = (
            float(row.id), row.wnid, row.words, gloss, float(len(row.children)), children, float(row.height),
            float(counts.get(row.wnid, 0)),
        )  # fmt: skip
    file = io.BytesIO()
    savemat(file, {"synsets": table, **variables}, do_compression=True)
    return file.getvalue()


def lines(ids: list[int]) -> bytes:
    return "".join(f"{number}\n" for number in ids).encode()


def devkit(folder: str, edition: str, meta: bytes, labels: bytes) -> bytes:
    """A .tar.gz like the published ones."""
    members = {
        f"{folder}/readme.txt": b"This is the documentation of the development kit.\n",
        f"{folder}/data/{edition}_validation_ground_truth.txt": labels,
        f"{folder}/data/meta.mat": meta,
        f"{folder}/evaluation/eval_flat.m": b"function e = eval_flat(p, g)\n",
    }
    return gzip.compress(tar(members), mtime=0)


def write_2012(root: Path, pictures: Pictures | None = None, synsets: list[Row] | None = None) -> Edition:
    """Write the archives of ILSVRC-2012; the edition always matches pictures_2012()."""
    real = EDITIONS["ilsvrc2012"]
    pictures = pictures or pictures_2012()
    meta = meta_mat(real.name, synsets or SYNSETS_2012, COUNTS_2012)
    root.mkdir(parents=True, exist_ok=True)
    return replace(
        real,
        num_classes=4,
        devkit=_put(root, real.devkit, devkit("ILSVRC2012_devkit_t12", real.name, meta, lines(LABELS_2012))),
        train=Images(_put(root, real.train.archive, tar_of_tars(pictures["train"])), 20, (4, 6)),
        val=Images(_put(root, real.val.archive, numbered_tar(pictures["val"])), 8, (2, 2)),
    )


def write_2010(root: Path, pictures: Pictures | None = None, synsets: list[Row] | None = None) -> Edition:
    """Write the archives of ILSVRC-2010, with its test set; md5s are not published."""
    real = EDITIONS["ilsvrc2010"]
    pictures = pictures or pictures_2010()
    meta = meta_mat(real.name, synsets or SYNSETS_2010, COUNTS_2010, cost_matrix=COST_2010)
    root.mkdir(parents=True, exist_ok=True)
    assert real.test
    assert real.test_labels
    assert real.patches
    for archive, data in (
        (real.devkit, devkit("devkit-1.0", real.name, meta, lines(LABELS_2010["val"]))),
        (real.train.archive, tar_of_tars(pictures["train"], tarfile.USTAR_FORMAT)),
        (real.val.archive, numbered_tar(pictures["val"], "val/", tarfile.USTAR_FORMAT)),
        (real.test.archive, numbered_tar(pictures["test"], "test/", tarfile.USTAR_FORMAT)),
        (real.test_labels, lines(LABELS_2010["test"])),
        (real.patches, tar({f"patch_images/{name}.JPEG": data for name, data in pictures["patches"].items()})),
    ):
        (root / archive.name).write_bytes(data)
    return replace(
        real,
        num_classes=4,
        train=Images(real.train.archive, 20, (4, 6)),
        val=Images(real.val.archive, 8, (2, 2)),
        test=Images(real.test.archive, 12, (3, 3)),
    )


def _put(root: Path, archive: Archive, data: bytes) -> Archive:
    """Write a file; its md5 becomes the published one."""
    (root / archive.name).write_bytes(data)
    return Archive(archive.name, hashlib.md5(data).hexdigest())
