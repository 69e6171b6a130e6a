"""The object store: transfers are verified, and every failure is one message."""

# fixtures

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import pickle
import random
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from faultproxy import KINDS, FaultProxy
from ports import free_port
from s3servers import Server, address, moto, moto_server, rclone_server, server, use  # noqa: F401

from runtime import manifest
from runtime.errors import Problem, Refused, StorageFailure, Unreachable, WrongParameters
from runtime.store.lease import LEASE
from runtime.store.place import content_of
from runtime.store.s3 import ConditionFailed, Prefix
from runtime.store.s3target import Target
from runtime.targets import holding

DATA = random.Random(1).randbytes(3_000_000)


def read(prefix: Prefix, entry: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    prefix.fetch(entry, file)
    return file.getvalue()


def test_files_are_written_read_and_listed(server: Server, address: str, tmp_path: Path) -> None:
    target = Target(address)
    entry = target.write("train-00000.tar", holding(DATA))
    (tmp_path / "train-00000.tar").write_bytes(DATA)
    assert entry == manifest.file_entry(tmp_path, "train-00000.tar")
    assert target.holds(entry) and target.read("train-00000.tar") == DATA == read(target.prefix, entry)
    assert target.read("absent") is None and target.free_bytes() is None
    changed = {**entry, "sha256": "0" * 64, "md5": "0" * 32}
    assert not target.holds(changed) and not target.holds({**entry, "size": 1}) and not target.holds({"path": "x"})
    assert target.write("empty", holding(b""))["size"] == 0 and target.read("empty") == b""
    assert read(target.prefix, {"path": "empty", "size": 0}) == b""
    assert target.names() == ["empty", "train-00000.tar"]
    target.delete("empty")
    target.delete("empty")
    assert target.names() == ["train-00000.tar"]


def test_a_single_file_that_a_parameter_names(server: Server, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As localise.blacklist does."""
    Prefix(f"{address}/lists").put_bytes("blacklist.txt", b"36\n37\n")
    assert content_of(f"{address}/lists/blacklist.txt", "localise.blacklist") == b"36\n37\n"
    monkeypatch.setenv("VGG_STORE", address)
    assert content_of("store:lists/blacklist.txt", "localise.blacklist") == b"36\n37\n"
    for wrong in ("none.txt", ""):
        location = f"{address}/lists/{wrong}"
        with pytest.raises(WrongParameters, match=f"^localise.blacklist {location}: there is no such object"):
            content_of(location, "localise.blacklist")


def test_names_are_those_of_the_prefix_alone(server: Server, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("run1/a", "run1/b c+ü.tar", "run1/deep/er", "run10/c", "run", ".lease"):
        Prefix(address).put_bytes(name, b"x")
    assert Prefix(f"{address}/run1/").names() == ["a", "b c+ü.tar"]
    assert Target(address).names() == ["run"] and Prefix(address).names() == [LEASE, "run"]
    assert Target(f"{address}/absent").names() == []


def test_a_long_listing_is_complete(moto: Server, address: str) -> None:
    prefix = Prefix(address)
    client = prefix.client
    pages = client.list_objects_v2
    client.list_objects_v2 = lambda **call: pages(MaxKeys=3, **call)
    names = [f"{i:02d}" for i in range(10)]
    for name in names:
        prefix.put_bytes(name, b"")
    assert prefix.names() == names


def test_wrong_credentials_bucket_and_key_are_one_message(
    rclone_server: Server,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, rclone_server)
    began = time.monotonic()
    with pytest.raises(Refused, match=rf"{address}/absent.tar at http://127.*missing"):
        read(Prefix(address), {"path": "absent.tar", "size": 3})
    with pytest.raises(WrongParameters, match=r"s3://nowhere/x/f at http://127.*no such bucket"):
        Target("s3://nowhere/x").write("f", holding(b"1"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(WrongParameters, match=r"access refused.*AWS_SECRET_ACCESS_KEY"):
        Prefix(address).names()
    with pytest.raises(WrongParameters, match="access refused"):
        Prefix(address).head("x")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(WrongParameters, match=r"no credentials\. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Prefix(address).names()
    for wrong in ("s3:/x", "gs://b/x", "s3://", "s3:///x"):
        with pytest.raises(WrongParameters, match="not of the form"):
            Prefix(wrong)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(WrongParameters, match="nonsense"):
        Prefix(address).names()
    monkeypatch.setenv("VGG_S3_PATIENCE_SECONDS", "soon")
    with pytest.raises(
        WrongParameters, match="VGG_S3_PATIENCE_SECONDS: must be a number of seconds above 0, not 'soon'"
    ):
        Prefix(address).names()
    assert time.monotonic() - began < 10, "refusals are not tried again"


def test_an_unreachable_store_is_given_up_within_the_patience(
    moto: Server, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGG_S3_PATIENCE_SECONDS", "1")
    for kind in ("unavailable", "reset", "stall", "nobody"):
        with FaultProxy(moto.endpoint, probability=1, kinds=(kind,)) as proxy:
            port = free_port()
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}" if kind == "nobody" else proxy.endpoint)
            began = time.monotonic()
            with pytest.raises(Unreachable, match=rf"{address}/x at http://127.*no success for \d s, the last reason"):
                Prefix(address).get("x")
            assert 0.2 < time.monotonic() - began < 4, kind


def test_through_thirty_percent_faults_the_same_bytes(
    server: Server, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upload, download, list, delete: every kind of fault occurs, and none is visible."""
    monkeypatch.setenv("VGG_S3_TIMEOUT_SECONDS", "0.3")
    monkeypatch.setattr("runtime.retry.FIRST_PAUSE", 0.02)
    injected, seed = Counter[str](), 0
    while seed < 3 or set(injected) < set(KINDS):
        with FaultProxy(server.endpoint, seed, 0.3, stall=0.6) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            target = Target(f"{address}/{seed}")
            for i in range(5):
                name, data = f"{i}.tar", random.Random(i).randbytes(1 + 100_000 * i)
                entry = target.write(name, holding(data))
                tries = 0
                while hashlib.sha256(read(target.prefix, entry)).hexdigest() != entry["sha256"]:
                    tries += 1  # a flipped bit; the cache downloads again, see test_cache
                    assert tries < 10
                assert target.read(name) == data and target.holds(entry)
            target.delete("0.tar")
            assert target.names() == ["1.tar", "2.tar", "3.tar", "4.tar"]
            injected += proxy.injected
            seed += 1
    assert sum(injected.values()) > 15 and seed < 10


def test_a_download_that_breaks_off_continues_where_it_broke(
    server: Server, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Target(address).write("a.tar", holding(DATA))
    with FaultProxy(server.endpoint, seed=3, probability=0.6, kinds=("short",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert read(Prefix(address), entry) == DATA
    resumed = [seen.headers for seen in proxy.seen if "Range" in seen.headers]
    assert resumed and proxy.injected["short"]
    assert all(h["If-Match"].strip('"') == entry["md5"] and h["Range"] != "bytes=0-" for h in resumed)


def test_an_object_replaced_during_a_download_is_noticed(moto: Server, address: str) -> None:
    prefix = Prefix(address)
    entry = Target(address).write("a.tar", holding(DATA))
    with pytest.raises(Refused, match="has 3,000,000 bytes instead of 5"):
        read(prefix, {**entry, "size": 5})
    with FaultProxy(moto.endpoint, seed=1, probability=1, kinds=("short",)) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        chunks = Prefix(address).stream("a.tar")
        next(chunks)
        prefix.put_bytes("a.tar", DATA[::-1])
        with pytest.raises(StorageFailure, match="replaced while"):
            list(chunks)


def test_a_damaged_upload_is_repeated(server: Server, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(server.endpoint, seed=2, probability=0.5, kinds=("spoil",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        target = Target(address)
        for i in range(4):
            target.write(f"{i}", holding(DATA[i:1000]))
            assert target.read(f"{i}") == DATA[i:1000]
        assert proxy.injected["spoil"]
        proxy.probability = 1
        monkeypatch.setenv("VGG_S3_PATIENCE_SECONDS", "1")
        with pytest.raises((StorageFailure, Unreachable)):  # found by our check, or by the store
            Target(address).write("never", holding(DATA))


def test_a_file_too_large_for_one_request_names_the_parameter(moto: Server, address: str, tmp_path: Path) -> None:
    with pytest.raises(WrongParameters, match=r"5,368,709,121 bytes.*Lower shard.samples_per_shard"):
        Prefix(address).put_file("x", tmp_path / "x", {"size": (5 << 30) + 1})


def test_a_prefix_works_in_other_processes(moto: Server, address: str) -> None:
    prefix = Prefix(address)
    prefix.put_bytes("a", b"1")
    assert pickle.loads(pickle.dumps(Target(address))).read("a") == b"1"
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(prefix.get, ["a"] * 4).get(60) == [b"1"] * 4


def test_a_conditional_write_happens_once(moto: Server, address: str) -> None:
    prefix = Prefix(address)
    etag = prefix.put_bytes("a", b"1", {"IfNoneMatch": "*"})
    for condition in ({"IfNoneMatch": "*"}, {"IfMatch": '"0"'}):
        with pytest.raises(ConditionFailed):
            prefix.put_bytes("a", b"2", condition)
    prefix.put_bytes("a", b"3", {"IfMatch": etag})
    with pytest.raises(ConditionFailed):
        prefix.put_bytes("absent", b"", {"IfMatch": etag})
    assert prefix.get("a") == b"3"


def test_the_proxy_repeats_itself() -> None:
    from faultproxy import Seen

    drawn = []
    for _ in range(2):
        proxy = FaultProxy("http://127.0.0.1:1", seed=9, probability=0.5)
        drawn.append([proxy.draw(Seen("GET", "/b/k", {}))[0] for _ in range(50)])
        proxy.server.server_close()
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 3


def test_a_silent_server_is_unreachable() -> None:
    """It accepts and sends nothing: the client's timeout ends the request."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = Server("silent", address)
        with pytest.MonkeyPatch.context() as patch:
            use(patch, server, VGG_S3_PATIENCE_SECONDS="1")
            with pytest.raises(Unreachable) as raised:
                Prefix("s3://bucket/x").names()
    assert isinstance(raised.value, Problem) and raised.value.exit_code == 69
