"""Checkpoints and predictions in an object store: uploaded one by one, continued on another node, always verified."""

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

from components.stage import Stage
from components.train.__main__ import expect_same_run, open_initial, parser
from runtime import manifest
from runtime.errors import Refused, Unreachable
from runtime.shards.shardset import ShardSet
from runtime.store.mirror import Mirror
from runtime.store.place import downloaded, output_at
from runtime.store.s3 import Prefix
from vgg.network.trained import Trained
from vgg.params.train import TrainParams

SCHEMA = "test/1"


def make(mirror: Mirror, **files: bytes) -> None:
    for name, data in files.items():
        path = mirror.directory / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    names = sorted(name.replace("__", "/") for name in files)
    manifest.write(mirror.directory, SCHEMA, {}, [manifest.file_entry(mirror.directory, name) for name in names])


def test_a_directory_is_the_same_on_another_node(
    server: Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-1"))
    sent = Mirror(address)
    make(sent, a=b"1" * 1000, deep__b=b"2" * 10)
    sent.upload()
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-2"))
    found = downloaded(address)
    assert found != sent.directory
    for path in ("a", "deep/b", manifest.NAME):
        assert (found / path).read_bytes() == (sent.directory / path).read_bytes()


def test_what_is_damaged_unfinished_or_leads_outside_is_refused(
    moto: Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-1"))
    with pytest.raises(Refused, match="not finished"):
        downloaded(address)
    sent = Mirror(address)
    make(sent, a=b"1" * 1000)
    sent.upload()
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-2"))
    Prefix(address).put_bytes("a", b"1" * 999 + b"2")
    with pytest.raises(Refused, match=r"/a: does not have the sha256"):
        downloaded(address)
    entry = {"path": "../../evil", "size": 4, "sha256": "0" * 64}
    Prefix(address).put_bytes("evil", b"evil")
    Prefix(address).put_bytes(manifest.NAME, manifest.text(manifest.compose(SCHEMA, {}, [entry])))
    with pytest.raises(Refused, match="which is outside"):
        downloaded(address)
    assert not list(tmp_path.rglob("evil*"))


@pytest.fixture
def words(shards: ShardSet, params_file: Path, tmp_path: Path, address: str) -> list[str]:
    """Arguments of the train program: three epochs, checkpoints in the store."""
    longer = {**TRAIN, "epochs": 3, "checkpoint_steps": 2}
    params_file.write_text(json.dumps({**json.loads(params_file.read_text()), "train": longer}))
    if not (tmp_path / "shards").exists():
        (tmp_path / "shards").symlink_to(shards.directory)
    return [
        f"{address}/model" if word == tmp_path / "model" else str(word)
        for word in flags("train", tmp_path, params_file)
    ]


@pytest.mark.faults  # containers do, in tests/security/test_images.py
def test_training_continues_on_another_node(
    moto: Server, address: str, words: list[str], shards: ShardSet, params_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed on one node after the first upload, continued on another: the weights of an undisturbed run."""
    remote = Prefix(f"{address}/model")
    running = subprocess.Popen(
        [sys.executable, "-m", "components.train", *words],
        cwd=tmp_path, env=environment(**moto.env(VGG_CACHE=str(tmp_path / "node-1"))), stderr=subprocess.PIPE,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not any(remote.head(f"{name}/manifest.json") for name in remote.folders()):
        assert time.monotonic() < until and running.poll() is None, running.stderr and running.stderr.read()
        time.sleep(0.02)
    running.kill()
    running.wait(10)
    remote.delete(".lease")  # or the next run waits a minute for it
    done = program("train", *words, cwd=tmp_path, **moto.env(VGG_CACHE=str(tmp_path / "node-2")))
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stderr
    alone = program("train", *flags("train", tmp_path, params_file), cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-3"))
    found = Trained.open(downloaded(f"{address}/model"))
    assert found.weights_sha256 == Trained.open(tmp_path / "model").weights_sha256
    assert found.digest == Trained.open(tmp_path / "model").digest
    assert remote.folders() == sorted({found.manifest["last"], found.manifest["best"]})

    # --finished only writes the outputs, and only of this training
    for name in ("curves.csv", "train.json"):
        (tmp_path / "m" / name).rename(tmp_path / name)
    done = program("train", *words, "--finished", cwd=tmp_path, **moto.env(VGG_CACHE=str(tmp_path / "node-4")))
    assert done.returncode == 0, done.stderr
    for name in ("curves.csv", "train.json"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / name).read_bytes()
    stage = Stage("train", parser().parse_args(words), TrainParams)
    stage.inputs["shards"] = shards.digest
    assert open_initial(stage) is None
    expect_same_run(found, stage)
    stage.params = stage.params.model_copy(update={"seed": 9})
    with pytest.raises(Refused, match=r"train\.seed: 1 there, 9 here"):
        expect_same_run(found, stage)


def make_step(mirror: Mirror, step: int, best: int) -> None:
    folder = mirror.directory / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(bytes([step]) * 100)
    (folder / "state.json").write_text(json.dumps({"step": step, "best_step": best}))
    names = ("weights.safetensors", "state.json")
    manifest.write(folder, SCHEMA, {}, [manifest.file_entry(folder, name, md5=False) for name in names])


def test_a_damaged_checkpoint_in_the_store_is_skipped(
    server: Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest arrives damaged: it is reported; the one before is downloaded, and the best one that it names."""
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-1"))
    mirror = Mirror(address)
    for step in (2, 4, 6, 8):
        make_step(mirror, step, best=2)
    mirror.upload_checkpoints()
    shutil.rmtree(mirror.directory / "step-00000004")  # as training does
    mirror.upload_checkpoints()
    assert mirror.remote.folders() == ["step-00000002", "step-00000006", "step-00000008"]
    mirror.remote.put_bytes("step-00000008/weights.safetensors", b"0" * 100)
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-2"))
    other = output_at(address)
    assert isinstance(other, Mirror)
    other.download_checkpoints()
    whole = sorted(path.parent.name for path in other.directory.glob("step-*/manifest.json"))
    assert whole == ["step-00000002", "step-00000006"]
    assert f"checkpoint refused: {address}/step-00000008" in caplog.text
    other.upload_checkpoints(only_add=True)  # before it is known which run they belong to
    assert other.remote.folders() == ["step-00000002", "step-00000006", "step-00000008"]


def test_a_partial_download_does_no_harm(
    moto: Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that breaks off leaves nothing in the checkpoint's folder, and a partial one is not uploaded."""
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-1"))
    mirror = Mirror(address)
    make_step(mirror, 2, best=2)
    mirror.upload_checkpoints()
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
    names = sorted(path.name for path in (other.directory / "step-00000002").iterdir())
    assert names == ["manifest.json", "state.json", "weights.safetensors"]


def test_another_run_replaces_a_finished_one(
    moto: Server, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest is deleted first, because it lists checkpoints that no longer exist."""
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-1"))
    mirror = Mirror(address)
    make_step(mirror, 8, best=8)
    names = [f"step-00000008/{name}" for name in ("weights.safetensors", "state.json", "manifest.json")]
    manifest.write(mirror.directory, SCHEMA, {}, [manifest.file_entry(mirror.directory, name) for name in names])
    mirror.upload()
    mirror.directory.rename(tmp_path / "previous")  # as training does with those of another run
    make_step(mirror, 2, best=2)
    mirror.upload_checkpoints()
    assert mirror.remote.get(manifest.NAME) is None
    monkeypatch.setenv("VGG_CACHE", str(tmp_path / "node-2"))
    other = Mirror(address)
    other.download_checkpoints()
    assert [path.name for path in other.directory.glob("step-*")] == ["step-00000002"]


@pytest.mark.faults
def test_an_unreachable_store_does_not_stop_training(
    moto: Server, address: str, words: list[str], tmp_path: Path
) -> None:
    """It warns and trains to the end, then exits with 69; the next start only uploads."""
    cache = str(tmp_path / "node-1")
    with FaultProxy(moto.endpoint, 1, 0.0) as proxy:
        env = moto.env(AWS_ENDPOINT_URL=proxy.endpoint, VGG_CACHE=cache, VGG_S3_PATIENCE_SECONDS="1")
        running = subprocess.Popen(
            [sys.executable, "-m", "components.train", *words], cwd=tmp_path, env=environment(**env),
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        remote, until = Prefix(f"{address}/model"), time.monotonic() + 60
        while not list((tmp_path / "node-1/work").glob("*/step-*")):
            assert time.monotonic() < until and running.poll() is None, running.stderr and running.stderr.read()
            time.sleep(0.02)
        proxy.probability = 1.0
        said = running.communicate(timeout=120)[1]
    assert running.returncode == 69, said
    assert "only in " + cache in said
    assert remote.get("manifest.json") is None
    remote.delete(".lease")
    done = program("train", *words, cwd=tmp_path, **moto.env(VGG_CACHE=cache))
    assert done.returncode == 0, done.stderr
    assert remote.get("manifest.json") is not None
