"""Kaggle's ILSVRC and Tiny ImageNet, as unpacked: the right shards, and everything wrong in one message."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from archives import (
    LABELS_2012,
    SYNSETS_2012,
    message,
    picture,
    pictures_2012,
    write_2012,
)
from conftest import SHARD

from runtime.shards.shardset import ShardSet
from runtime.targets import Directory
from vgg.params.shard import ShardParams
from vgg.sharding.ilsvrc import Archives
from vgg.sharding.labelled import Labelled
from vgg.sharding.layouts import LAYOUTS, kaggle_label
from vgg.sharding.open import open_source
from vgg.sharding.pack import pack
from vgg.sharding.sources import Source

WNIDS = {row.id: row.wnid for row in SYNSETS_2012 if not row.children}
COUNTS = {"num_classes": 4, "num_train": 20, "train_per_class": (4, 6), "num_val": 8, "val_per_class": (2, 2)}
KAGGLE = replace(LAYOUTS["kaggle"], **COUNTS)
TINY = replace(LAYOUTS["tiny-imagenet"], **COUNTS)
VAL = "ILSVRC2012_val_0000000"


def put(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def write_kaggle(root: Path) -> Source:
    """The pictures of archives.write_2012 as Kaggle's archive unpacks them, with its other files."""
    pictures = pictures_2012()
    for key, data in pictures["train"].items():
        put(root / KAGGLE.train / key.split("_")[0] / f"{key}.JPEG", data)
    for key, data in pictures["val"].items():
        put(root / KAGGLE.val / f"{key}.JPEG", data)
    put(root / "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG", picture(1))
    put(root / "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml", "<annotation/>")
    put(root / "LOC_train_solution.csv", "ImageId,PredictionString\n")
    put(root / "LOC_sample_submission.csv", "ImageId,PredictionString\n")
    put(root / KAGGLE.classes, "".join(f"{row.wnid} {row.words}\n" for row in SYNSETS_2012 if not row.children))
    rows = [f"ILSVRC2012_val_{i:08d},{WNIDS[n]} 85 1 499 272 " for i, n in enumerate(LABELS_2012, 1)]
    rows[2] += f"{WNIDS[LABELS_2012[2]]} 3 4 50 60 "  # two boxes
    put(root / KAGGLE.labels, "\n".join([KAGGLE.header or "", *reversed(rows)]) + "\n")
    return Labelled(root, KAGGLE)


def write_tiny(root: Path) -> Source:
    pictures = pictures_2012()
    for key, data in pictures["train"].items():
        wnid = key.split("_")[0]
        put(root / "train" / wnid / "images" / f"{key}.JPEG", data)
        put(root / "train" / wnid / f"{wnid}_boxes.txt", f"{key}.JPEG\t0\t10\t63\t58\n")
    rows = []
    for number, data in enumerate(pictures["val"].values()):
        put(root / "val/images" / f"val_{number}.JPEG", data)
        rows.append(f"val_{number}.JPEG\t{WNIDS[LABELS_2012[number]]}\t0\t32\t44\t62\n")
    put(root / "val/val_annotations.txt", "".join(rows))
    put(root / "test/images/test_0.JPEG", picture(1))
    put(root / "wnids.txt", "".join(f"{WNIDS[number]}\n" for number in (3, 1, 2, 4)))
    put(root / "words.txt", "".join(f"{row.wnid}\t{row.words}\n" for row in SYNSETS_2012))  # inner nodes too
    return Labelled(root, TINY)


WRITE = {"kaggle": write_kaggle, "tiny-imagenet": write_tiny}


def shards_of(source: Source, directory: Path, kind: str = "folder") -> ShardSet:
    pack(ShardParams(**{**SHARD, "source": kind}), source, Directory(directory), "c", num_workers=1)
    return ShardSet(directory)


