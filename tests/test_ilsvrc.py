"""ILSVRC archives as they come: the right label for every image, the right bytes, and a refusal of everything else."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from archives import (
    COST_2010,
    LABELS_2010,
    LABELS_2012,
    SYNSETS_2010,
    SYNSETS_2012,
    TRAIN_2012,
    Pictures,
    Row,
    devkit,
    lines,
    meta_mat,
    numbered_tar,
    picture,
    pictures_2010,
    pictures_2012,
    tar,
    tar_of_tars,
    write_2010,
    write_2012,
)
from PIL import Image

from vgg import ilsvrc
from vgg.editions import EDITIONS, Edition
from vgg.errors import BadData
from vgg.ilsvrc import Archives
from vgg.images import BadImage
from vgg.sources import Original, open_source

COUNTS_2012 = {wnid: len(numbers) for wnid, numbers in TRAIN_2012.items()}
TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def opened(root: Path, write: Callable[..., Edition], *changes: object) -> Archives:
    return Archives(root, write(root, *changes))


def by_key(source: Archives, split: str) -> dict[str, Original]:
    found = source.originals(split)
    assert len({original.key for original in found}) == len(found)
    return {original.key: original for original in found}


def message(act: Callable[[], object]) -> str:
    with pytest.raises(BadData) as caught:
        act()
    return str(caught.value)


def test_the_editions_are_the_published_ones() -> None:
    """Figures of the devkits' readmes and of the papers; md5s as torchvision has them."""
    new, old = EDITIONS["ilsvrc2012"], EDITIONS["ilsvrc2010"]
    assert (new.num_classes, new.train.num_images, new.val.num_images, new.test) == (1000, 1_281_167, 50_000, None)
    assert (new.train.per_class, new.val.per_class) == ((732, 1300), (50, 50))
    assert new.devkit.md5 == "fa75699e90414af021442c21a62c3abf"
    assert new.train.archive.md5 == "1d675b47d978889d74fa0da5fadfb00e"
    assert new.val.archive.md5 == "29b22e2961454d5413ddabcf34fc5622"
    assert [archive.md5 for archive in new.boxes] == [
        "9271167e2176350e65cfe4e546f14b17",
        "f4cd18b5ea29fe6bbea62ec9c20d80f0",
    ]
    assert old.test
    assert old.patches
    assert (old.train.num_images, old.val.num_images, old.test.num_images) == (1_261_406, 50_000, 150_000)
    assert (old.train.per_class, old.val.per_class, old.test.per_class) == ((668, 3047), (50, 50), (150, 150))
    archives = (old.devkit, old.train.archive, old.val.archive, old.test.archive, old.patches)
    assert [archive.md5 for archive in archives] == [None] * 5


@pytest.mark.parametrize("edition", ["ilsvrc2012", "ilsvrc2010"])
def test_missing_archives_are_all_named(edition: str, tmp_path: Path) -> None:
    said = message(lambda: open_source(edition, tmp_path / "nothing"))
    facts = EDITIONS[edition]
    for archive in (facts.devkit, facts.train.archive, facts.val.archive, facts.patches):
        assert archive is None or archive.name in said
    assert f"shard.source '{edition}'" in said


def test_labels_are_ranks_of_wnids_whatever_the_ids(tmp_path: Path) -> None:
    wnids = sorted(TRAIN_2012)
    source = opened(tmp_path, write_2012)
    assert [image_class.wnid for image_class in source.classes] == wnids
    assert source.classes[0].name == "tench, Tinca tinca"
    assert source.splits == ("train", "val")
    assert source.published
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
    """All ids of classes turned round, in the table, the hierarchy and the ground truth."""
    new = {1: 4, 2: 1, 3: 2, 4: 3, 5: 5, 6: 6, 7: 7}
    turned = [replace(row, id=new[row.id], children=tuple(new[c] for c in row.children)) for row in SYNSETS_2012]
    first, second = tmp_path / "first", tmp_path / "second"
    source, edition = opened(first, write_2012), write_2012(second, None, turned)
    meta = meta_mat("ILSVRC2012", turned, COUNTS_2012)
    kit = devkit("elsewhere", "ILSVRC2012", meta, lines([new[number] for number in LABELS_2012]))
    (second / edition.devkit.name).write_bytes(kit)
    again = Archives(second, edition)
    assert again.classes == source.classes
    for split in source.splits:
        labels = [[(original.key, original.label) for original in one.originals(split)] for one in (source, again)]
        assert labels[0] == labels[1]


