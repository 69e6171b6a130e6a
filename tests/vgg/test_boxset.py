"""Boxes beside shards: joined by name, cleaned up, counted, verified."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import message, tar, write_2012
from conftest import SHARD, draw, draw_images

from runtime import manifest
from runtime.errors import Refused, WrongParameters
from runtime.shards.shardset import ShardSet
from runtime.targets import Directory
from vgg.localisation import boxset
from vgg.localisation.boxset import BoxSet
from vgg.params.shard import ShardParams
from vgg.sharding import scenes
from vgg.sharding.editions import EDITIONS, Archive
from vgg.sharding.ilsvrc import Archives
from vgg.sharding.pack import pack
from vgg.sharding.scenes import DigitScenes, voc_xml
from vgg.sharding.sources import Folder

Objects = list[tuple[str, tuple[int, int, int, int]]]


def write(shards: ShardSet, images: Path, to: Path, kind: str = "folder", **changes: Any) -> BoxSet:
    options = {"pixel_origin": 0, "on_box_mismatch": "fail", "check_md5": True, **changes}
    boxset.write(kind, images, shards, to, **options)
    return BoxSet.open(to, shards)


def packed(source: Any, to: Path, kind: str) -> ShardSet:
    pack(ShardParams(**{**SHARD, "source": kind}), source, Directory(to), "test", num_workers=1)
    return ShardSet(to)


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def size_of(shards: ShardSet, split: str, number: int) -> tuple[int, int]:
    row = shards.split(split).rows[number]
    return int(row["width"]), int(row["height"])


def place(images: Path, shards: ShardSet, split: str, number: int) -> Path:
    """Where the XML of an image of the fixture goes: annotations/<split>/<class>/<stem>.xml."""
    wnid, _, stem = shards.split(split).key(number).partition("_")
    return images / "annotations" / split / wnid / f"{stem}.xml"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    draw_images(root)
    return root


@pytest.fixture(scope="module")
def shards(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return packed(Folder(drawn), tmp_path_factory.mktemp("shards"), "folder")


@pytest.fixture
def annotated(tmp_path: Path, shards: ShardSet) -> Path:
    """A folder with an XML for every image of the shards: one box of their class, 3 5 22 30."""
    images = tmp_path / "annotated"
    for split in ("train", "val"):
        for number in range(len(shards.split(split))):
            wnid = shards.split(split).key(number).partition("_")[0]
            xml = voc_xml("%s", *size_of(shards, split, number), [(wnid, (3, 5, 22, 30))])
            put(place(images, shards, split, number), xml)
    return images


def rewrite(images: Path, shards: ShardSet, objects: Objects, split: str = "train", **size: tuple[int, int]) -> str:
    """Other objects for image 4 of a split; returns its key."""
    width, height = size.get("size") or size_of(shards, split, 4)
    put(place(images, shards, split, 4), voc_xml("%s", width, height, objects))
    return shards.split(split).key(4)


def test_boxes_are_half_open_and_in_the_order_of_the_index(annotated: Path, shards: ShardSet, tmp_path: Path) -> None:
    wnid = shards.split("train").key(4).partition("_")[0]
    rewrite(annotated, shards, [(wnid, (0, 0, 9, 4)), (wnid, (7, 7, 7, 7))])
    found = write(shards, annotated, tmp_path / "boxes")
    train = found.split("train")
    assert train.first.tolist() == [0, 1, 2, 3, 4, *range(6, 32)]
    assert train.boxes[3:7].tolist() == [[3, 5, 23, 31], [0, 0, 10, 5], [7, 7, 8, 8], [3, 5, 23, 31]]
    assert (train.first.dtype, train.boxes.dtype, train.has_box.all()) == (np.int64, np.float64, True)
    assert found.rows("train")[4].tolist() == (4, shards.wnids.index(wnid), 0, 0, 9, 4)
    assert len(found.split("val").boxes) == 13
    shutil.rmtree(tmp_path / "boxes")
    for file in (annotated / "annotations").rglob("*.xml"):  # counted from 1
        file.write_bytes(file.read_bytes().replace(b"min>0<", b"min>1<"))
    assert write(shards, annotated, tmp_path / "boxes", pixel_origin=1).split("train").boxes[5].tolist() == [6, 6, 7, 7]
    assert BoxSet.open(tmp_path / "boxes", shards).pixel_origin == 1


@pytest.mark.parametrize(
    ("box", "expected", "kinds"),
    [
        ((22, 30, 3, 5), (3, 5, 22, 30), {"swapped"}),
        ((-4, 5, 22, 500), (0, 5, 22, -1), {"outside"}),
        ((30, -9, 3, 5), (3, 0, 30, 5), {"swapped", "outside"}),
        ((0, 0, 10_000, 10_000), (0, 0, -1, -1), {"outside"}),
        ((2000, 5, 2010, 9), None, {"outside", "empty", "without_box"}),
        ((-10, 5, -1, 9), None, {"outside", "empty", "without_box"}),
    ],
)
def test_boxes_are_cleaned_up_and_counted(
    box: tuple[int, int, int, int],
    expected: tuple[int, int, int, int] | None,
    kinds: set[str],
    annotated: Path,
    shards: ShardSet,
    tmp_path: Path,
) -> None:
    """-1: the last pixel of the image."""
    wnid = shards.wnids[int(shards.split("train").rows["label"][4])]
    key = rewrite(annotated, shards, [(wnid, box)])
    found = write(shards, annotated, tmp_path / "boxes")
    anomalies = found.manifest["anomalies"]["train"]
    assert {kind: entry["count"] for kind, entry in anomalies.items()} == dict.fromkeys(kinds, 1)
    assert all(entry["first"][0].startswith(key) for entry in anomalies.values())
    rows = [row.tolist()[2:] for row in found.rows("train") if row["number"] == 4]
    if expected is None:
        assert rows == []
        assert not found.split("train").has_box[4]
    else:
        width, height = size_of(shards, "train", 4)
        last = (0, 0, width - 1, height - 1)
        assert rows == [tuple(last[i] if side == -1 else side for i, side in enumerate(expected))]


def test_boxes_of_other_classes_are_kept_but_not_used(annotated: Path, shards: ShardSet, tmp_path: Path) -> None:
    label = int(shards.split("train").rows["label"][4])
    own, other = shards.wnids[label], shards.wnids[(label + 1) % 3]
    rewrite(annotated, shards, [(other, (1, 1, 9, 9)), (own, (2, 2, 9, 9)), ("n\u20281", (3, 3, 9, 9))])
    found = write(shards, annotated, tmp_path / "boxes")
    labels = [row["label"] for row in found.rows("train") if row["number"] == 4]
    assert labels == [shards.wnids.index(other), label, -1]
    assert found.split("train").boxes[4].tolist() == [2, 2, 10, 10]
    assert found.manifest["anomalies"]["train"]["other_class"]["count"] == 2
    assert found.manifest["splits"]["train"] == {
        "boxes": "train.boxes.npy", "num_images": 30, "num_boxes": 32, "num_own_boxes": 30, "num_with_box": 30,
    }  # fmt: skip


def test_annotations_of_images_of_another_size(annotated: Path, shards: ShardSet, tmp_path: Path) -> None:
    width, height = size_of(shards, "train", 4)
    wnid = shards.wnids[int(shards.split("train").rows["label"][4])]
    key = rewrite(annotated, shards, [(wnid, (10, 0, 19, 4)), (wnid, (0, 0, 0, 0))], size=(width * 2, height * 3))
    text = message(lambda: write(shards, annotated, tmp_path / "boxes"))
    assert f"{key}: its annotation says {width * 2} x {height * 3}, the image is {width} x {height}" in text
    assert "on_box_mismatch: scale" in text
    scaled = write(shards, annotated, tmp_path / "boxes", on_box_mismatch="scale")
    assert scaled.split("train").boxes[4:6].tolist() == [[5, 0, 10, 2], [0, 0, 1, 1]]  # 5 / 3 rounded; never empty
    dropped = write(shards, annotated, tmp_path / "boxes", on_box_mismatch="drop")
    assert np.flatnonzero(~dropped.split("train").has_box).tolist() == [4]
    for found in (scaled, dropped):
        assert found.manifest["anomalies"]["train"]["other_size"] == {"count": 1, "first": [key]}


def test_an_image_without_a_box(annotated: Path, shards: ShardSet, tmp_path: Path) -> None:
    """Legal in train; in val every one is named, with the reason."""
    place(annotated, shards, "train", 7).unlink()
    others = [shards.split("train").key(i).split("_") for i in (8, 9)]
    strangers = ["cat/9999", *(f"{'dog' if wnid != 'dog' else 'cat'}/{stem}" for wnid, stem in others)]
    strangers.append(f"{'dog' if others[0][0] != 'dog' else 'cat'}/{'_'.join(others[0])}")  # in another class's folder
    for name in strangers:
        put(annotated / "annotations/train" / f"{name}.xml", voc_xml("%s", 1, 1, []))
    found = write(shards, annotated, tmp_path / "boxes")
    assert np.flatnonzero(~found.split("train").has_box).tolist() == [7]
    assert found.manifest["anomalies"]["train"] == {
        "without_annotation": {"count": 1, "first": [shards.split("train").key(7)]},
        "without_image": {"count": 4, "first": sorted(strangers)},
    }
    label = int(shards.split("val").rows["label"][4])
    key = rewrite(annotated, shards, [(shards.wnids[(label + 1) % 3], (1, 1, 9, 9))], "val")
    place(annotated, shards, "val", 2).unlink()
    put(place(annotated, shards, "val", 6), voc_xml("%s", *size_of(shards, "val", 6), []))
    text = message(lambda: write(shards, annotated, tmp_path / "boxes"))
    assert "3 validation images without a box of its class" in text
    assert f"{key}: only boxes of other classes" in text
    assert f"{shards.split('val').key(2)}: no annotation" in text
    assert f"{shards.split('val').key(6)}: its annotation has no box" in text
    with pytest.raises(Refused, match="not finished"):
        BoxSet.open(tmp_path / "boxes", shards)


def test_broken_annotations_are_all_named(annotated: Path, shards: ShardSet, tmp_path: Path) -> None:
    for number in range(8):
        place(annotated, shards, "train", number).write_bytes(b"<!DOCTYPE a><a/>")
    with pytest.raises(boxset.BadData, match=r"8 annotations that cannot be read:\n(.*\n){5}.*and 3 more") as caught:
        write(shards, annotated, tmp_path / "boxes")
    assert len(caught.value.everything) == 8


def test_keys_that_do_not_show_the_name(tmp_path: Path) -> None:
    """Names with spaces, folders in class folders, twins with other endings, annotations without class folders."""
    images = tmp_path / "images"
    names = ["cat/a b.jpg", "cat/deep/c.jpg", "cat/twin.jpg", "cat/twin.png", "dog/ILSVRC_1.jpg", "dog/same.jpg"]
    for split in ("train", "val"):
        for i, name in enumerate([*names, "cat/same.jpg"]):
            draw(images / split / name, i, (40, 40))
    shards = packed(Folder(images), tmp_path / "shards", "folder")
    folder = images / "annotations"

    def annotate(split: str, name: str, wnid: str, left: int) -> None:
        put(folder / split / f"{name}.xml", voc_xml("%s", 40, 40, [(wnid, (left, 0, 39, 39))]))

    for split in ("train", "val"):
        for left, name in enumerate(["cat/a b", "cat/deep/c", "cat/same", "dog/same"]):
            annotate(split, name, name[:3], left)
        annotate(split, "ILSVRC_1", "dog", 9)
    text = message(lambda: write(shards, images, tmp_path / "boxes"))
    assert "2 validation images without" in text  # the twins
    for name in ("twin.jpg", "twin.png"):
        (images / "val/cat" / name).unlink()
    shards = packed(Folder(images), tmp_path / "shards", "folder")
    found = write(shards, images, tmp_path / "boxes")
    keys = [shards.split("train").key(row["number"]) for row in found.rows("train")]
    lefts = dict(zip([key.rsplit("-", 1)[0] if "-" in key else key for key in keys],
                     found.rows("train")["xmin"].tolist(), strict=True))  # fmt: skip
    assert lefts == {"cat_a-b": 0, "cat_deep-c": 1, "cat_same": 2, "dog_same": 3, "dog_ILSVRC_1": 9}
    annotate("train", "cat/twin", "cat", 0)
    assert "cat/twin: of cat_twin-" in message(lambda: write(shards, images, tmp_path / "boxes"))
    (folder / "train/cat/twin.xml").unlink()
    annotate("train", "same", "cat", 0)
    assert "Put them into folders named by class" in message(lambda: write(shards, images, tmp_path / "boxes"))
    (folder / "train/same.xml").unlink()
    annotate("train", "dog/ILSVRC_1", "dog", 0)
    assert "dog_ILSVRC_1 has another annotation" in message(lambda: write(shards, images, tmp_path / "boxes"))
    shutil.move(folder / "val", tmp_path)
    for file in (tmp_path / "val").rglob("*.xml"):  # beside the images
        put(images / "val" / file.relative_to(tmp_path / "val"), file.read_bytes())
    (folder / "train/dog/ILSVRC_1.xml").unlink()
    assert write(shards, images, tmp_path / "boxes").manifest["sources"]["val"]["name"] == "val"


@pytest.fixture
def ilsvrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ShardSet, dict[str, dict[str, Objects]]]:
    """Small archives of ILSVRC-2012 in <tmp>/images, boxes included, their shards, and the objects by split and key."""
    images = tmp_path / "images"
    edition = write_2012(images)
    shards = packed(Archives(images, edition), tmp_path / "shards", "ilsvrc2012")
    objects: dict[str, dict[str, Objects]] = {}
    archives = []
    for split, archive in zip(("train", "val"), edition.boxes, strict=True):
        rows, objects[split], members = shards.split(split), {}, {}
        for number in random.Random(1).sample(range(len(rows)), len(rows) - 3 * (split == "train")):
            key, wnid = rows.key(number), shards.wnids[rows.rows["label"][number]]
            boxes: Objects = [(wnid, (number, 1, number + 9, 20)), ("n09999999", (2, 2, 5, 5))][: 1 + number % 2]
            objects[split][key] = boxes
            folder = f"Annotation/{wnid}" if split == "train" else "val"
            members[f"{folder}/{key}.xml"] = voc_xml("%s", *size_of(shards, split, number), boxes)
        put(images / archive.name, gzip.compress(tar(members)))
        archives.append(Archive(archive.name, hashlib.md5((images / archive.name).read_bytes()).hexdigest()))
    monkeypatch.setitem(EDITIONS, "ilsvrc2012", replace(edition, boxes=tuple(archives)))
    return shards, objects


def found_objects(found: BoxSet, shards: ShardSet, split: str) -> dict[str, list[tuple[int, ...]]]:
    by_key: dict[str, list[tuple[int, ...]]] = {}
    for row in found.rows(split):
        by_key.setdefault(shards.split(split).key(row["number"]), []).append(row.tolist()[1:])
    return by_key


def test_the_published_archives(ilsvrc: Any, tmp_path: Path) -> None:
    shards, objects = ilsvrc
    before = sorted((tmp_path / "images").iterdir())
    found = write(shards, tmp_path / "images", tmp_path / "boxes", "ilsvrc2012")
    label = {wnid: i for i, wnid in enumerate(shards.wnids)}
    for split in ("train", "val"):
        expected = {key: [(label.get(w, -1), *box) for w, box in boxes] for key, boxes in objects[split].items()}
        assert found_objects(found, shards, split) == expected
    assert found.split("train").has_box.sum() == 17
    assert found.split("val").has_box.all()
    origin = found.manifest["sources"]["val"]
    file = tmp_path / "images" / origin["name"]
    assert origin["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert sorted((tmp_path / "images").iterdir()) == before
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()), 1))  # the same content in another file
    assert "published" in message(lambda: write(shards, tmp_path / "images", tmp_path / "boxes", "ilsvrc2012"))
    write(shards, tmp_path / "images", tmp_path / "boxes", "ilsvrc2012", check_md5=False)
    file.unlink()
    assert f"{file}: missing" in message(lambda: write(shards, tmp_path / "images", tmp_path / "b2", "ilsvrc2012"))


def test_kaggle_gives_the_boxes_of_the_archives(ilsvrc: Any, tmp_path: Path) -> None:
    """As XMLs, and as tables alone: the same bytes."""
    shards, objects = ilsvrc
    for split in ("train", "val"):
        lines = ["ImageId,PredictionString"]
        for key, boxes in objects[split].items():
            folder = f"{split}/{key.split('_')[0]}" if split == "train" else split
            number = next(i for i in range(len(shards.split(split))) if shards.split(split).key(i) == key)
            xml = voc_xml("%s", *size_of(shards, split, number), boxes)
            put(tmp_path / "xml/ILSVRC/Annotations/CLS-LOC" / folder / f"{key}.xml", xml)
            lines.append(f"{key}," + "".join(f"{w} {' '.join(map(str, box))} " for w, box in boxes))
        put(tmp_path / "csv" / f"LOC_{split}_solution.csv", "\n".join([*lines, ""]).encode())
    assert "Unpack" in message(lambda: write(shards, tmp_path, tmp_path / "b", "kaggle"))
    of_archives = write(shards, tmp_path / "images", tmp_path / "a", "ilsvrc2012").manifest
    for kind in ("xml", "csv"):
        other = write(shards, tmp_path / kind, tmp_path / f"of-{kind}", "kaggle").manifest
        for part in ("files", "splits", "anomalies"):
            assert other[part] == of_archives[part], kind


def test_the_same_bytes_after_any_interruption(
    annotated: Path, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was written before: nothing, or a finished artefact of other boxes."""
    expected = write(shards, annotated, tmp_path / "once").digest
    original: Callable[..., Any] = Directory.write
    for stop_after in range(3):
        for earlier in (False, True):
            directory = tmp_path / f"boxes-{stop_after}-{earlier}"
            if earlier:
                shutil.copytree(annotated, tmp_path / "other", dirs_exist_ok=True)
                rewrite(tmp_path / "other", shards, [])
                write(shards, tmp_path / "other", directory)
            writes = 0

            def killed(self: Directory, name: str, fill: Any, stop_after: int = stop_after) -> Any:
                nonlocal writes
                if writes == stop_after:
                    (self.directory / f"{name}.1-0123abcd.tmp").write_bytes(b"half")
                    raise KeyboardInterrupt
                writes += 1
                return original(self, name, fill)

            monkeypatch.setattr(Directory, "write", killed)
            with pytest.raises(KeyboardInterrupt):
                write(shards, annotated, directory)
            monkeypatch.undo()
            with pytest.raises(Refused, match="not finished"):
                BoxSet.open(directory, shards)
            assert write(shards, annotated, directory).digest == expected
            assert len(list(directory.iterdir())) == 3


