"""python -m components.shard verify: every kind of damage is found and reported precisely."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import NUM_TRAIN, NUM_VAL, program

from components.shard.verify import main
from runtime.errors import Refused
from runtime.shards.shardset import ShardSet

SHARD = "train-00001.tar"


def rows(shards: ShardSet) -> np.ndarray:
    """Of the shard that is damaged, in the order of the file."""
    split = shards.split("train")
    return split.rows[split.rows["shard"] == 1]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def key(row: np.ndarray) -> str:
    return bytes(row["key"]).decode()


def damaged_payload(shards: ShardSet) -> str:
    row = rows(shards)[2]
    flip(shards.directory / SHARD, int(row["offset"]) + int(row["size"]) // 2)
    return f"{SHARD}: 1 of its {len(rows(shards))} images are damaged: {key(row)}"


def damaged_header(shards: ShardSet) -> str:
    row = rows(shards)[3]
    flip(shards.directory / SHARD, int(row["offset"]) - 500)
    return f"{SHARD}: the tar headers or labels of {key(row)} are damaged"


def damaged_label(shards: ShardSet) -> str:
    row = rows(shards)[0]
    flip(shards.directory / SHARD, int(row["offset"]) - 1024)
    return f"{SHARD}: the tar headers or labels of {key(row)} are damaged"


def cut_at_a_member_boundary(shards: ShardSet) -> str:
    path, row = shards.directory / SHARD, rows(shards)[4]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: int(row["offset"]) - 1536])
    lost = len(rows(shards)) - 4
    return (
        f"{SHARD}: has {int(row['offset']) - 1536:,} bytes instead of {size:,}; "
        f"{lost} of its {len(rows(shards))} images are lost: {key(row)}"
    )


def swapped(shards: ShardSet) -> str:
    one, other = shards.directory / SHARD, shards.directory / "train-00003.tar"
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return f"{SHARD}: holds the bytes of train-00003.tar"


def padding(shards: ShardSet) -> str:
    flip(shards.directory / SHARD, -1)
    return f"{SHARD}: all images are intact"


def missing(shards: ShardSet) -> str:
    (shards.directory / SHARD).unlink()
    return f"{SHARD}: missing"


def damaged_index(shards: ShardSet) -> str:
    flip(shards.directory / "train.index.npy", -3)
    return "train.index.npy: wrong sha256"


def damaged_info(shards: ShardSet) -> str:
    flip(shards.directory / "_info.json", 3)
    return "_info.json: wrong sha256"


def damaged_manifest(shards: ShardSet) -> str:
    flip(shards.directory / "manifest.json", 40)
    return "manifest.json: damaged"


@pytest.mark.parametrize(
    "damage",
    [
        damaged_payload, damaged_header, damaged_label, cut_at_a_member_boundary, swapped, padding, missing,
        damaged_index, damaged_info, damaged_manifest,
    ],
)  # fmt: skip
def test_damage_is_described(damage: Callable[[ShardSet], str], shards: ShardSet) -> None:
    main([str(shards.directory)])
    main([str(shards.directory / "manifest.json")])
    expected = damage(shards)
    with pytest.raises(Refused) as caught:
        main([str(shards.directory)])
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "damage", [damaged_payload, damaged_header, cut_at_a_member_boundary, swapped, padding, missing]
)
def test_training_does_not_start_on_it(damage: Callable[[ShardSet], str], shards: ShardSet) -> None:
    damage(shards)
    with pytest.raises(Refused, match=SHARD):
        ShardSet(shards.directory).verify()


@pytest.mark.parametrize("damage", [damaged_payload, cut_at_a_member_boundary, swapped, missing])
def test_damage_after_the_start_is_found_by_the_checksum_of_the_image(
    damage: Callable[[ShardSet], str], shards: ShardSet
) -> None:
    damage(shards)
    split = shards.split("train")
    with pytest.raises(Refused, match=SHARD):
        for number in range(len(split)):
            split.read(number)


def test_as_a_program(shards: ShardSet, tmp_path: Path) -> None:
    good = program("shard", "verify", shards.directory / "manifest.json", cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    assert "all intact" in good.stderr
    expected = damaged_payload(shards)
    bad = program("shard", "verify", shards.directory, cwd=tmp_path)
    assert bad.returncode == 78
    assert expected in bad.stderr
    assert "Traceback" not in bad.stderr
    nothing = program("shard", "verify", tmp_path / "nowhere", cwd=tmp_path)
    assert nothing.returncode == 78
    assert "not a finished data set" in nothing.stderr


def test_indexes_for_other_readers(shards: ShardSet) -> None:
    """DALI's .idx points at the members; timm's _info.json counts the images in the tars."""
    for entry in shards.split("train").shards:
        tar = (shards.directory / entry["path"]).read_bytes()
        first, *lines = (shards.directory / entry["path"]).with_suffix(".idx").read_text().splitlines()
        assert first == f"v1.2 {len(lines)}"
        for line in lines:
            cls, cls_at, cls_size, cls_name, jpg, jpg_at, jpg_size, jpg_name = line.split()
            assert (cls, jpg) == ("cls", "jpg")
            for at, size, name in ((cls_at, cls_size, cls_name), (jpg_at, jpg_size, jpg_name)):
                assert tar[int(at) - 512 :].startswith(name.encode() + b"\0")
                assert int(tar[int(at) - 512 + 124 : int(at) - 512 + 135], 8) == int(size)
    splits = json.loads((shards.directory / "_info.json").read_text())["splits"]
    assert (splits["train"]["num_samples"], splits["val"]["num_samples"]) == (NUM_TRAIN, NUM_VAL)
    assert sum(splits["train"]["shard_lengths"]) == NUM_TRAIN
    assert all((shards.directory / name).is_file() for name in splits["train"]["filenames"])
