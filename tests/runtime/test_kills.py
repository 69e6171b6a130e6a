"""Sharding killed at every call that changes files, in a folder and in an object store: part of `make faults`."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import flags, program
from killing import killed
from s3servers import Server, address, rclone_server, use  # noqa: F401  # fixtures

from runtime.shards.shardset import ShardSet
from runtime.store.lease import LEASE
from runtime.store.s3 import Prefix

PARTS = 8  # groups of moments, so that tests can run in parallel

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


def every_moment(
    command: list[str], kind: str, part: int, where: Path, begin: Callable[[], None], check: Callable[[], None],
    finish: Callable[[], None], **env: str,
) -> None:  # fmt: skip
    """begin() empties the target; check() checks it after a kill; finish() runs again and compares."""
    begin()
    code, moments = killed(command, kind, 0, where, **env)
    assert code == 0
    assert moments > 60
    for at in range(1 + part, moments + 1, PARTS):
        begin()
        code, reached = killed(command, kind, at, where, **env)
        # the order of processes differs between runs, and sometimes a run has one moment less
        assert code == -signal.SIGKILL or reached < at
        check()
        finish()


@pytest.mark.parametrize("part", range(PARTS))
def test_in_a_folder(part: int, images: Path, params_file: Path, shards: ShardSet, tmp_path: Path) -> None:
    expected = {path.name: path.read_bytes() for path in shards.directory.iterdir()}
    target = tmp_path / "target"
    arguments = [str(target) if a == tmp_path / "shards" else str(a) for a in flags("shard", tmp_path, params_file)]

    def check() -> None:
        for path in target.glob("*"):
            if path.suffix in (".tar", ".idx") or path.name == "manifest.json":
                assert path.read_bytes() == expected[path.name], f"{path.name} is visible but incomplete"
        if (target / "manifest.json").exists():
            assert all((target / name).exists() for name in expected), "the manifest was written before its files"

    def finish() -> None:
        done = program("shard", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert {path.name: path.read_bytes() for path in target.iterdir()} == expected

    command = [sys.executable, "-m", "components.shard", *arguments]
    every_moment(command, "files", part, tmp_path, lambda: shutil.rmtree(target, ignore_errors=True), check, finish)


@pytest.mark.parametrize("part", range(PARTS))
def test_in_a_store(
    part: int, images: Path, params_file: Path, shards: ShardSet, tmp_path: Path, rclone_server: Server, address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = {path.name: path.read_bytes() for path in shards.directory.iterdir()}
    arguments = [address if a == tmp_path / "shards" else str(a) for a in flags("shard", tmp_path, params_file)]
    use(monkeypatch, rclone_server)
    prefix = Prefix(address)
    env = rclone_server.env(VGG_CACHE=str(tmp_path / "cache"))

    def begin() -> None:
        for name in prefix.names():
            prefix.delete(name)

    def check() -> None:
        names = set(prefix.names())
        for name in names:
            if name.endswith((".tar", ".idx", "manifest.json")):
                assert prefix.get(name) == expected[name], f"{name} is visible but incomplete"
        if "manifest.json" in names:
            assert expected.keys() <= names, "the manifest was written before its files"
        prefix.delete(LEASE)  # instead of waiting for its expiry, which test_lease.py tests

    def finish() -> None:
        done = program("shard", *arguments, cwd=tmp_path, **env)
        assert done.returncode == 0, done.stderr
        assert {name: prefix.get(name) for name in prefix.names()} == expected

    every_moment(
        [sys.executable, "-m", "components.shard", *arguments], "requests", part, tmp_path, begin, check, finish, **env
    )


def test_moments_in_worker_processes_count(images: Path, params_file: Path, tmp_path: Path) -> None:
    """Otherwise no process would be killed in a worker."""
    arguments = [str(a) for a in flags("shard", tmp_path, params_file)]
    _, moments = killed([sys.executable, "-m", "components.shard", *arguments], "files", 0, tmp_path)
    num_shards = len(list(tmp_path.glob("shards/*.tar")))
    assert moments >= 2 * 9 * num_shards, "three files per shard, each with fsync, rename and fsync of the folder"
    assert os.path.exists(tmp_path / "shards/manifest.json")
