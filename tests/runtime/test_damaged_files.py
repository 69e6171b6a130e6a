"""Small files that a power loss may leave empty, short or wrong: locks, receipts, cached files, leases, last words."""

from __future__ import annotations

import errno
import fcntl
import logging
import random
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from conftest import SHARD

from components.step import message_of
from runtime import filesystem, manifest
from runtime.errors import Preempted
from runtime.ranks.launch import Watchdog
from runtime.shards.cache import Cache
from runtime.shards.shardset import ShardSet
from runtime.store.lease import Lease
from runtime.store.storage import _copy
from runtime.targets import Directory, only_writer
from vgg.params.shard import ShardParams
from vgg.sharding.pack import pack
from vgg.sharding.sources import Folder

WRONG = [b"", b"\xff\xfe\x00", b"5", b"null", b"[1, 2]", b'{"owner": {"a": 1}, "exit_code": 75}', b"[" * 100_000]


@pytest.mark.parametrize("value", [{}, {"a": [1, "é", None, 0.5]}, {"name": "\udcff"}])
def test_a_sealed_object_is_read_only_whole(value: dict[str, Any]) -> None:
    raw = manifest.sealed(value)
    assert manifest.unsealed(raw) == value
    for at in range(len(raw)):
        for bit in range(8):
            assert manifest.unsealed(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]) is None
        assert manifest.unsealed(raw[:at]) is None
    assert all(manifest.unsealed(wrong) is None for wrong in WRONG)


@pytest.mark.parametrize("content", WRONG)
def test_a_lock_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.lock"
    path.write_bytes(content)
    with open(path, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Preempted, match=f"{tmp_path}/model: (process 5|another process) is writing there; wait"):
            with only_writer(tmp_path / "model"):
                pass
    with only_writer(tmp_path / "model"):
        assert path.read_text().isdecimal()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filesystem.fcntl, "flock", unsupported)
    with only_writer(tmp_path / "model"):
        assert "has no locks" in caplog.text
    cached = cache(tmp_path, b"content")
    assert cached[0].path(cached[1]).read_bytes() == b"content"


def cache(tmp_path: Path, content: bytes) -> tuple[Cache, dict[str, Any]]:
    """A cache of one file, which is downloaded from memory."""
    (tmp_path / "file.idx").write_bytes(content)
    entry = manifest.file_entry(tmp_path, "file.idx")

    def fetch(_: dict[str, Any], file: BinaryIO) -> None:
        file.write(content)

    return Cache(tmp_path / "cache", 1000, fetch), entry


def test_a_cached_index_is_fetched_again(tmp_path: Path) -> None:
    files, entry = cache(tmp_path, b"content")
    files.path(entry).write_bytes(b"c0ntent")
    _copy(files, entry, tmp_path / "set")
    assert (tmp_path / "set/file.idx").read_bytes() == files.path(entry).read_bytes() == b"content"


def test_receipts(images: Path, shards: ShardSet, tmp_path: Path) -> None:
    """One changed digit, for example of a label, would otherwise be in the index."""
    dice, folder = random.Random(1), tmp_path / "again"

    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        pack(ShardParams(**SHARD), Folder(images), Directory(folder), "test", num_workers=1, check=stop)
    receipts = sorted(folder.glob("*.receipt"))
    assert receipts
    for receipt in receipts:
        raw = bytearray(receipt.read_bytes())
        at = dice.choice([at for at, byte in enumerate(raw) if chr(byte).isdigit()])
        raw[at] = ord("1") if raw[at] != ord("1") else ord("2")
        receipt.write_bytes(raw)
    pack(ShardParams(**SHARD), Folder(images), Directory(folder), "test", num_workers=1)
    expected = {path.name: path.read_bytes() for path in shards.directory.iterdir()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


class Store:
    """A prefix that holds one lease, written now."""

    address = "s3://bucket/prefix"

    def __init__(self, body: bytes) -> None:
        self.body = body

    def get_with_answer(self, name: str) -> tuple[bytes, dict[str, Any]]:
        from datetime import UTC, datetime
        from email.utils import format_datetime

        now = datetime.now(UTC)
        headers = {"HTTPHeaders": {"date": format_datetime(now)}}
        return self.body, {"ETag": "1", "LastModified": now, "ResponseMetadata": headers}


@pytest.mark.parametrize("body", WRONG)
def test_a_lease_is_of_an_unknown_process_until_it_expires(body: bytes) -> None:
    with pytest.raises(Preempted, match="is writing there"), Lease(Store(body), "this"):  # type: ignore[arg-type]
        pass


def test_last_words_and_heartbeats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = tmp_path / "words"
    words.write_bytes(b"\n".join([*WRONG, b'{"exit_code": 74, "message": "full"}', b'{"exit_code": 75, "mess']))
    assert message_of(74, words) == "full"
    assert message_of(75, words) == ""
    for number, content in enumerate(WRONG):
        (tmp_path / f"{number}.json").write_bytes(content)
    caplog.set_level(logging.DEBUG)
    watchdog = Watchdog(tmp_path)
    watchdog._read_status()
    assert watchdog._ranks == {}