@pytest.mark.parametrize(("write", "pictures"), [(write_2012, pictures_2012), (write_2010, pictures_2010)])
def test_read_gives_the_bytes_that_were_put_in(
    write: Callable[..., Edition], pictures: Callable[[], Pictures], tmp_path: Path
) -> None:
    source = pickle.loads(pickle.dumps(opened(tmp_path, write)))  # as a worker has it
    told, num_images = opened(tmp_path, write), 0
    expected = pictures()
    patches = {name.split("/")[1]: data for name, data in expected.get("patches", {}).items()}
    for split in told.splits:
        for key, original in by_key(told, split).items():
            data = patches.get(key, expected[split][key])
            wanted = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
            archive = tmp_path / original.name.split("/")[0]
            assert source.read(original) == wanted
            assert archive.read_bytes()[original.offset :][: original.size] == data
            assert original.stamp == f"{archive.stat().st_size}:{archive.stat().st_mtime_ns}"
            assert original.split == split
            Image.open(io.BytesIO(wanted)).load()
            num_images += 1
    assert num_images == sum(len(expected[split]) for split in told.splits)


def test_odd_images_come_as_they_are(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012)
    found = {**by_key(source, "train"), **by_key(source, "val")}
    opened_as = {key: Image.open(io.BytesIO(source.read(original))) for key, original in found.items()}
    assert (opened_as["n01739381_1309"].mode, opened_as["ILSVRC2012_val_00000007"].mode) == ("CMYK", "CMYK")
    assert (opened_as["n02105855_2933"].format, opened_as["n02105855_2933"].mode) == ("PNG", "RGBA")
    assert opened_as["n01440764_3"].mode == "L"
    assert opened_as["n03018349_9"].getexif()[0x0112] == 6


def test_patches_replace_blank_images_under_their_label(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("path", ["train/n04596742_13", "val/ILSVRC2010_val_00000009", "test/n04596742_12"])
def test_a_patch_that_replaces_nothing_is_named(path: str, tmp_path: Path) -> None:
    pictures = pictures_2010()
    pictures["patches"][path] = picture(1)
    source, (split, key) = opened(tmp_path, write_2010, pictures), path.split("/")
    said = message(lambda: source.originals(split))
    assert "patch_images.tar" in said
    assert f"1 patches replace no image of {split}: {key}." in said


def test_a_patch_outside_the_splits_is_named_and_a_readme_passed_over(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2010)
    files = {f"patch_images/{name}.JPEG": data for name, data in pictures_2010()["patches"].items()}
    (tmp_path / "patch_images.tar").write_bytes(tar({"patch_images/README": b"read me", **files}))
    assert len(source.originals("val")) == 8
    (tmp_path / "patch_images.tar").write_bytes(tar({**files, "other/n04596742_12.JPEG": b""}))
    assert "other/n04596742_12.JPEG" in message(lambda: source.originals("train"))


def test_the_test_set_needs_its_labels_and_its_archive(tmp_path: Path) -> None:
    edition = write_2010(tmp_path)
    labels = tmp_path / "ILSVRC2010_test_ground_truth.txt"
    kept = labels.read_bytes()
    labels.unlink()
    said = message(lambda: Archives(tmp_path, edition).classes)
    assert "has ILSVRC2010_images_test.tar but lacks ILSVRC2010_test_ground_truth.txt" in said
    (tmp_path / "ILSVRC2010_images_test.tar").unlink()
    source = Archives(tmp_path, edition)
    assert source.splits == ("train", "val")
    assert not [file for file in source.about()["archives"] if "test" in file["name"]]
    assert len(source.originals("train")) == 20  # patches of test images are then of no use, and no fault
    labels.write_bytes(kept)
    assert "but lacks ILSVRC2010_images_test.tar" in message(lambda: Archives(tmp_path, edition).classes)


def without(key: str) -> Pictures:
    pictures = pictures_2012()
    for images in pictures.values():
        images.pop(key, None)
    return pictures


def renamed(old: str, new: str, split: str = "train") -> Pictures:
    pictures = pictures_2012()
    pictures[split] = {key.replace(old, new): data for key, data in pictures[split].items()}
    return pictures


@pytest.mark.parametrize(
    ("split", "pictures", "said"),
    [
        ("train", without("n02105855_7"), "n02105855: found 5, expected 6"),
        ("train", renamed("n02105855", "n02105856"), "n02105855: found 0, expected 6\nn02105856: found 6, expected 0"),
        ("train", renamed("n01739381_30", "n01440764_30"), "n01440764: found 6, expected 5\nn01739381: found 3, exp"),
        ("val", without("ILSVRC2012_val_00000002"), "n03018349: found 1, expected 2\nmissing: ILSVRC2012_val_00000002"),
        ("val", renamed("val_00000002", "val_00000009", "val"), "holds 'ILSVRC2012_val_00000009.JPEG'"),
        ("val", renamed("val_00000002", "val_00000000", "val"), "holds 'ILSVRC2012_val_00000000.JPEG'"),
        ("val", renamed("ILSVRC2012", "ILSVRC2010", "val"), "holds 'ILSVRC2010_val_"),
        ("train", renamed("n02105855_7", "n02105855_x"), "holds 'n02105855_x.JPEG'"),
    ],
)
def test_wrong_counts_and_names_are_told(split: str, pictures: Pictures, said: str, tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012, pictures)
    text = message(lambda: source.originals(split))
    assert said in text
    assert (TRAIN if split == "train" else VAL) in text
    assert "Get " in text


def test_ten_wrong_classes_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012)
    more = {f"n9{i:07d}_1": b"" for i in range(14)}
    (tmp_path / TRAIN).write_bytes(tar_of_tars({**pictures_2012()["train"], **more}))
    text = message(lambda: source.originals("train"))
    assert "the images of 14 classes" in text
    assert "n90000009: found 1, expected 0\nand 4 more" in text
    assert "n90000010" not in text