def test_a_changed_byte_is_noticed(annotated: Path, shards: ShardSet, tmp_path: Path) -> None:
    directory = write(shards, annotated, tmp_path / "boxes").directory
    for path in sorted(directory.iterdir()):
        original = path.read_bytes()
        for change in (original[:-1], original[:-9] + bytes([original[-9] ^ 1]) + original[-8:], b""):
            path.write_bytes(change)
            with pytest.raises(Refused, match=path.name):
                BoxSet.open(directory, shards)
        path.unlink()
        with pytest.raises(Refused, match=path.name):
            BoxSet.open(directory, shards)
        path.write_bytes(original)
    BoxSet.open(directory, shards)


def test_boxes_of_other_shards_and_other_classes_are_refused(
    annotated: Path, drawn: Path, shards: ShardSet, tmp_path: Path
) -> None:
    write(shards, annotated, tmp_path / "boxes")
    params = ShardParams(**{**SHARD, "seed": 2})
    pack(params, Folder(drawn), Directory(tmp_path / "reordered"), "test", num_workers=1)
    with pytest.raises(Refused, match=r"of other shards .* Make the boxes again"):
        BoxSet.open(tmp_path / "boxes", ShardSet(tmp_path / "reordered"))
    shutil.copytree(drawn, tmp_path / "images")
    for split in ("train", "val"):
        (tmp_path / "images" / split / "emu").rename(tmp_path / "images" / split / "eel")
    other = packed(Folder(tmp_path / "images"), tmp_path / "renamed", "folder")
    with pytest.raises(Refused, match="of other classes"):
        BoxSet.open(tmp_path / "boxes", other)
    path = tmp_path / "boxes" / manifest.NAME
    body = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("sha256", "files", "schema")}
    manifest.write(tmp_path / "boxes", "vgg.boxes/2", body, json.loads(path.read_text())["files"])
    with pytest.raises(Refused, match=r"vgg.boxes/2, expected vgg.boxes/1"):
        BoxSet.open(tmp_path / "boxes", shards)