def test_kaggle_gives_the_same_shards_as_the_archives(tmp_path: Path) -> None:
    """The same bytes of every tar and index, and the same classes."""
    archives = Archives(tmp_path / "archives", write_2012(tmp_path / "archives"))
    first = shards_of(archives, tmp_path / "a", "ilsvrc2012")
    second = shards_of(write_kaggle(tmp_path / "kaggle"), tmp_path / "b", "kaggle")
    assert first.manifest["classes"] == second.manifest["classes"]
    assert first.manifest["images_sha256"] == second.manifest["images_sha256"]
    files = {set_.directory: {e["path"]: e["sha256"] for e in set_.manifest["files"]} for set_ in (first, second)}
    assert set(files[first.directory]) - set(files[second.directory]) == {"synsets.json"}  # glosses and hierarchy
    assert {n: d for n, d in files[first.directory].items() if n != "synsets.json"} == files[second.directory]
    assert second.manifest["source"]["layout"].startswith("Kaggle's ILSVRC")


@pytest.mark.parametrize("kind", WRITE)
def test_labels_and_bytes_are_those_of_the_files(kind: str, tmp_path: Path) -> None:
    source = WRITE[kind](tmp_path)
    assert [(c.wnid, c.name) for c in source.classes] == sorted(
        (r.wnid, r.words) for r in SYNSETS_2012 if not r.children
    )
    wnids, pictures = [c.wnid for c in source.classes], pictures_2012()
    train, val = source.originals("train"), source.originals("val")
    assert {o.key: wnids[o.label] for o in train} == {key: key.split("_")[0] for key in pictures["train"]}
    assert [wnids[o.label] for o in val] == [WNIDS[number] for number in LABELS_2012]
    worker = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 300
    assert [worker.read(o) for o in train] == [pictures["train"][o.key] for o in train]
    assert [worker.read(o) for o in val] == list(pictures["val"].values())