def test_a_stranger_in_a_class_tar_or_beside_them_is_named(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012)
    whole = {f"{wnid}.tar": tar({f"{wnid}_1.JPEG": b""}) for wnid in TRAIN_2012}
    for members, said in (
        ({**whole, "readme.txt": b"hello"}, f"{TRAIN}: holds 'readme.txt'"),
        ({**whole, "more/n01440764.tar": b""}, f"{TRAIN}: holds 'more/n01440764.tar'"),
        (
            {**whole, "n01440764.tar": tar({"n01739381_1.JPEG": b""})},
            f"{TRAIN}/n01440764.tar: holds 'n01739381_1.JPEG'",
        ),
        ({**whole, "n01440764.tar": b"\0" * 512}, f"{TRAIN}/n01440764.tar: byte "),
    ):
        (tmp_path / TRAIN).write_bytes(tar(members))
        assert said in message(lambda: source.originals("train"))


def test_the_same_name_in_two_folders_is_no_second_image(tmp_path: Path) -> None:
    source, pictures = opened(tmp_path, write_2010), pictures_2010()
    val = {f"{folder}/{key}.JPEG": data for key, data in pictures["val"].items() for folder in "ab"}
    (tmp_path / "ILSVRC2010_images_val.tar").write_bytes(tar(val))
    assert "holds 'b/ILSVRC2010_val_00000001.JPEG'" in message(lambda: source.originals("val"))
    inner = tar({"n01440764_1.JPEG": b"", "more/n01440764_1.JPEG": b""})
    (tmp_path / "ILSVRC2010_images_train.tar").write_bytes(tar({"n01440764.tar": inner}))
    assert "n01440764.tar: holds 'more/n01440764_1.JPEG'" in message(lambda: source.originals("train"))
    write_2010(tmp_path)
    patches = {f"{folder}/train/n04596742_12.JPEG": picture(1) for folder in "ab"}
    (tmp_path / "patch_images.tar").write_bytes(tar(patches))
    assert "holds 'b/train/n04596742_12.JPEG'" in message(lambda: source.originals("train"))


def test_a_train_archive_cut_between_two_classes_is_refused(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012)
    whole = (tmp_path / TRAIN).read_bytes()
    (tmp_path / TRAIN).write_bytes(whole[: whole.index(b"n02105855.tar")])
    assert "cut short" in message(lambda: source.originals("train"))


def rewritten(edition: str, meta: bytes, labels: bytes) -> bytes:
    return devkit("kit", edition, meta, labels)


def with_row(number: int, **changes: object) -> list[Row]:
    return [replace(row, **changes) if row.id == number else row for row in SYNSETS_2012]


GOOD_META = meta_mat("ILSVRC2012", SYNSETS_2012, COUNTS_2012)
GOOD_LABELS = lines(LABELS_2012)


