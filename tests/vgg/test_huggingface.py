"""Parquet files of Hugging Face: the right shards, original bytes, bounded memory; everything wrong in one message."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from archives import LABELS_2012, SYNSETS_2012, message, picture, pictures_2012, write_2012
from conftest import ROOT, SHARD, environment, flags, program
from pyarrow import parquet

from runtime.errors import BadData, StorageFailure
from runtime.shards.shardset import ShardSet
from runtime.targets import Directory
from vgg.params.shard import ShardParams
from vgg.sharding.huggingface import HuggingFace
from vgg.sharding.ilsvrc import Archives
from vgg.sharding.pack import pack
from vgg.sharding.parquet import read_images
from vgg.sharding.sources import Source

Rows = Sequence[tuple[bytes | None, str | None, int | None]]  # bytes, path, label
WORDS = {row.id: (row.wnid, row.words) for row in SYNSETS_2012 if not row.children}
CLASSES = sorted(WORDS.values())
NAMES = [words for _, words in CLASSES]
LABEL = {wnid: label for label, (wnid, _) in enumerate(CLASSES)}
TRAIN, VAL = "data/train-{:05d}-of-00003.parquet", "data/validation-00000-of-00001.parquet"


def write(path: Path, rows: Rows, names: list[str] | None = NAMES, **options: Any) -> None:
    """A file as `datasets` writes it, with the features in the metadata of the schema."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {} if names is None else {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata)
    images = [{"bytes": data, "path": name} for data, name, _ in rows]
    table = pa.table({"image": images, "label": [label for *_, label in rows]}, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, **{"row_group_size": 3, **options})


def published() -> tuple[Rows, Rows]:
    """The pictures of archives.write_2012, shuffled, with paths as in imagenet-1k: the published name and the WNID."""
    pictures = pictures_2012()
    train = [(data, f"{key}_{key[:9]}.JPEG", LABEL[key[:9]]) for key, data in sorted(pictures["train"].items())]
    wnids = [WORDS[number][0] for number in LABELS_2012]
    val = [(data, f"{key}_{wnid}.JPEG", LABEL[wnid]) for (key, data), wnid in zip(pictures["val"].items(), wnids)]  # noqa: B905
    return train[::2] + train[1::2], val[::-1]


def write_imagenet(root: Path) -> None:
    train, val = published()
    for number, part in enumerate((train[:9], train[9:10], train[10:])):
        write(root / TRAIN.format(number), part)
    write(root / VAL, val)
    write(root / "data/test-00000-of-00001.parquet", [(picture(1), "ILSVRC2012_test_00000001.JPEG", -1)])


def opened(root: Path) -> HuggingFace:
    return HuggingFace(root, lambda: root)


def shards_of(source: Source, directory: Path) -> ShardSet:
    pack(ShardParams(**SHARD), source, Directory(directory), "c", num_workers=2)
    return ShardSet(directory)


def test_imagenet_gives_the_same_shards_as_the_archives(tmp_path: Path) -> None:
    archives = shards_of(Archives(tmp_path / "a", write_2012(tmp_path / "a")), tmp_path / "first")
    write_imagenet(tmp_path / "h")
    found = shards_of(opened(tmp_path / "h"), tmp_path / "second")
    assert found.manifest["classes"] == archives.manifest["classes"]
    files = [{e["path"]: e["sha256"] for e in shards.manifest["files"]} for shards in (archives, found)]
    assert files[0].pop("synsets.json")
    assert files[0] == files[1]
    sources = found.manifest["source"]["files"]
    assert [(f["name"], f["num_rows"]) for f in sources][2:] == [(TRAIN.format(2), 10), (VAL, 8)]


def test_any_data_set_with_image_and_label_is_read(tmp_path: Path) -> None:
    """Paths that repeat or are missing: images are numbered.  Names of files: val-, or a folder of the split."""
    rows = [(picture(n), "image.png" if n % 2 else None, n % 3) for n in range(11)]
    write(tmp_path / "default/train/0000.parquet", rows[:7], ["ü", "cat, dog", "emu"], compression="zstd")
    write(tmp_path / "val-00000.parquet", rows[7:], ["ü", "cat, dog", "emu"], use_dictionary=False, row_group_size=100)
    source = opened(tmp_path)
    assert [(c.wnid, c.name) for c in source.classes] == [(name, name) for name in ("ü", "cat, dog", "emu")]
    train = source.originals("train")
    assert sorted((o.key, o.label) for o in train) == [(f"train_{n:08d}", n % 3) for n in range(7)]
    worker = pickle.loads(pickle.dumps(source))
    assert {o.key: worker.read(o) for o in train} == {f"train_{n:08d}": rows[n][0] for n in range(7)}
    assert [source.read(o) for o in source.originals("val")] == [data for data, *_ in rows[7:]]
    assert shards_of(source, tmp_path / "shards").wnids == ["ü", "cat, dog", "emu"]


