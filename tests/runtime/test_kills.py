"""Sharding killed at every call that changes something, in a folder and in a store: part of `make faults`."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, environment, flags, program
from s3servers import Server, address, rclone_server, use  # noqa: F401  # fixtures

from runtime.shardset import ShardSet
from runtime.store.lease import LEASE
from runtime.store.s3 import Prefix

PARTS = 8  # of the moments, so that tests can run side by side

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


def killed(command: list[str], kind: str, at: int, where: Path, **env: str) -> tuple[int, int]:
    """Run it until moment `at` (0: to its end); returns its exit code and how many moments there were."""
    counter = where / "counter"
    counter.unlink(missing_ok=True)
    seam = {"KILL_IN": kind, "KILL_AT": str(at), "KILL_COUNTER": str(counter)}
    path = f"{ROOT}/tests/fakes/killed:{ROOT}"
    child = subprocess.Popen(
        command,
        cwd=where,
        env=environment(**env, **seam) | {"PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return child.wait(timeout=120), counter.stat().st_size


def every_moment(
    command: list[str], kind: str, part: int, where: Path, begin: Callable[[], None], check: Callable[[], None],
    finish: Callable[[], None], **env: str,
) -> None:  # fmt: skip
    """begin() makes an empty place; check() looks at what a kill left; finish() runs again and compares."""
    begin()
    code, moments = killed(command, kind, 0, where, **env)
    assert code == 0
    assert moments > 60
    for at in range(1 + part, moments + 1, PARTS):
        begin()
        code, reached = killed(command, kind, at, where, **env)
        # which process is faster differs from run to run: now and then a run has a moment less
        assert code == -signal.SIGKILL or reached < at
        check()
        finish()


@pytest.mark.parametrize("part", range(PARTS))
def test_in_a_folder(part: int, images: Path, params_file: Path, shards: ShardSet, tmp_path: Path) -> None:
    expected = {path.name: path.read_bytes() for path in shards.directory.iterdir()}
    target = tmp_path / "target"
    words = [str(target) if a == tmp_path / "shards" else str(a) for a in flags("shard", tmp_path, params_file)]

    def check() -> None:
        for path in target.glob("*"):
            if path.suffix in (".tar", ".idx") or path.name == "manifest.json":
                assert path.read_bytes() == expected[path.name], f"{path.name} is visible and not whole"
        if (target / "manifest.json").exists():
            assert all((target / name).exists() for name in expected), "the manifest came before what it lists"

    def finish() -> None:
        done = program("shard", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert {path.name: path.read_bytes() for path in target.iterdir()} == expected

    command = [sys.executable, "-m", "components.shard", *words]
    every_moment(command, "files", part, tmp_path, lambda: shutil.rmtree(target, ignore_errors=True), check, finish)


@pytest.mark.parametrize("part", range(PARTS))
def test_in_a_store(
    part: int, images: Path, params_file: Path, shards: ShardSet, tmp_path: Path, rclone_server: Server, address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = {path.name: path.read_bytes() for path in shards.directory.iterdir()}
    words = [address if a == tmp_path / "shards" else str(a) for a in flags("shard", tmp_path, params_file)]
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
                assert prefix.get(name) == expected[name], f"{name} is visible and not whole"
        if "manifest.json" in names:
            assert expected.keys() <= names, "the manifest came before what it lists"
        prefix.delete(LEASE)  # as if its expiry had passed, which test_lease.py waits for

    def finish() -> None:
        done = program("shard", *words, cwd=tmp_path, **env)
        assert done.returncode == 0, done.stderr
        assert {name: prefix.get(name) for name in prefix.names()} == expected

    every_moment(
        [sys.executable, "-m", "components.shard", *words], "requests", part, tmp_path, begin, check, finish, **env
    )


def test_the_seam_reaches_the_processes_that_pack(images: Path, params_file: Path, tmp_path: Path) -> None:
    """If workers were not counted, their moments would be missing, and nothing would be killed inside them."""
    words = [str(a) for a in flags("shard", tmp_path, params_file)]
    _, moments = killed([sys.executable, "-m", "components.shard", *words], "files", 0, tmp_path)
    num_shards = len(list(tmp_path.glob("shards/*.tar")))
    assert moments >= 2 * 9 * num_shards, "three files a shard: fsync, rename, fsync of the folder, each"
    assert os.path.exists(tmp_path / "shards/manifest.json")
