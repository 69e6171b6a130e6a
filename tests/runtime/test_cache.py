"""The cache of a node: every file downloaded once, verified, within its size limit, even if processes are killed."""

# fixtures

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from conftest import ROOT, environment
from faultproxy import FaultProxy
from s3servers import Server, address, moto, moto_server  # noqa: F401
from slowstore import SIZE, Store, fill

from runtime.errors import Refused, StorageFailure
from runtime.shards import cache as cache_module
from runtime.shards.cache import Cache
from runtime.shards.prefetch import Prefetcher
from runtime.store.s3 import Prefix
from runtime.store.s3target import Target
from runtime.targets import holding


@pytest.fixture
def entries(tmp_path: Path) -> list[dict[str, Any]]:
    return fill(tmp_path / "store")


@pytest.fixture
def cache(tmp_path: Path, entries: list[dict[str, Any]]) -> Cache:
    return Cache(tmp_path / "cache", 20 * SIZE, Store(tmp_path / "store"))


def reader(tmp_path: Path, files: int = 20, pause: float = 0.0, rounds: int = 1) -> subprocess.Popen[str]:
    arguments = [str(a) for a in (tmp_path / "cache", files * SIZE, tmp_path / "store", pause, rounds)]
    command = [sys.executable, str(ROOT / "tests/fakes/slowstore.py"), *arguments]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)


def downloads(tmp_path: Path) -> Counter[str]:
    return Store(tmp_path / "store").downloads()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def held_bytes(directory: Path) -> int:
    """Bytes of all files; those being downloaded count as a whole.  The lock stops evictions, but not renames."""
    found = {}
    with open(directory / "room.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for item in os.scandir(directory):
            with contextlib.suppress(FileNotFoundError):
                found[item.inode()] = item.stat().st_size
    return sum(found.values())


def test_processes_share_a_directory_and_each_file_is_fetched_once(tmp_path: Path, entries: list[Any]) -> None:
    readers = [reader(tmp_path, pause=0.05) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in readers] == ["read\n"] * 3
    assert downloads(tmp_path) == {entry["path"]: 1 for entry in entries}
    names = {path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"}
    assert names == {entry["sha256"] + ".tar" for entry in entries}


def test_a_killed_downloader_is_followed_by_another(tmp_path: Path, cache: Cache, entries: list[Any]) -> None:
    killed = reader(tmp_path, pause=60)
    wait_for(lambda: downloads(tmp_path) and list((tmp_path / "cache").glob("*.part")))
    waiting = reader(tmp_path)
    time.sleep(0.5)
    assert waiting.poll() is None, "waits while the first one downloads"
    killed.kill()
    killed.wait(10)
    assert waiting.communicate(timeout=60)[0] == "read\n"
    assert downloads(tmp_path)["0.tar"] == 2 and not list((tmp_path / "cache").glob("*.part"))
    assert killed.stdout and killed.stdout.close() is None


def test_space_reserved_by_a_killed_downloader_is_free_again(tmp_path: Path, entries: list[Any]) -> None:
    killed = reader(tmp_path, files=1, pause=60)
    wait_for(lambda: list((tmp_path / "cache").glob("*.part")))
    killed.kill()
    killed.communicate(timeout=10)
    small = Cache(tmp_path / "cache", SIZE, Store(tmp_path / "store"))
    assert len(small.read(entries[5], 0, SIZE)) == SIZE and held_bytes(tmp_path / "cache") == SIZE


def test_room_for_one_file_is_enough_for_many_readers(tmp_path: Path, entries: list[Any]) -> None:
    small = Cache(tmp_path / "cache", SIZE, Store(tmp_path / "store", 0.001))

    def read(i: int) -> bool:
        entry = entries[i % 3]
        return hashlib.sha256(small.read(entry, 0, SIZE)).hexdigest() == entry["sha256"]

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(read, range(60), timeout=60))


def test_the_least_recently_used_goes_first(
    tmp_path: Path, entries: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "TOUCH_SECONDS", 0.0)
    small = Cache(tmp_path / "cache", 3 * SIZE, Store(tmp_path / "store"))
    for i in (0, 1, 2, 0, 3, 0, 4, 0):
        assert small.read(entries[i], 7, 9) == (tmp_path / "store" / f"{i}.tar").read_bytes()[7:16]
        time.sleep(0.02)
    assert downloads(tmp_path) == {f"{i}.tar": 1 for i in range(5)}
    assert small.path(entries[4]).read_bytes() == (tmp_path / "store/4.tar").read_bytes()


def test_a_damaged_copy_is_healed(tmp_path: Path, cache: Cache, entries: list[Any]) -> None:
    path, data = cache.path(entries[0]), (tmp_path / "store/0.tar").read_bytes()
    assert not cache.heal(entries[0])
    path.write_bytes(data[:100] + b"!" + data[101:])
    assert cache.read(entries[0], 100, 1) == b"!"  # found by the CRC of the sample
    assert cache.heal(entries[0]) and cache.heal(entries[0]) and not path.exists()
    assert cache.read(entries[0], 0, SIZE) == data and not cache.heal(entries[0])
    path.write_bytes(data[:-1] + b"!")
    cache.verify(entries[0])
    cache.verify(entries[1])
    assert not path.exists()
    path.write_bytes(data[:30])  # truncated: noticed at once
    assert cache.read(entries[0], 40, 5) == data[40:45]
    assert downloads(tmp_path) == {"0.tar": 3}


def test_wrong_bytes_are_downloaded_again_and_then_refused(
    moto: Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(3).randbytes(300_000)
    entry = Target(address).write("a.tar", holding(data))
    with FaultProxy(moto.endpoint, seed=2, probability=1, kinds=("flip",)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        remote = Cache(tmp_path / "cache", 10**6, Prefix(address).fetch)
        with pytest.raises(Refused, match=r"a.tar: downloaded 5 times, never with the size and sha256"):
            remote.path(entry)
        assert proxy.injected == {"flip": 5} and held_bytes(tmp_path / "cache") == 0
        proxy.probability = 0.3
        for turn in range(8):
            assert Cache(tmp_path / f"{turn}", 10**6, Prefix(address).fetch).read(entry, 0, 10**6) == data
        assert proxy.injected["flip"] > 5
    with pytest.raises(Refused, match="has 300,000 bytes instead of 7"):
        remote.path({**entry, "size": 7, "sha256": "0" * 64})


def test_no_space_is_one_message(tmp_path: Path, cache: Cache, entries: list[Any]) -> None:
    small = Cache(tmp_path / "cache", SIZE - 1, Store(tmp_path / "store"))
    with pytest.raises(StorageFailure, match=r"0.tar: has 50,000 bytes.*may hold 49,999. Set VGG_CACHE_BYTES"):
        small.path(entries[0])

    def full(entry: dict[str, Any], file: BinaryIO) -> None:
        file.write(b"x" * 1000)
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageFailure, match="No space left"):
        Cache(tmp_path / "cache", 20 * SIZE, full).path(entries[0])
    assert held_bytes(tmp_path / "cache") == 0


def test_a_cache_works_in_worker_processes(tmp_path: Path, cache: Cache, entries: list[Any]) -> None:
    cache.path(entries[0])
    assert pickle.loads(pickle.dumps(Cache(tmp_path / "cache", SIZE, print))).max_bytes == SIZE
    with multiprocessing.get_context("fork").Pool(2) as pool:
        paths = pool.map_async(cache.path, entries * 2).get(60)
    assert len(set(paths)) == len(entries) and set(downloads(tmp_path).values()) == {1}


def test_a_fork_during_a_download_keeps_no_lock(tmp_path: Path, entries: list[Any]) -> None:
    slow = Cache(tmp_path / "cache", 20 * SIZE, Store(tmp_path / "store", 0.5))
    download = threading.Thread(target=slow.path, args=(entries[0],))
    download.start()
    wait_for(lambda: downloads(tmp_path))
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,), daemon=True)
    child.start()
    download.join(30)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(slow.heal, entries[0]).result(5) is False and child.is_alive()
    child.kill()
    child.join(10)