def test_plain_unique_names_become_keys(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.parquet", [(picture(n), f"folder/cat_{n}.jpg", n) for n in range(2)], ["a", "b"])
    assert [o.key for o in opened(tmp_path).originals("train")] == ["cat_0", "cat_1"]


def test_class_names_come_from_a_file_where_the_schema_has_none_or_unusable_ones(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / f"{split}-0.parquet", [(picture(n), None, n) for n in range(2)], None)
    text = message(lambda: opened(tmp_path).classes)
    assert "no class names in its schema" in text
    assert f"Write them to {tmp_path}/classes.txt" in text
    for split in ("train", "val"):
        write(tmp_path / f"{split}-0.parquet", [(picture(n), None, n) for n in range(2)], ["=1+1", " cat\n"])
    text = message(lambda: shards_of(opened(tmp_path), tmp_path / "shards"))
    assert "class '=1+1': spreadsheets take it for a formula" in text
    assert r"class ' cat\n': holds control characters" in text
    (tmp_path / "classes.txt").write_text("zebra\nant\n")
    assert [c.name for c in opened(tmp_path).classes] == ["zebra", "ant"]
    (tmp_path / "classes.txt").write_bytes(b"\xff\n")
    assert "classes.txt: cannot be read" in message(lambda: opened(tmp_path).classes)


def test_everything_wrong_is_in_one_message(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    train, val = published()
    whole = (tmp_path / VAL).read_bytes()
    (tmp_path / VAL).write_bytes(whole[:-20])
    (tmp_path / "data/validation-00001.parquet").write_bytes(b"")
    (tmp_path / "data/validation-00002.parquet").symlink_to("nowhere")
    parquet.write_table(pa.table({"img": ["x"], "labels": [1]}), tmp_path / "data/validation-00003.parquet")
    parquet.write_table(pa.table({"image": [b"x"], "label": ["cat"]}), tmp_path / "data/validation-00004.parquet")
    write(tmp_path / "data/validation-00005.parquet", val, [*NAMES[:3], "another"])
    write(tmp_path / TRAIN.format(1), [(*train[0][:2], label) for label in (-1, 4, None, 0)])
    with pytest.raises(BadData) as caught:
        opened(tmp_path).originals("train")
    assert "and 2 more" in str(caught.value)
    text = "\n".join(caught.value.everything)
    for part in (
        f"{VAL}: not a whole parquet file",
        "data/validation-00001.parquet: not a whole parquet file",
        "data/validation-00002.parquet: not a whole parquet file: ",
        "00003.parquet: has no column image.bytes (binary) and no column label (integer); its columns: img (string)",
        "00004.parquet: has no column image.bytes (binary) and no column label (integer); its columns: image (binary)",
        f"other classes than in {TRAIN.format(0)}: data/validation-00005.parquet",
        f"{TRAIN.format(1)}: 3 labels of no class (0 to 3): row 0: -1, row 1: 4, row 2: -1",
    ):
        assert part in text, (part, text)


def test_damaged_pages_and_missing_bytes_are_named(tmp_path: Path) -> None:
    train, val = published()
    write(tmp_path / VAL, [(None, "a.jpg", 0), *val[1:]])
    write(tmp_path / TRAIN.format(0), train, compression="none", write_page_checksum=True)
    damaged = bytearray((tmp_path / TRAIN.format(0)).read_bytes())
    damaged[damaged.index(train[4][0]) + 50] ^= 1
    (tmp_path / TRAIN.format(0)).write_bytes(damaged)
    text = message(lambda: opened(tmp_path).originals("train"))
    assert f"{TRAIN.format(0)}: row 0 or a later one: not a whole parquet file: " in text
    assert f"{VAL}: 1 image without bytes: row 0" in text


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_files_is_named(split: str, tmp_path: Path) -> None:
    write(tmp_path / ("validation-0.parquet" if split == "train" else "train-0.parquet"), published()[0])
    write(tmp_path / "test-0.parquet", published()[0])
    text = message(lambda: opened(tmp_path))
    assert f"no {split} files" in text
    assert "test-0.parquet" in text
    assert "no train and no val files" in message(lambda: opened(tmp_path / "nothing"))


def test_the_copy_needs_space_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_imagenet(tmp_path / "h")
    (tmp_path / "scratch").mkdir()
    source = HuggingFace(tmp_path / "h", lambda: tmp_path / "scratch")
    assert len(source.originals("val")) == 8
    assert list((tmp_path / "scratch").iterdir()) == []  # it has no name
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000, total=2_000))
    with pytest.raises(StorageFailure, match=r"needs about [\d,]+ bytes while the stage runs, 1,000 are free"):
        HuggingFace(tmp_path / "h", lambda: tmp_path).originals("val")


def test_a_file_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """128 MiB of images in row groups of 4 MiB."""
    noise = os.urandom(1 << 20)
    rows = [(number.to_bytes(4) + noise, None, 0) for number in range(128)]
    write(tmp_path / "train.parquet", rows, row_group_size=4, compression="snappy")
    assert sum(image.size for image in read_images(tmp_path / "train.parquet")) == 128 * (4 + (1 << 20))
    script = """if True:
        import resource, sys
        from pathlib import Path
        from vgg.sharding.parquet import read_images
        images = read_images(Path(sys.argv[1]))
        next(images)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert sum(1 for _ in images) == 127
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", script, tmp_path / "train.parquet"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40_000  # kB


@pytest.mark.faults
def test_the_program_packs_parquet_files(params_file: Path, tmp_path: Path) -> None:
    write_imagenet(tmp_path / "images")
    params = json.loads(params_file.read_text())
    params["shard"]["source"] = "huggingface"
    params_file.write_text(json.dumps(params))
    done = program("shard", *flags("shard", tmp_path, params_file), cwd=tmp_path, VGG_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert f"bytes of images to {tmp_path}/cache" in done.stderr
    assert list((tmp_path / "cache").iterdir()) == []
    assert json.loads((tmp_path / "m/shard.json").read_text())["num_train"] == 20
