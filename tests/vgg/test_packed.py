"""From ILSVRC archives to a finished shard set: unusual images are kept and listed in the manifest."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from archives import COST_2010, SYNSETS_2010, pictures_2010, pictures_2012, write_2010, write_2012
from conftest import SHARD
from PIL import Image

from runtime.errors import BadData
from runtime.shards.shardset import ShardSet
from runtime.targets import Directory
from vgg.params.shard import ShardParams
from vgg.sharding.editions import Edition
from vgg.sharding.ilsvrc import Archives
from vgg.sharding.pack import pack
from vgg.sharding.sources import Folder


def packed(source: Archives, num_workers: int) -> ShardSet:
    params = ShardParams(**{**SHARD, "source": source.edition.name.lower()})
    output = source.root / f"shards-{num_workers}"
    pack(params, source, Directory(output), "some code", num_workers)
    return ShardSet(output)


def jpegs(shards: ShardSet, split: str) -> dict[str, bytes]:
    part = shards.split(split)
    return {part.key(number): part.read(number) for number in range(len(part))}


def test_2012(tmp_path: Path) -> None:
    shards, pictures = packed(Archives(tmp_path, write_2012(tmp_path)), 2), pictures_2012()
    assert [(c["wnid"], c["name"]) for c in shards.manifest["classes"]] == [
        ("n01440764", "tench, Tinca tinca"),
        ("n01739381", "vine snake"),
        ("n02105855", "Shetland sheepdog, Shetland sheep dog, Shetland"),
        ("n03018349", "china cabinet, china closet"),
    ]
    reasons = {f"{item['split']}/{item['key']}": item["reason"] for item in shards.manifest["amended"]}
    assert reasons == {
        "train/n01739381_1309": "CMYK JPEG re-coded as RGB",
        "train/n02105855_2933": "PNG re-coded as JPEG",
        "train/n03018349_4028": "CMYK JPEG re-coded as RGB",
        "val/ILSVRC2012_val_00000007": "CMYK JPEG re-coded as RGB",
    }
    for split in ("train", "val"):
        found = jpegs(shards, split)
        assert found.keys() == pictures[split].keys()
        for key, jpeg in found.items():
            if f"{split}/{key}" not in reasons:
                assert jpeg == pictures[split][key]  # greyscale and rotated ones, too
                continue
            image, original = (Image.open(io.BytesIO(data)) for data in (jpeg, pictures[split][key]))
            assert (image.format, image.mode, "progression" in image.info) == ("JPEG", "RGB", False)
            difference = np.abs(np.asarray(image).astype(int) - np.asarray(original.convert("RGB")))
            assert difference.mean() < 4
    assert shards.manifest["remarks"] == [
        {"split": "train", "key": "n03018349_9", "remark": "EXIF orientation 6, not applied"}
    ]
    md5s = {archive["name"]: archive["md5"] for archive in shards.manifest["source"]["archives"]}
    assert len(md5s["ILSVRC2012_img_train.tar"]) == 32
    assert not (shards.directory / "cost_matrix.npy").exists()


def test_2010(tmp_path: Path) -> None:
    shards, pictures = packed(Archives(tmp_path, write_2010(tmp_path)), 2), pictures_2010()
    assert shards.manifest["splits"].keys() == {"train", "val", "test"}
    val, test = jpegs(shards, "val"), jpegs(shards, "test")
    assert val["ILSVRC2010_val_00000003"] == pictures["patches"]["val/ILSVRC2010_val_00000003"]
    assert test["ILSVRC2010_test_00000010"] == pictures["patches"]["test/ILSVRC2010_test_00000010"]
    gzipped = jpegs(shards, "train")["n02487347_1956"]
    assert gzipped.startswith(b"\xff\xd8\xff")
    assert not pictures["train"]["n02487347_1956"].startswith(b"\xff\xd8")
    table = json.loads((shards.directory / "synsets.json").read_bytes())
    assert {row["wnid"]: row["label"] for row in table if row["label"] is not None} == {
        c["wnid"]: label for label, c in enumerate(shards.manifest["classes"])
    }
    # the devkit has the cost by id; hierarchical error needs it by class index
    cost = np.load(shards.directory / "cost_matrix.npy")
    index = {row.id: row.wnid for row in SYNSETS_2010}
    wnids = [c["wnid"] for c in shards.manifest["classes"]]
    for i, row in enumerate(COST_2010.tolist()):
        assert [cost[wnids.index(index[i + 1]), wnids.index(index[j + 1])] for j in range(4)] == row
    urls = [str(shards.directory / entry["path"]) for entry in shards.split("test").shards]
    seen = {sample["__key__"]: int(sample["cls"]) for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    split = shards.split("test")
    assert seen == {split.key(number): int(split.rows["label"][number]) for number in range(len(split))}


@pytest.mark.parametrize("write", [write_2012, write_2010])
def test_the_bytes_do_not_depend_on_the_number_of_workers(write: Callable[[Path], Edition], tmp_path: Path) -> None:
    source = Archives(tmp_path, write(tmp_path))
    one, three = packed(source, 1), packed(source, 3)
    names = sorted(path.name for path in one.directory.iterdir())
    assert names == sorted(path.name for path in three.directory.iterdir())
    assert "synsets.json" in names
    for name in names:
        assert (one.directory / name).read_bytes() == (three.directory / name).read_bytes()


def test_a_damaged_devkit_is_reported_by_its_md5_before_it_is_parsed(tmp_path: Path) -> None:
    edition = write_2012(tmp_path)
    path = tmp_path / edition.devkit.name
    path.write_bytes(path.read_bytes()[:-100])
    source = Archives(tmp_path, edition)
    with pytest.raises(BadData, match=f"{edition.devkit.name}: md5 [0-9a-f]+, published {edition.devkit.md5}"):
        source.verify()
    with pytest.raises(BadData, match=r"not a complete .tar.gz"):
        _ = source.classes


def test_indexes_for_other_readers_match_the_tars(tmp_path: Path) -> None:
    """DALI's .idx: offsets and sizes; timm's _info.json: numbers of images."""
    shards = packed(Archives(tmp_path, write_2012(tmp_path)), 1)
    info = json.loads((shards.directory / "_info.json").read_bytes())["splits"]
    for split in ("train", "val"):
        assert info[split]["num_samples"] == sum(info[split]["shard_lengths"]) == len(shards.split(split))
        for name, length in zip(info[split]["filenames"], info[split]["shard_lengths"], strict=True):
            lines = (shards.directory / name).with_suffix(".idx").read_text().splitlines()
            assert lines[0] == f"v1.2 {length}"
            data = (shards.directory / name).read_bytes()
            with tarfile.open(shards.directory / name) as tar:
                members = {member.name: member for member in tar.getmembers()}
            for line in lines[1:]:
                words = line.split()
                for kind, offset, size, member in zip(*(words[i::4] for i in range(4)), strict=True):
                    found = members[member]
                    assert (found.offset_data, found.size, kind) == (int(offset), int(size), member.split(".")[1])
                    assert len(data) >= int(offset) + int(size)


def test_warnings_of_libjpeg_count_alike_for_archives_and_folders(tmp_path: Path) -> None:
    """The same odd bytes in the archives and as files: the same remarks, repairs and refusals."""
    pictures = pictures_2012()
    train = pictures["train"]
    revision, cut, between = "n01440764_77", "n01739381_30", "n02105855_80"
    train[revision] = train[revision][:11] + b"\x03" + train[revision][12:]
    train[between] = train[between][:20] + b"left over" + train[between][20:]  # behind the first segment
    train[cut] = train[cut][:-100]
    archives = Archives(tmp_path, write_2012(tmp_path, pictures))
    wnids = [image_class.wnid for image_class in archives.classes]
    for split in archives.splits:
        for original in archives.originals(split):
            path = tmp_path / "folder" / split / wnids[original.label] / f"{original.key}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archives.read(original))
    params = ShardParams(**{**SHARD, "on_bad_image": "quarantine", "max_quarantined": 1})
    made = []
    for name, source in (("a", archives), ("b", Folder(tmp_path / "folder"))):
        found = pack(params, source, Directory(tmp_path / name), "some code", 1)
        listed = {item["key"]: item["reason"] for item in found["amended"]}
        remarks = {(item["key"], item["remark"]) for item in found["remarks"] if item["split"] == "train"}
        made.append((listed[between], remarks, [item["reason"] for item in found["quarantined"]]))
    assert made[0] == made[1]
    repaired, remarks, refused = made[0]
    assert repaired == "repaired, with the same pixels: Corrupt JPEG data: 9 extraneous bytes before marker 0xdb"
    assert (revision, "decodes with a warning: Warning: unknown JFIF revision number 3.01") in remarks
    assert refused == ["damaged: Premature end of JPEG file"]
