"""Finished directories: a corrupted byte is detected anywhere, and the file is named."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

from runtime import manifest
from runtime.errors import Refused
from runtime.shards.shardset import ShardSet


def finished(directory: Path) -> None:
    directory.mkdir()
    (directory / "a.bin").write_bytes(bytes(range(256)))
    (directory / "b").mkdir()
    (directory / "b" / "c.txt").write_text("three\n")
    entries = [manifest.file_entry(directory, name) for name in ("a.bin", "b/c.txt")]
    manifest.write(directory, "test/1", {"note": "ü", "count": 3}, entries)


def verify(directory: Path) -> None:
    for entry in manifest.read(directory, "test/1")["files"]:
        manifest.verify_file(directory, entry)


def test_every_corrupted_byte_is_detected(tmp_path: Path) -> None:
    finished(tmp_path / "d")
    verify(tmp_path / "d")
    for path in sorted((tmp_path / "d").rglob("*")):
        if path.is_dir():
            continue
        intact = path.read_bytes()
        for position in range(len(intact)):
            path.write_bytes(intact[:position] + bytes([intact[position] ^ 1 << position % 8]) + intact[position + 1 :])
            with pytest.raises(Refused, match=path.name):
                verify(tmp_path / "d")
        path.write_bytes(intact)
    verify(tmp_path / "d")


def test_missing_short_and_other_schema(tmp_path: Path) -> None:
    finished(tmp_path / "d")
    with pytest.raises(Refused, match="contains test/1, expected other/1"):
        manifest.read(tmp_path / "d", "other/1")
    (tmp_path / "d" / "a.bin").write_bytes(b"short")
    with pytest.raises(Refused, match="5 bytes instead of 256"):
        verify(tmp_path / "d")
    (tmp_path / "d" / "a.bin").unlink()
    with pytest.raises(Refused, match=r"a\.bin: missing"):
        verify(tmp_path / "d")
    (tmp_path / "d" / "manifest.json").unlink()
    with pytest.raises(Refused, match="is not finished"):
        verify(tmp_path / "d")


def test_the_digest_is_the_one_dvc_records(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    finished(repo / "d")

    def run(*command: str) -> None:
        subprocess.run(command, cwd=repo, env=environment(), check=True, capture_output=True, timeout=60)

    run("git", "init", "-q")
    dvc = [sys.executable, "-m", "dvc"]
    run(*dvc, "init", "-q")
    run(*dvc, "add", "-q", "d")
    recorded = next(line.split()[-1] for line in (repo / "d.dvc").read_text().splitlines() if "md5:" in line)
    assert manifest.directory_digest(repo / "d", manifest.read(repo / "d", "test/1")) == recorded


def test_flipped_bytes_in_shards_are_refused_by_name(shards: ShardSet) -> None:
    """500 random corruptions in tars, indexes and the manifest; the file is always named."""
    rng = random.Random(0)
    files = sorted(path for path in shards.directory.iterdir())
    for _ in range(500):
        path = rng.choice(files)
        intact = path.read_bytes()
        position = rng.randrange(len(intact))
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 1 << rng.randrange(8)]) + intact[position + 1 :])
        with pytest.raises(Refused, match=path.name):
            ShardSet(shards.directory).verify()
        path.write_bytes(intact)
    ShardSet(shards.directory).verify()


def test_a_damaged_image_is_refused_when_it_is_read(shards: ShardSet) -> None:
    """Also without a complete verification, by the checksum of the image."""
    split = shards.split("val")
    row = split.rows[5]
    path = shards.directory / split.shards[row["shard"]]["path"]
    data = bytearray(path.read_bytes())
    data[int(row["offset"]) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(Refused, match=split.key(5)):
        split.read(5)