@pytest.mark.parametrize(
    ("kit", "said"),
    [
        (rewritten("ILSVRC2012", meta_mat("ILSVRC2014", SYNSETS_2012, COUNTS_2012), GOOD_LABELS), "no ILSVRC2012_ID"),
        (rewritten("ILSVRC2010", GOOD_META, GOOD_LABELS), "lacks data/ILSVRC2012_validation_ground_truth.txt"),
        (rewritten("ILSVRC2012", b"MATLAB 7.3 MAT-file", GOOD_LABELS), "meta.mat cannot be read"),
        (rewritten("ILSVRC2012", meta_mat("ILSVRC2012", [], {}), GOOD_LABELS), "not the devkit of ILSVRC2012"),
        (rewritten("ILSVRC2012", meta_mat("ILSVRC2012", with_row(3, id=9), COUNTS_2012), GOOD_LABELS), "not 1 to 4"),
        (rewritten("ILSVRC2012", meta_mat("ILSVRC2012", with_row(5, id=4), COUNTS_2012), GOOD_LABELS), "not 1 to 4"),
        (
            rewritten("ILSVRC2012", meta_mat("ILSVRC2012", with_row(3, id=2.5), COUNTS_2012), GOOD_LABELS),
            "text and num",
        ),
        (
            rewritten("ILSVRC2012", meta_mat("ILSVRC2012", with_row(3, wnid="dog"), COUNTS_2012), GOOD_LABELS),
            "'dog' is",
        ),
        (
            rewritten("ILSVRC2012", meta_mat("ILSVRC2012", SYNSETS_2012[1:], COUNTS_2012), GOOD_LABELS),
            "it has 3 classes",
        ),
        (
            rewritten("ILSVRC2012", meta_mat("ILSVRC2012", SYNSETS_2012, {**COUNTS_2012, "n01440764": 6}), GOOD_LABELS),
            "it tells of 21 images for training",
        ),
        (rewritten("ILSVRC2012", GOOD_META, GOOD_LABELS + b"1\n"), "9 labels for 8 images"),
        (rewritten("ILSVRC2012", GOOD_META, lines([3, 1, 4, 2, 2, 4, 1, 5])), "line 8: '5' is no class"),
        (rewritten("ILSVRC2012", GOOD_META, lines([0, 1, 4, 2, 2, 4, 1, 3])), "line 1: '0' is no class"),
        (rewritten("ILSVRC2012", GOOD_META, b"3\n1\n4\n2\n2\n-4\n1\n3\n"), "line 6: '-4' is no class"),
        (rewritten("ILSVRC2012", GOOD_META, lines([3, 1, 4, 2, 2, 4, 1, 1])), "id 1: 3"),
        (rewritten("ILSVRC2012", GOOD_META, GOOD_LABELS)[:-20], "not a whole .tar.gz"),
        (b"<html>404</html>", "not a whole .tar.gz"),
        (gzip.compress(b"not a tar" * 200, mtime=0), "not a whole .tar.gz"),
        (gzip.compress(tar({f"{copy}/data/meta.mat": GOOD_META for copy in "ab"})), "stands in it twice"),
    ],
)
def test_a_devkit_of_another_year_or_a_damaged_one_is_refused(kit: bytes, said: str, tmp_path: Path) -> None:
    edition = write_2012(tmp_path)
    (tmp_path / edition.devkit.name).write_bytes(kit)
    text = message(lambda: Archives(tmp_path, edition).classes)
    assert said in text
    assert str(tmp_path / edition.devkit.name) in text


def test_a_devkit_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edition = write_2012(tmp_path)
    monkeypatch.setattr("vgg.devkit.MAX_DEVKIT_BYTES", 10_000)
    (tmp_path / edition.devkit.name).write_bytes(gzip.compress(bytes(20_000)))
    assert "more than 10,000 bytes" in message(lambda: Archives(tmp_path, edition).classes)


def test_wrong_md5s_are_all_named_with_both_sums(tmp_path: Path) -> None:
    edition, calls, here = write_2012(tmp_path), [], threading.get_ident()
    source = Archives(tmp_path, edition)
    total = sum((tmp_path / file["name"]).stat().st_size for file in source.about()["archives"])

    def report(done: int, in_all: int) -> None:
        assert threading.get_ident() == here
        calls.append((done, in_all))

    source.verify(report)
    assert calls[-1] == (total, total)
    box = replace(edition.boxes[0], md5="0" * 32)
    (tmp_path / box.name).write_bytes(b"boxes")
    with open(tmp_path / VAL, "r+b") as file:
        file.seek(700)
        file.write(b"!")
    text = message(Archives(tmp_path, replace(edition, boxes=(box,))).verify)
    for archive in (box, edition.val.archive):
        found = hashlib.md5((tmp_path / archive.name).read_bytes()).hexdigest()
        assert f"{archive.name}: md5 {found}, published {archive.md5}" in text
    assert TRAIN not in text
    assert "download them again" in text