def test_tiny_imagenet_is_packed_with_links_and_other_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Images may be links, as in DVC's and git-annex' caches; what does not end with .JPEG is passed over."""
    expected = shards_of(write_tiny(tmp_path / "a"), tmp_path / "first").digest
    source = write_tiny(tmp_path / "b")
    image = tmp_path / "b/val/images/val_3.JPEG"
    image.rename(tmp_path / "elsewhere")
    image.symlink_to(tmp_path / "elsewhere")
    for name in ("Thumbs.db", ".DS_Store", "._val_3.JPEG"):
        put(tmp_path / "b/val/images" / name, b"")
    with caplog.at_level("INFO"):
        assert shards_of(source, tmp_path / "second").digest == expected
    assert "3 files passed over, never images: 2 .*, 1 .db" in caplog.text


@pytest.mark.parametrize("kind", WRITE)
def test_all_missing_parts_are_named(kind: str, tmp_path: Path) -> None:
    text, layout = message(lambda: open_source(kind, tmp_path)), LAYOUTS[kind]
    for part in (layout.train, layout.val, layout.labels, layout.classes, layout.listed):
        assert part is None or part in text


def test_the_published_counts_are_required(tmp_path: Path) -> None:
    write_kaggle(tmp_path)
    text = message(lambda: open_source("kaggle", tmp_path).classes)
    assert "LOC_synset_mapping.txt: 4 classes, expected 1,000" in text
    assert "train: 20 images, expected 1,281,167" in text
    assert "train: 732 to 1300 images of a class expected: n01440764 has 5" in text
    assert "val: 8 images, expected 50,000" in text
    tiny = LAYOUTS["tiny-imagenet"]
    assert (tiny.num_classes, tiny.num_train, tiny.num_val) == (200, 100_000, 10_000)


@pytest.mark.parametrize(
    "line", ["", "x", "x,", "x,n01440764 1 2 3", "x,n01440764 1 2 3 4 n01739381 1 2 3 4", "x,y,z", "x,1 2 3 4 5 6"]
)
def test_rows_of_another_form_are_refused(line: str) -> None:
    with pytest.raises(ValueError):
        kaggle_label(line)


def lines_of(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def test_everything_wrong_with_kaggle_is_in_one_message(tmp_path: Path) -> None:
    write_kaggle(tmp_path)
    labels, train, val = tmp_path / KAGGLE.labels, tmp_path / KAGGLE.train, tmp_path / KAGGLE.val
    unknown = f"{VAL}4,n99999999 1 2 3 4"
    more = [f"{VAL}9,n01440764 1 2 3 4", f"{VAL}1,n02105855 1 2 3 4", "rubbish", unknown]
    lines_of(labels, lambda rows: [r for r in rows if f"{VAL}2," not in r and f"{VAL}4," not in r] + more)
    (train / "n01739381/n01739381_30.JPEG").rename(train / "n01739381/n01440764_99.JPEG")
    shutil.copytree(train / "n02105855", train / "n02105856")
    (val / f"{VAL}5.JPEG").unlink()
    (val / f"{VAL}6.JPEG").unlink()
    (val / f"{VAL}6.JPEG").symlink_to("nowhere")
    text = message(lambda: Labelled(tmp_path, KAGGLE).originals("train"))
    for part in (
        "LOC_val_solution.csv: 1 label that is no class: 'n99999999'",
        "LOC_val_solution.csv: 1 line of another form: line 10: 'rubbish'",
        f"LOC_val_solution.csv: 1 row again: line 9: '{VAL}1'",
        "train: 1 folder of a class that is not in LOC_synset_mapping.txt: 'n02105856'",
        "2 files with an unexpected name or type: ",
        "n01739381/n01440764_99.JPEG' (expected n01739381_\\d+.JPEG)",
        f"val/{VAL}6.JPEG' (no file that can be read)",
        "train: 4 to 6 images of a class expected: n01739381 has 3",
        "train: 19 images, expected 20",
        f"'{VAL}2'",
        f"'{VAL}9'",
    ):
        assert part in text, (part, text)


def test_everything_wrong_with_tiny_imagenet_is_in_one_message(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    lines_of(tmp_path / "val/val_annotations.txt", lambda rows: [*rows[1:], rows[1], "val_8.JPEG\tn01440764\t1\t2"])
    lines_of(tmp_path / "words.txt", lambda rows: [row for row in rows if not row.startswith("n01739381")])
    shutil.rmtree(tmp_path / "train/n02105855")
    os.mkfifo(tmp_path / "val/images/val_77.JPEG")
    text = message(lambda: Labelled(tmp_path, TINY).originals("val"))
    for part in (
        "wnids.txt: 1 WNID that words.txt does not name: 'n01739381'",
        "val/val_annotations.txt: 1 line of another form: line 9",
        "val/val_annotations.txt: 1 row again: line 8: 'val_1'",
        "train: 4 to 6 images of a class expected: n02105855 has 0",
        "val/images: 1 image without a row in val/val_annotations.txt: 'val_0'",
        "1 file with an unexpected name or type: 'val/images/val_77.JPEG' (no file that can be read)",
    ):
        assert part in text, (part, text)


@pytest.mark.parametrize("content", [b"\xff\xfe", b""])
def test_a_table_that_is_no_text_is_named(content: bytes, tmp_path: Path) -> None:
    source = write_kaggle(tmp_path)
    (tmp_path / KAGGLE.labels).write_bytes(content)
    assert "LOC_val_solution.csv: " in message(lambda: source.classes)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    source = write_kaggle(tmp_path)
    table, folder = tmp_path / KAGGLE.labels, tmp_path / KAGGLE.train / "n01739381"
    table.unlink()
    table.mkdir()
    shutil.rmtree(folder)
    folder.symlink_to(folder)  # a loop
    text = message(lambda: source.classes)
    assert "LOC_val_solution.csv: Is a directory" in text
    assert "train: 4 to 6 images of a class expected: n01739381 has 0" in text
