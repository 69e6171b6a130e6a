"""ILSVRC archives that are missing, damaged or of another edition: refused, with the file and the member."""

import gzip
import hashlib
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from archives import (
    TRAIN_2012,
    TRAIN_TAR,
    VAL_TAR,
    Pictures,
    by_key,
    message,
    numbered_tar,
    opened,
    picture,
    pictures_2010,
    pictures_2012,
    tar,
    tar_of_tars,
    write_2010,
    write_2012,
)

from vgg.data.images import BadImage
from vgg.sharding import ilsvrc
from vgg.sharding.editions import EDITIONS
from vgg.sharding.ilsvrc import Archives
from vgg.sharding.open import open_source


def without(key: str) -> Pictures:
    pictures = pictures_2012()
    for images in pictures.values():
        images.pop(key, None)
    return pictures


def renamed(old: str, new: str, split: str = "train") -> Pictures:
    pictures = pictures_2012()
    pictures[split] = {key.replace(old, new): data for key, data in pictures[split].items()}
    return pictures


@pytest.mark.parametrize("edition", ["ilsvrc2012", "ilsvrc2010"])
def test_all_missing_archives_are_named(edition: str, tmp_path: Path) -> None:
    text = message(lambda: open_source(edition, tmp_path / "nothing"))
    facts = EDITIONS[edition]
    for archive in (facts.devkit, facts.train.archive, facts.val.archive, facts.patches):
        assert archive is None or archive.name in text
    assert f"shard.source '{edition}'" in text


@pytest.mark.parametrize("path", ["train/n04596742_13", "val/ILSVRC2010_val_00000009", "test/n04596742_12"])
def test_a_patch_that_replaces_nothing_is_named(path: str, tmp_path: Path) -> None:
    pictures = pictures_2010()
    pictures["patches"][path] = picture(1)
    source, (split, key) = opened(tmp_path, write_2010, pictures), path.split("/")
    text = message(lambda: source.originals(split))
    assert "patch_images.tar" in text
    assert f"1 patches replace no image of {split}: {key}." in text


def test_a_patch_outside_the_splits_is_named_and_a_readme_ignored(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2010)
    files = {f"patch_images/{name}.JPEG": data for name, data in pictures_2010()["patches"].items()}
    (tmp_path / "patch_images.tar").write_bytes(tar({"patch_images/README": b"read me", **files}))
    assert len(source.originals("val")) == 8
    (tmp_path / "patch_images.tar").write_bytes(tar({**files, "other/n04596742_12.JPEG": b""}))
    assert "other/n04596742_12.JPEG" in message(lambda: source.originals("train"))


@pytest.mark.parametrize(
    ("split", "pictures", "expected"),
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
def test_wrong_counts_and_names_are_reported(split: str, pictures: Pictures, expected: str, tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012, pictures)
    text = message(lambda: source.originals(split))
    assert expected in text
    assert (TRAIN_TAR if split == "train" else VAL_TAR) in text
    assert "Download " in text


def test_five_wrong_classes_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012)
    more = {f"n9{i:07d}_1": b"" for i in range(14)}
    (tmp_path / TRAIN_TAR).write_bytes(tar_of_tars({**pictures_2012()["train"], **more}))
    text = message(lambda: source.originals("train"))
    assert "the images of 14 classes" in text
    assert "n90000004: found 1, expected 0\nand 9 more" in text
    assert "n90000005" not in text


def test_an_unexpected_member_is_named(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012)
    whole = {f"{wnid}.tar": tar({f"{wnid}_1.JPEG": b""}) for wnid in TRAIN_2012}
    for members, expected in (
        ({**whole, "readme.txt": b"hello"}, f"{TRAIN_TAR}: holds 'readme.txt'"),
        ({**whole, "more/n01440764.tar": b""}, f"{TRAIN_TAR}: holds 'more/n01440764.tar'"),
        (
            {**whole, "n01440764.tar": tar({"n01739381_1.JPEG": b""})},
            f"{TRAIN_TAR}/n01440764.tar: holds 'n01739381_1.JPEG'",
        ),
        ({**whole, "n01440764.tar": b"\0" * 512}, f"{TRAIN_TAR}/n01440764.tar: byte "),
    ):
        (tmp_path / TRAIN_TAR).write_bytes(tar(members))
        assert expected in message(lambda: source.originals("train"))


