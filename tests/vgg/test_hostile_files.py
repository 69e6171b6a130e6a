"""Reading of mutated shards, indexes, manifests and archives: the right bytes, or an error that names the file.

The number of mutations grows with VGG_HOSTILE_CASES (300); VGG_HOSTILE_SEED (1).
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hostile import CASES, SEED, show
from mutations import Random, flipped, pick
from samples import put

from runtime.errors import BadData, Refused
from runtime.shards.shardset import ShardSet
from vgg.sharding import tars


def damaged_file(random: Random, data: bytes) -> bytes:
    """The bytes flipped, truncated, zeroed, extended or rearranged; never unchanged."""
    while True:
        at, length = int(random.integers(len(data))), int(pick(random, [1, 100, 512, 4096]))
        changed: bytes = pick(
            random,
            [
                flipped(random, data, 0, len(data)),
                data[:at],
                put(data, at, bytes(min(length, len(data) - at))),
                data + random.bytes(length),
                data[:at] + data[at + length :],
                data[:at] + random.bytes(length) + data[at:],
                data[:at] + data[at + length : at + 2 * length] + data[at : at + length] + data[at + 2 * length :],
            ],
        )
        if changed != data:
            return changed


def test_a_mutated_shard_gives_right_bytes_or_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], shards: ShardSet, tmp_path: Path
) -> None:
    whole = {name: [shards.split(name).read(n) for n in range(len(shards.split(name)))] for name in ("train", "val")}
    paths = sorted(shards.directory.glob("*.tar"))
    counts = Counter[str]()
    for number in range(max(100, CASES // 3)):
        replay = f"VGG_HOSTILE_SEED={SEED}, shard case {number}"
        random = np.random.default_rng([SEED, 1, number])
        path = pick(random, paths)
        data = path.read_bytes()
        path.write_bytes(damaged_file(random, data))
        opened = ShardSet(shards.directory)
        with pytest.raises(Refused, match=path.name):
            opened.verify()
        for name in ("train", "val"):
            split = opened.split(name)
            for row in range(len(split)):
                try:
                    assert split.read(row) == whole[name][row], f"{replay}: wrong bytes, {split.where(row)}"
                    counts["right"] += 1
                except Refused as reason:
                    counts["refused"] += 1
                    assert f"{path.name}: {split.key(row)}: " in str(reason), f"{replay}: {reason}"
                    assert split.where(row).startswith(f"{path.name}:"), f"{replay}: another shard was damaged"
        path.write_bytes(data)
    show(capsys, f"VGG_HOSTILE_SEED={SEED}: {max(100, CASES // 3)} shards; images read: {dict(counts)}")
    assert counts["refused"] > 0
    ShardSet(shards.directory).verify()


def test_a_mutated_index_or_manifest_is_refused_by_name(shards: ShardSet) -> None:
    for number in range(max(50, CASES // 10)):
        random = np.random.default_rng([SEED, 2, number])
        path = shards.directory / pick(random, ["manifest.json", "train.index.npy", "val.index.npy"])
        data = path.read_bytes()
        path.write_bytes(damaged_file(random, data))
        with pytest.raises(Refused, match=path.name):
            ShardSet(shards.directory)
        path.write_bytes(data)
    ShardSet(shards.directory).verify()


def test_a_mutated_archive_is_listed_as_by_tarfile_or_refused_by_name(
    capsys: pytest.CaptureFixture[str], shards: ShardSet, tmp_path: Path
) -> None:
    """As sharding reads archives; half of the mutations are in a member's header."""
    data = sorted(shards.directory.glob("train*.tar"))[0].read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        headers = [member.offset for member in tar]
    path, counts = tmp_path / "hostile.tar", Counter[str]()
    for number in range(max(100, CASES // 3)):
        random = np.random.default_rng([SEED, 3, number])
        at = pick(random, headers)
        damaged = flipped(random, data, at, at + 512) if random.random() < 0.5 else damaged_file(random, data)
        path.write_bytes(damaged)
        with open(path, "rb") as file:
            try:
                found = [(m.name, m.offset, m.size) for m in tars.members(file.fileno(), 0, len(damaged), path.name)]
            except BadData as reason:
                assert str(reason).startswith("hostile.tar: byte ")
                counts["refused"] += 1
                continue
        with tarfile.open(path) as tar:
            assert found == [(m.name, m.offset_data, m.size) for m in tar], f"VGG_HOSTILE_SEED={SEED}, archive {number}"
        counts["listed"] += 1
    show(capsys, f"VGG_HOSTILE_SEED={SEED}: archives {dict(counts)}")
    assert counts["refused"] > 0