def test_without_published_md5s_there_is_nothing_to_verify(tmp_path: Path) -> None:
    opened(tmp_path, write_2010).verify(lambda done, total: pytest.fail("nothing to report"))


def test_an_interrupt_ends_the_verification(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012)
    os.truncate(tmp_path / VAL, 2**36)  # 64 GiB of nothing: hours of md5

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        source.verify(interrupt)
    assert time.monotonic() - begun < 20


def test_about_names_every_archive_and_no_time(tmp_path: Path) -> None:
    edition = write_2012(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy)
    first, second = (Archives(tmp_path / name, edition).about() for name in "ab")
    assert first == second == json.loads(json.dumps(first))
    assert first["edition"] == "ILSVRC2012"
    size = (tmp_path / "a" / TRAIN).stat().st_size
    assert {"name": TRAIN, "size": size, "md5": edition.train.archive.md5} in first["archives"]
    (tmp_path / "a" / edition.boxes[0].name).write_bytes(b"boxes")
    assert edition.boxes[0].name in [file["name"] for file in Archives(tmp_path / "a", edition).about()["archives"]]


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


@pytest.mark.parametrize("cost", [None, COST_2010[:3], COST_2010 + 0.5, COST_2010.astype(int) - 1])
def test_a_wrong_cost_matrix_is_refused(cost: np.ndarray | None, tmp_path: Path) -> None:
    edition = write_2010(tmp_path)
    counts = {"n01440764": 5, "n02487347": 4, "n02872752": 6, "n04596742": 5}
    variables = {} if cost is None else {"cost_matrix": cost}
    meta = meta_mat("ILSVRC2010", SYNSETS_2010, counts, **variables)
    kit = devkit("devkit-1.0", "ILSVRC2010", meta, lines(LABELS_2010["val"]))
    (tmp_path / edition.devkit.name).write_bytes(kit)
    assert "cost_matrix" in message(lambda: Archives(tmp_path, edition).classes)


def test_pickled_it_is_small_and_holds_no_descriptor(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012)
    val = source.originals("val")
    source.tables()
    source.read(val[0])
    data = pickle.dumps(source)
    assert len(data) < 2000
    assert b"what is meant by" not in data
    assert pickle.loads(data).read(val[0]) == source.read(val[0])


def test_an_archive_that_changes_after_the_scan_is_named(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012)
    original = source.originals("val")[0]
    os.utime(tmp_path / VAL, ns=(1, 1))
    assert f"{VAL}: has changed" in message(lambda: source.read(original))
    (tmp_path / VAL).write_bytes(numbered_tar(without("ILSVRC2012_val_00000002")["val"]))
    assert f"{VAL}: has changed" in message(lambda: source.read(original))


def test_images_that_cannot_be_had_are_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = pictures_2010()
    packed = gzip.compress(picture(401), mtime=0)
    spoilt = {
        "ILSVRC2010_val_00000001": packed[:-9],
        "ILSVRC2010_val_00000002": packed + b"more",
        "ILSVRC2010_val_00000004": packed[:40] + bytes([packed[40] ^ 255]) + packed[41:],
        "ILSVRC2010_val_00000005": gzip.compress(bytes(10_000)),
        "ILSVRC2010_val_00000006": bytes(5_000),
    }
    pictures["val"].update(spoilt)
    source = opened(tmp_path, write_2010, pictures)
    found = by_key(source, "val")
    monkeypatch.setattr(ilsvrc, "MAX_IMAGE_BYTES", 4_000)
    reasons = (
        "cut short or more",
        "something behind",
        "damaged",
        "cut short or more than 4,000",
        "5,000 bytes are more",
    )
    for key, reason in zip(spoilt, reasons, strict=True):
        with pytest.raises(BadImage, match=reason):
            source.read(found[key])
    os.truncate(tmp_path / "ILSVRC2010_images_val.tar", 1000)  # while it is open
    with pytest.raises(BadImage, match="cut short: 0 of"):
        source.read(found["ILSVRC2010_val_00000007"])
    (tmp_path / "patch_images.tar").unlink()
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        source.read(found["ILSVRC2010_val_00000003"])


def test_nothing_is_written_beside_the_archives(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2010)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    for split in source.splits:
        for original in source.originals(split):
            source.read(original)
    source.tables()
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()) == before
