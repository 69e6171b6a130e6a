"""Checkpoints and predictions in an object store: kept step by step, continued on another node, never trusted."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from conftest import TRAIN, environment, flags, program
from faultproxy import FaultProxy
from s3servers import Server, address, moto, moto_server, rclone_server, server, use  # noqa: F401  # fixtures

from components.train.__main__ import expect_run
from runtime import manifest
from runtime.errors import Refused, Unreachable
from runtime.shardset import ShardSet
from runtime.store.mirror import Mirror, at, fetched
from runtime.store.s3 import Prefix
from vgg.network.trained import Trained

SCHEMA = "test/1"


def make(kept: Mirror, **files: bytes) -> None:
    for name, data in files.items():
        path = kept.directory / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    names = sorted(name.replace("__", "/") for name in files)
    manifest.write(kept.directory, SCHEMA, {}, [manifest.file_entry(kept.directory, name) for name in names])


def test_a_directory_is_the_same_on_another_node(
    server: Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-1"))
    sent = Mirror(address)
    make(sent, a=b"1" * 1000, deep__b=b"2" * 10)
    sent.send()
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-2"))
    found = fetched(address)
    assert found != sent.directory
    for path in ("a", "deep/b", manifest.NAME):
        assert (found / path).read_bytes() == (sent.directory / path).read_bytes()


def test_what_is_damaged_unfinished_or_leads_outside_is_refused(
    moto: Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-1"))
    with pytest.raises(Refused, match="not finished"):
        fetched(address)
    sent = Mirror(address)
    make(sent, a=b"1" * 1000)
    sent.send()
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-2"))
    Prefix(address).put_bytes("a", b"1" * 999 + b"2")
    with pytest.raises(Refused, match=r"/a: does not have the sha256"):
        fetched(address)
    entry = {"path": "../../evil", "size": 4, "sha256": "0" * 64}
    Prefix(address).put_bytes("evil", b"evil")
    Prefix(address).put_bytes(manifest.NAME, manifest.text(manifest.compose(SCHEMA, {}, [entry])))
    with pytest.raises(Refused, match="lies outside"):
        fetched(address)
    assert not list(tmp_path.rglob("evil*"))


@pytest.fixture
def words(shards: ShardSet, params_file: Path, tmp_path: Path, address: str) -> list[str]:
    """Of the train program: three epochs, checkpoints in the store."""
    longer = {**TRAIN, "epochs": 3, "checkpoint_steps": 2}
    params_file.write_text(json.dumps({**json.loads(params_file.read_text()), "train": longer}))
    if not (tmp_path / "shards").exists():
        (tmp_path / "shards").symlink_to(shards.directory)
    return [
        f"{address}/model" if word == tmp_path / "model" else str(word)
        for word in flags("train", tmp_path, params_file)
    ]


@pytest.mark.faults  # in every change's suite this is done to a container (tests/security/test_images.py)
def test_training_goes_on_elsewhere_from_what_the_store_has(
    moto: Server, address: str, words: list[str], shards: ShardSet, params_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed on one node as soon as a checkpoint is kept, continued on another: the network of an undisturbed run."""
    place = Prefix(f"{address}/model")
    running = subprocess.Popen(
        [sys.executable, "-m", "components.train", *words],
        cwd=tmp_path, env=environment(**moto.env(VGG_CACHE=str(tmp_path / "node-1"))), stderr=subprocess.PIPE,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not any(place.head(f"{name}/manifest.json") for name in place.folders()):
        assert time.monotonic() < until and running.poll() is None, running.stderr and running.stderr.read()
        time.sleep(0.02)
    running.kill()
    running.wait(10)
    place.delete(".lease")  # or the next would wait a minute for it
    done = program("train", *words, cwd=tmp_path, **moto.env(VGG_CACHE=str(tmp_path / "node-2")))
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stderr
    alone = program("train", *flags("train", tmp_path, params_file), cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-3"))
    found = Trained.open(fetched(f"{address}/model"))
    assert found.weights_sha256 == Trained.open(tmp_path / "model").weights_sha256
    assert found.digest == Trained.open(tmp_path / "model").digest
    assert place.folders() == sorted({found.manifest["last"], found.manifest["best"]})

    # another start finds it finished; --finished only writes what is asked for, and only of this training
    for name in ("curves.csv", "train.json"):
        (tmp_path / "m" / name).rename(tmp_path / name)
    done = program("train", *words, "--finished", cwd=tmp_path, **moto.env(VGG_CACHE=str(tmp_path / "node-4")))
    assert done.returncode == 0, done.stderr
    for name in ("curves.csv", "train.json"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / name).read_bytes()
    run = found.manifest["run"]
    wanted = {"train": {**run["train"], "seed": 9}, "initial": run["initial"], "code": run["code"]}
    with pytest.raises(Refused, match=r"train\.seed: 1 there, 9 here"):
        expect_run(found, wanted, shards.digest)


def make_step(kept: Mirror, step: int, best: int) -> None:
    folder = kept.directory / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(bytes([step]) * 100)
    (folder / "state.json").write_text(json.dumps({"step": step, "best_step": best}))
    names = ("weights.safetensors", "state.json")
    manifest.write(folder, SCHEMA, {}, [manifest.file_entry(folder, name, md5=False) for name in names])


def test_a_damaged_checkpoint_in_the_store_is_passed_over(
    server: Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest arrives with other bytes: it is named, the one before is brought, and the best that it speaks of."""
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-1"))
    kept = Mirror(address)
    for step in (2, 4, 6, 8):
        make_step(kept, step, best=2)
    kept.upload_checkpoints()
    shutil.rmtree(kept.directory / "step-00000004")  # as training does
    kept.upload_checkpoints()
    assert kept.remote.folders() == ["step-00000002", "step-00000006", "step-00000008"]
    kept.remote.put_bytes("step-00000008/weights.safetensors", b"0" * 100)
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-2"))
    other = at(address)
    other.download_checkpoints()
    whole = sorted(path.parent.name for path in other.directory.glob("step-*/manifest.json"))
    assert whole == ["step-00000002", "step-00000006"]
    assert f"checkpoint refused: {address}/step-00000008" in caplog.text
    other.upload_checkpoints(only_add=True)  # before it is known whose they are
    assert other.remote.folders() == ["step-00000002", "step-00000006", "step-00000008"]


def test_what_arrives_in_part_is_no_obstacle(
    moto: Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that breaks off leaves nothing in the checkpoint's folder, and what is there in part is not sent."""
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-1"))
    kept = Mirror(address)
    make_step(kept, 2, best=2)
    kept.upload_checkpoints()
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-2"))
    other = Mirror(address)

    def breaks_off(entry: dict[str, Any], file: BinaryIO) -> None:
        file.write(b"half")
        raise Unreachable("the store went away")

    with monkeypatch.context() as away:
        away.setattr(other.remote, "fetch", breaks_off)
        with pytest.raises(Unreachable):
            other.download_checkpoints()
    assert not [path for path in other.directory.rglob("*") if path.is_file()]
    (other.directory / "step-00000002").mkdir(parents=True)
    (other.directory / "step-00000002/state.json").write_text("half")
    other.upload_checkpoints()
    assert other.remote.folders() == ["step-00000002"]
    other.download_checkpoints()
    brought = sorted(path.name for path in (other.directory / "step-00000002").iterdir())
    assert brought == ["manifest.json", "state.json", "weights.safetensors"]


def test_another_run_takes_the_place_of_a_finished_one(
    moto: Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest goes first: it would vouch for checkpoints that are no longer there."""
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-1"))
    kept = Mirror(address)
    make_step(kept, 8, best=8)
    names = [f"step-00000008/{name}" for name in ("weights.safetensors", "state.json", "manifest.json")]
    manifest.write(kept.directory, SCHEMA, {}, [manifest.file_entry(kept.directory, name) for name in names])
    kept.send()
    kept.directory.rename(tmp_path / "previous")  # as training does with what is another's
    make_step(kept, 2, best=2)
    kept.upload_checkpoints()
    assert kept.remote.get(manifest.NAME) is None
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-2"))
    other = Mirror(address)
    other.download_checkpoints()
    assert [path.name for path in other.directory.glob("step-*")] == ["step-00000002"]


@pytest.mark.faults
def test_a_store_that_is_away_stops_no_training(moto: Server, address: str, words: list[str], tmp_path: Path) -> None:
    """Nothing can be kept: said; training ends all the same, then 69; the next start has only to send it."""
    cache = str(tmp_path / "node-1")
    with FaultProxy(moto.endpoint, 1, 0.0) as proxy:
        env = moto.env(AWS_ENDPOINT_URL=proxy.endpoint, VGG_CACHE=cache, VGG_S3_PATIENCE_SECONDS="1")
        running = subprocess.Popen(
            [sys.executable, "-m", "components.train", *words], cwd=tmp_path, env=environment(**env),
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        place, until = Prefix(f"{address}/model"), time.monotonic() + 60
        while not list((tmp_path / "node-1/work").glob("*/step-*")):
            assert time.monotonic() < until and running.poll() is None, running.stderr and running.stderr.read()
            time.sleep(0.02)
        proxy.probability = 1.0
        said = running.communicate(timeout=120)[1]
    assert running.returncode == 69, said
    assert "in " + cache in said and "alone" in said
    assert place.get("manifest.json") is None
    place.delete(".lease")
    done = program("train", *words, cwd=tmp_path, **moto.env(VGG_CACHE=cache))
    assert done.returncode == 0, done.stderr
    assert place.get("manifest.json") is not None