def test_wrong_uses_are_refused(annotated: Path, shards: ShardSet, tmp_path: Path) -> None:
    for kind in ("digits", "ilsvrc2010", "huggingface", "tiny-imagenet"):
        with pytest.raises(WrongParameters, match=rf"{kind}.*only digit-scenes, folder, ilsvrc2012, kaggle"):
            write(shards, annotated, tmp_path / "boxes", kind)
    with pytest.raises(WrongParameters, match=r"holds other files: _info.json, train"):
        write(shards, annotated, shards.directory)
    assert ShardSet(shards.directory).digest == shards.digest  # untouched


def test_boxes_of_scenes_are_their_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "NUM_SCENES", {"train": 60, "val": 20})
    source = DigitScenes()
    shards = packed(source, tmp_path / "shards", "digit-scenes")
    found = write(shards, tmp_path / "none", tmp_path / "boxes", "digit-scenes")
    numbers = {original.key: int(original.name.split("/")[1]) for original in source.originals("train")}
    boxes, others = found.split("train"), 0
    for row, key in enumerate(shards.split("train").key(i) for i in range(60)):
        main, *more = source.scene("train", numbers[key]).pasted
        masks = [digit.mask for digit in (main, *more) if digit.label == main.label]
        others += 1 + len(more) - len(masks)
        own = boxes.boxes[boxes.first[row] : boxes.first[row + 1]].astype(int).tolist()
        assert len(own) == len(masks)
        for (x1, y1, x2, y2), mask in zip(own, masks, strict=True):
            inside = np.zeros_like(mask)
            inside[y1:y2, x1:x2] = True
            assert not (mask & ~inside).any()
            assert all(edge.any() for edge in (mask[y1], mask[y2 - 1], mask[:, x1], mask[:, x2 - 1]))
    assert others > 0
    assert found.manifest["anomalies"]["train"].keys() == {"other_class"}
    assert found.manifest["anomalies"]["train"]["other_class"]["count"] == others
