"""Published ILSVRC archives: the right label and the right bytes for every image."""

import gzip
import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from archives import (
    COST_2010,
    COUNTS_2012,
    LABELS_2010,
    LABELS_2012,
    SYNSETS_2010,
    SYNSETS_2012,
    TRAIN_2012,
    TRAIN_TAR,
    Pictures,
    by_key,
    devkit,
    lines,
    message,
    meta_mat,
    opened,
    pictures_2010,
    pictures_2012,
    write_2010,
    write_2012,
)
from PIL import Image

from vgg.sharding.editions import Edition
from vgg.sharding.ilsvrc import Archives


def test_labels_are_ranks_of_wnids(tmp_path: Path) -> None:
    wnids = sorted(TRAIN_2012)
    source = opened(tmp_path, write_2012)
    assert [image_class.wnid for image_class in source.classes] == wnids
    assert source.classes[0].name == "tench, Tinca tinca"
    assert source.splits == ("train", "val")
    train, val = by_key(source, "train"), by_key(source, "val")
    assert {key: wnids[original.label] for key, original in train.items()} == {
        f"{wnid}_{number}": wnid for wnid, numbers in TRAIN_2012.items() for number in numbers
    }
    wnid_of = {row.id: row.wnid for row in SYNSETS_2012}
    assert {key: wnids[original.label] for key, original in val.items()} == {
        f"ILSVRC2012_val_{i:08d}": wnid_of[number] for i, number in enumerate(LABELS_2012, 1)
    }
    assert [original.label for original in train.values()] == sorted(original.label for original in train.values())


def test_other_ids_for_the_same_classes_give_the_same_labels(tmp_path: Path) -> None:
    """All class ids permuted, in the table, the hierarchy and the ground truth."""
    new = {1: 4, 2: 1, 3: 2, 4: 3, 5: 5, 6: 6, 7: 7}
    permuted = [replace(row, id=new[row.id], children=tuple(new[c] for c in row.children)) for row in SYNSETS_2012]
    first, second = tmp_path / "first", tmp_path / "second"
    source, edition = opened(first, write_2012), write_2012(second, None, permuted)
    meta = meta_mat("ILSVRC2012", permuted, COUNTS_2012)
    kit = devkit("elsewhere", "ILSVRC2012", meta, lines([new[number] for number in LABELS_2012]))
    (second / edition.devkit.name).write_bytes(kit)
    again = Archives(second, edition)
    assert again.classes == source.classes
    for split in source.splits:
        labels = [[(original.key, original.label) for original in one.originals(split)] for one in (source, again)]
        assert labels[0] == labels[1]


@pytest.mark.parametrize(("write", "pictures"), [(write_2012, pictures_2012), (write_2010, pictures_2010)])
def test_read_returns_the_bytes_of_the_member(
    write: Callable[..., Edition], pictures: Callable[[], Pictures], tmp_path: Path
) -> None:
    source = pickle.loads(pickle.dumps(opened(tmp_path, write)))  # as a worker has it
    listed, num_images = opened(tmp_path, write), 0
    expected = pictures()
    patches = {name.split("/")[1]: data for name, data in expected.get("patches", {}).items()}
    for split in listed.splits:
        for key, original in by_key(listed, split).items():
            data = patches.get(key, expected[split][key])
            wanted = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
            archive = tmp_path / original.name.split("/")[0]
            assert source.read(original) == wanted
            assert archive.read_bytes()[original.offset :][: original.size] == data
            assert original.stamp == f"{archive.stat().st_size}:{archive.stat().st_mtime_ns}"
            assert original.split == split
            Image.open(io.BytesIO(wanted)).load()
            num_images += 1
    assert num_images == sum(len(expected[split]) for split in listed.splits)


def test_unusual_images_are_not_changed(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012)
    found = {**by_key(source, "train"), **by_key(source, "val")}
    opened_as = {key: Image.open(io.BytesIO(source.read(original))) for key, original in found.items()}
    assert (opened_as["n01739381_1309"].mode, opened_as["ILSVRC2012_val_00000007"].mode) == ("CMYK", "CMYK")
    assert (opened_as["n02105855_2933"].format, opened_as["n02105855_2933"].mode) == ("PNG", "RGBA")
    assert opened_as["n01440764_3"].mode == "L"
    assert opened_as["n03018349_9"].getexif()[0x0112] == 6