def test_the_same_name_in_two_folders_is_refused(tmp_path: Path) -> None:
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


def test_a_train_archive_truncated_between_two_classes_is_refused(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012)
    whole = (tmp_path / TRAIN_TAR).read_bytes()
    (tmp_path / TRAIN_TAR).write_bytes(whole[: whole.index(b"n02105855.tar")])
    assert "truncated" in message(lambda: source.originals("train"))


def test_all_wrong_md5s_are_reported_with_both_sums(tmp_path: Path) -> None:
    edition, calls, here = write_2012(tmp_path), [], threading.get_ident()
    source = Archives(tmp_path, edition)
    total = sum((tmp_path / file["name"]).stat().st_size for file in source.metadata()["archives"])

    def report(done: int, total_bytes: int) -> None:
        assert threading.get_ident() == here
        calls.append((done, total_bytes))

    source.verify(report)
    assert calls[-1] == (total, total)
    box = replace(edition.boxes[0], md5="0" * 32)
    (tmp_path / box.name).write_bytes(b"boxes")
    with open(tmp_path / VAL_TAR, "r+b") as file:
        file.seek(700)
        file.write(b"!")
    text = message(Archives(tmp_path, replace(edition, boxes=(box,))).verify)
    for archive in (box, edition.val.archive):
        found = hashlib.md5((tmp_path / archive.name).read_bytes()).hexdigest()
        assert f"{archive.name}: md5 {found}, published {archive.md5}" in text
    assert TRAIN_TAR not in text
    assert "download them again" in text


def test_without_published_md5s_nothing_is_verified(tmp_path: Path) -> None:
    opened(tmp_path, write_2010).verify(lambda done, total: pytest.fail("nothing to report"))


def test_an_interrupt_stops_the_verification(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012)
    os.truncate(tmp_path / VAL_TAR, 2**36)  # 64 GiB of zeros: minutes of md5

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        source.verify(interrupt)
    assert time.monotonic() - start < 20


def test_an_archive_that_changes_after_the_scan_is_named(tmp_path: Path) -> None:
    source = opened(tmp_path, write_2012)
    original = source.originals("val")[0]
    os.utime(tmp_path / VAL_TAR, ns=(1, 1))
    assert f"{VAL_TAR}: has changed" in message(lambda: source.read(original))
    (tmp_path / VAL_TAR).write_bytes(numbered_tar(without("ILSVRC2012_val_00000002")["val"]))
    assert f"{VAL_TAR}: has changed" in message(lambda: source.read(original))


def test_unreadable_images_are_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = pictures_2010()
    packed = gzip.compress(picture(401), mtime=0)
    damaged = {
        "ILSVRC2010_val_00000001": packed[:-9],
        "ILSVRC2010_val_00000002": packed + b"more",
        "ILSVRC2010_val_00000004": packed[:40] + bytes([packed[40] ^ 255]) + packed[41:],
        "ILSVRC2010_val_00000005": gzip.compress(bytes(10_000)),
        "ILSVRC2010_val_00000006": bytes(5_000),
    }
    pictures["val"].update(damaged)
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
    for key, reason in zip(damaged, reasons, strict=True):
        with pytest.raises(BadImage, match=reason):
            source.read(found[key])
    os.truncate(tmp_path / "ILSVRC2010_images_val.tar", 1000)  # while it is open
    with pytest.raises(BadImage, match="cut short: 0 of"):
        source.read(found["ILSVRC2010_val_00000007"])
    (tmp_path / "patch_images.tar").unlink()
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        source.read(found["ILSVRC2010_val_00000003"])