def test_the_prefetcher_stays_within_its_window(tmp_path: Path, cache: Cache, entries: list[Any]) -> None:
    with Prefetcher(cache, entries, ahead=3) as prefetcher:
        for begun in range(len(entries) + 1):
            prefetcher.advance(begun)
            wanted = min(begun + 3, len(entries))
            wait_for(lambda: len(downloads(tmp_path)) >= wanted)  # noqa: B023
            time.sleep(0.05)
            assert set(downloads(tmp_path)) == {f"{i}.tar" for i in range(wanted)}
    assert set(downloads(tmp_path).values()) == {1}


def test_the_prefetcher_stops_at_once_and_keeps_errors_to_itself(
    tmp_path: Path, cache: Cache, entries: list[Any]
) -> None:
    (tmp_path / "store/0.tar").unlink()
    slow = Cache(tmp_path / "cache", 20 * SIZE, Store(tmp_path / "store", 1.0))
    with Prefetcher(slow, entries, ahead=8, num_threads=2):
        wait_for(lambda: set(downloads(tmp_path)) == {"0.tar", "1.tar", "2.tar"})
        began = time.monotonic()
    assert time.monotonic() - began < 0.5
    wait_for(lambda: (tmp_path / "cache" / (entries[2]["sha256"] + ".tar")).exists())
    time.sleep(0.2)
    assert len(downloads(tmp_path)) == 3
    with Prefetcher(cache, entries, ahead=2) as prefetcher:
        prefetcher.advance(9)  # skipped entries are not downloaded
        wait_for(lambda: "9.tar" in downloads(tmp_path))
    assert "5.tar" not in downloads(tmp_path)