def test_patches_replace_images_and_keep_their_labels(tmp_path: Path) -> None:
    source, pictures = opened(tmp_path, write_2010), pictures_2010()
    assert source.splits == ("train", "val", "test")
    for path, data in pictures["patches"].items():
        split, key = path.split("/")
        original = by_key(source, split)[key]
        assert source.read(original) == data != pictures[split][key]
        assert original.name == f"patch_images.tar/patch_images/{path}.JPEG"
    wnid_of = {row.id: row.wnid for row in SYNSETS_2010}
    for split, numbers in LABELS_2010.items():
        labels = [original.label for original in source.originals(split)]  # by number
        assert [source.classes[label].wnid for label in labels] == [wnid_of[number] for number in numbers]


def test_the_test_set_needs_its_labels_and_its_archive(tmp_path: Path) -> None:
    edition = write_2010(tmp_path)
    labels = tmp_path / "ILSVRC2010_test_ground_truth.txt"
    content = labels.read_bytes()
    labels.unlink()
    text = message(lambda: Archives(tmp_path, edition).classes)
    assert "has ILSVRC2010_images_test.tar but not ILSVRC2010_test_ground_truth.txt" in text
    (tmp_path / "ILSVRC2010_images_test.tar").unlink()
    source = Archives(tmp_path, edition)
    assert source.splits == ("train", "val")
    assert not [file for file in source.metadata()["archives"] if "test" in file["name"]]
    assert len(source.originals("train")) == 20  # patches of test images are then ignored
    labels.write_bytes(content)
    assert "but not ILSVRC2010_images_test.tar" in message(lambda: Archives(tmp_path, edition).classes)


def test_metadata_lists_every_archive_and_no_times(tmp_path: Path) -> None:
    edition = write_2012(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy)
    first, second = (Archives(tmp_path / name, edition).metadata() for name in "ab")
    assert first == second == json.loads(json.dumps(first))
    assert first["edition"] == "ILSVRC2012"
    size = (tmp_path / "a" / TRAIN_TAR).stat().st_size
    assert {"name": TRAIN_TAR, "size": size, "md5": edition.train.archive.md5} in first["archives"]
    (tmp_path / "a" / edition.boxes[0].name).write_bytes(b"boxes")
    assert edition.boxes[0].name in [file["name"] for file in Archives(tmp_path / "a", edition).metadata()["archives"]]


def test_tables_are_by_id_and_by_class_index(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "a", write_2010), opened(tmp_path / "b", write_2010)
    assert first.tables() == second.tables()
    synsets = json.loads(first.tables()["synsets.json"])
    assert [row["ilsvrc_id"] for row in synsets] == [1, 2, 3, 4, 5, 6]
    assert [row["label"] for row in synsets] == [3, 1, 0, 2, None, None]
    assert synsets[5] == {
        "ilsvrc_id": 6, "wnid": "n00001740", "words": "entity", "gloss": "what is meant by entity", "num_children": 3,
        "children": [5, 2, 3], "wordnet_height": 2, "num_train_images": 0, "label": None,
    }  # fmt: skip
    assert (synsets[0]["gloss"], synsets[0]["children"], synsets[0]["num_train_images"]) == ("", [], 5)
    cost = np.load(io.BytesIO(first.tables()["cost_matrix.npy"]))
    assert (cost.dtype, cost.shape) == (np.uint8, (4, 4))
    rank = {row["ilsvrc_id"]: row["label"] for row in synsets[:4]}
    for i in range(4):
        for j in range(4):
            assert cost[rank[i + 1], rank[j + 1]] == COST_2010[i, j]
    assert list(opened(tmp_path / "c", write_2012).tables()) == ["synsets.json"]
    assert json.loads(opened(tmp_path / "c", write_2012).tables()["synsets.json"])[4]["children"] == [1]  # a single one


def test_a_pickled_source_is_small_and_holds_no_descriptor(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012)
    val = source.originals("val")
    source.tables()
    source.read(val[0])
    data = pickle.dumps(source)
    assert len(data) < 2000
    assert b"what is meant by" not in data
    assert pickle.loads(data).read(val[0]) == source.read(val[0])


def test_nothing_is_written_beside_the_archives(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2010)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    for split in source.splits:
        for original in source.originals(split):
            source.read(original)
    source.tables()
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()) == before
