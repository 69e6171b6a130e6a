"""Shards in an object store: written, read and trained on like local ones, through faults, with the same bytes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import NUM_VAL, TRAIN, environment, flags, program, train_params
from faultproxy import FaultProxy
from s3servers import Server, address, moto, moto_server, rclone_server, use  # noqa: F401  # fixtures

from components.shard import verify
from runtime.errors import Refused
from runtime.shards.batches import Crops
from runtime.shards.loader import Loader
from runtime.shards.shardset import ShardSet
from runtime.store import storage
from runtime.store.s3 import Prefix
from vgg.data.stream import training_batches, validation_batches

STEPS = 9
FAULTS = 0.3


def batches(shards: ShardSet, workers: int = 0) -> list[Crops]:
    return list(training_batches(Loader(workers=workers), shards.split("train"), train_params(), range(STEPS)))


def shard_to(location: str, tmp_path: Path, params_file: Path, **env: str) -> subprocess.CompletedProcess[str]:
    words = [location if word == tmp_path / "shards" else word for word in flags("shard", tmp_path, params_file)]
    return program("shard", *words, cwd=tmp_path, **env)


def upload(shards: ShardSet, location: str) -> None:
    target = Prefix(location)
    for entry in shards.manifest["files"]:
        target.put_file(entry["path"], shards.directory / entry["path"], entry)
    target.put_bytes("manifest.json", (shards.directory / "manifest.json").read_bytes())


@pytest.mark.faults
@pytest.mark.parametrize("seed", [1, 2])
def test_sharding_through_faults_ends_with_the_bytes_of_a_local_run(
    seed: int,
    shards: ShardSet,
    params_file: Path,
    tmp_path: Path,
    rclone_server: Server,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A store that checks signatures, behind a proxy that breaks three requests of ten."""
    with FaultProxy(rclone_server.endpoint, seed, FAULTS, stall=2) as proxy:
        env = rclone_server.env(AWS_ENDPOINT_URL=proxy.endpoint, VGG_S3_TIMEOUT_SECONDS="1")
        done = shard_to(address, tmp_path, params_file, VGG_CACHE=str(tmp_path / "cache"), **env)
        assert done.returncode == 0, done.stderr
        assert sum(proxy.injected.values()) > 10
    use(monkeypatch, rclone_server)
    found = Prefix(address)
    assert found.names() == sorted(path.name for path in shards.directory.iterdir())
    assert all(found.get(name) == (shards.directory / name).read_bytes() for name in found.names())


def test_a_store_that_never_answers_is_exit_69_within_the_patience(
    params_file: Path,
    images: Path,
    tmp_path: Path,
    moto: Server,
    address: str,
) -> None:
    with FaultProxy(moto.endpoint, 1, 1.0, ("unavailable", "reset")) as proxy:
        env = moto.env(AWS_ENDPOINT_URL=proxy.endpoint, VGG_S3_PATIENCE_SECONDS="4")
        done = shard_to(address, tmp_path, params_file, **env)
    assert done.returncode == 69, done.stderr
    assert address in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.faults
def test_two_writers_on_one_prefix_one_stops_with_a_message(
    params_file: Path,
    images: Path,
    tmp_path: Path,
    moto: Server,
    address: str,
) -> None:
    words = [address if word == tmp_path / "shards" else str(word) for word in flags("shard", tmp_path, params_file)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "components.shard", *map(str, words)],
            cwd=tmp_path, env=environment(**moto.env(VGG_CACHE=str(tmp_path / "cache"))),
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in running]
    codes = sorted(process.returncode for process in running)
    assert codes == [0, 75], said
    assert any("is writing there" in text for text in said)


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_through_faults_gives_the_batches_of_a_local_run(
    workers: int,
    shards: ShardSet,
    tmp_path: Path,
    moto: Server,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload(shards, address)
    with FaultProxy(moto.endpoint, 3, FAULTS, stall=2) as proxy:
        use(monkeypatch, moto, AWS_ENDPOINT_URL=proxy.endpoint, VGG_S3_TIMEOUT_SECONDS="1",
            VGG_CACHE=str(tmp_path / "cache"))  # fmt: skip
        remote = storage.open_shards(address)
        found = batches(remote, workers)
        assert sum(proxy.injected.values()) >= 2
    assert remote.digest == shards.digest
    for ours, theirs in zip(found, batches(shards), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    shutil.rmtree(tmp_path / "cache/shards")


def test_a_cache_too_small_for_the_set_and_a_damaged_entry_change_nothing(
    shards: ShardSet,
    tmp_path: Path,
    moto: Server,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload(shards, address)
    largest = max(entry["size"] for entry in shards.manifest["files"])
    cache = tmp_path / "cache"
    use(monkeypatch, moto, VGG_CACHE=str(cache), VGG_CACHE_BYTES=str(2 * largest))
    remote = storage.open_shards(address)
    seen = [remote.split("val").read(number) for number in range(NUM_VAL)]
    assert seen == [shards.split("val").read(number) for number in range(NUM_VAL)]
    assert sum(path.stat().st_size for path in (cache / "shards").glob("*.tar")) <= 2 * largest
    for path in (cache / "shards").glob("*.tar"):
        data = bytearray(path.read_bytes())
        data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
        path.write_bytes(data)
    remote = storage.open_shards(address)
    assert [remote.split("val").read(number) for number in range(NUM_VAL)] == seen
    numbers = torch.cat([c.numbers for c in validation_batches(Loader(), remote.split("val"), train_params())])
    assert numbers.tolist() == list(range(NUM_VAL))


def test_verify_reads_a_remote_set_and_names_a_damaged_shard(
    shards: ShardSet,
    tmp_path: Path,
    moto: Server,
    address: str,
) -> None:
    upload(shards, address)
    verify.main([f"{address}/manifest.json"])
    name = "val-00000.tar"
    data = bytearray((shards.directory / name).read_bytes())
    data[len(data) // 2] ^= 1
    Prefix(address).put_bytes(name, bytes(data))
    with pytest.raises(Refused, match=name):
        verify.main([address])


def test_a_damaged_object_is_refused_by_name_not_read(
    shards: ShardSet,
    tmp_path: Path,
    moto: Server,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload(shards, address)
    use(monkeypatch, moto, VGG_CACHE=str(tmp_path / "cache"))
    Prefix(address).put_bytes("val-00000.tar", bytes(10_240))
    with pytest.raises(Refused, match=r"val-00000\.tar"):
        remote = storage.open_shards(address).split("val")
        [remote.read(number) for number in range(NUM_VAL)]


@pytest.mark.faults  # containers do, in tests/security/test_images.py
def test_the_train_program_reads_shards_from_a_store(
    shards: ShardSet, params_file: Path, tmp_path: Path, moto: Server, address: str
) -> None:
    small = {**TRAIN, "epochs": 1, "checkpoint_steps": 100}
    params_file.write_text(json.dumps({**json.loads(params_file.read_text()), "train": small}))
    upload(shards, address)
    words = [address if word == tmp_path / "shards" else word for word in flags("train", tmp_path, params_file)]
    done = program("train", *words, cwd=tmp_path, **moto.env(VGG_CACHE=str(tmp_path / "cache")))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "m/train.json").read_text())["weights_sha256"]
