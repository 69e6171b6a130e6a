"""Stage 1: no image is lost, every bad one is reported, the bytes are always the same."""

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from conftest import NUM_TRAIN, NUM_VAL, SHARD, draw, environment, flags, photograph, program
from PIL import Image

from runtime import manifest
from runtime.errors import BadData, StorageFailure, WrongParameters
from runtime.shards.shardset import ShardSet
from runtime.targets import Directory
from vgg.data.images import decode
from vgg.params.shard import ShardParams
from vgg.sharding.inspect import inspect
from vgg.sharding.pack import member_head, pack, padding
from vgg.sharding.sources import Digits, Folder, Original


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_webdataset_reads_what_the_index_says(shards: ShardSet, images: Path) -> None:
    assert [len(shards.split(name)) for name in ("train", "val")] == [NUM_TRAIN, NUM_VAL]
    for name in ("train", "val"):
        split, seen = shards.split(name), []
        urls = [str(shards.directory / entry["path"]) for entry in split.shards]
        for number, sample in enumerate(webdataset.WebDataset(urls, shardshuffle=False)):
            row = split.rows[number]
            assert sample["__key__"] == split.key(number)
            assert int(sample["cls"]) == row["label"]
            assert sample["jpg"] == split.read(number)
            picture = Image.open(io.BytesIO(sample["jpg"]))
            assert picture.size == (row["width"], row["height"])
            wnid, stem = sample["__key__"].split("_")
            assert sample["jpg"] == (images / name / wnid / f"{stem}.jpg").read_bytes()  # the original bytes
            seen.append(sample["__key__"])
        assert len(set(seen)) == len(seen) == len(split)


def test_same_bytes_for_any_number_of_workers(shards: ShardSet, images: Path, tmp_path: Path) -> None:
    os.umask(0o077)
    try:
        pack(ShardParams(**SHARD), Folder(images), Directory(tmp_path / "again"), "other code", num_workers=3)
    finally:
        os.umask(0o022)
    assert contents(tmp_path / "again") == contents(shards.directory)


def test_mean_and_deviation_are_those_of_all_pixels(shards: ShardSet) -> None:
    split = shards.split("train")
    pixels = np.concatenate([np.asarray(decode(split.read(i), 10**6)).reshape(-1, 3) for i in range(len(split))])
    assert shards.mean == pytest.approx(pixels.mean(0), abs=1e-3)
    assert shards.std == pytest.approx(pixels.std(0), abs=1e-3)


def test_large_images_count_for_the_deviation_by_every_15th_row(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name, seed in (("cat", 1), ("dog", 2)):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            photograph((300, 201), seed).save(tmp_path / "images" / split / name / "a.jpg", quality=95)
    pack(ShardParams(**SHARD), Folder(tmp_path / "images"), Directory(tmp_path / "shards"), "c", num_workers=1)
    found = ShardSet(tmp_path / "shards")
    images = [np.asarray(decode(found.split("train").read(i), 10**6)) for i in range(2)]
    pixels, some = (np.concatenate([image[::step].reshape(-1, 3) for image in images]) for step in (1, 15))
    assert found.mean == pytest.approx(pixels.mean(0), abs=1e-3)
    assert found.std == pytest.approx(some.std(0), abs=1e-3)
    assert found.std == pytest.approx(pixels.std(0), rel=0.05)


def test_all_bad_files_are_listed_with_reasons(images: Path, tmp_path: Path) -> None:
    cat = images / "train" / "cat"
    whole = (cat / "0000.jpg").read_bytes()
    (cat / "cut.jpg").write_bytes(whole[: len(whole) * 8 // 10])
    (cat / "empty.jpg").write_bytes(b"")
    (cat / "notes.jpg").write_text("not an image")
    os.mkfifo(cat / "fifo.jpg")
    (cat / "away.jpg").symlink_to("/etc/hostname")
    (cat / "gone.jpg").symlink_to("nowhere")
    draw(cat / "large.png", 1, (1001, 1000))
    with pytest.raises(BadData) as caught:
        pack(ShardParams(**SHARD), Folder(images), Directory(tmp_path / "shards"), "c", num_workers=1)
    message = str(caught.value)
    for name, reason in (
        ("cut.jpg", "damaged: Premature end of JPEG file"),
        ("empty.jpg", "empty file"),
        ("notes.jpg", "not an image"),
        ("fifo.jpg", "not a regular file"),
        ("away.jpg", "not an image"),  # links are followed
        ("gone.jpg", "a link to nothing: nowhere"),
        ("large.png", "more than 1,000,000 pixels"),
    ):
        assert any(name in line and reason in line for line in caught.value.everything), (name, message)
    assert message.startswith("7 unusable images (0 allowed):\n  train/cat/")
    assert message.splitlines()[6].strip() == "and 2 more"
    assert not (tmp_path / "shards" / manifest.NAME).exists()

    lenient = {**SHARD, "on_bad_image": "quarantine", "max_quarantined": 7}
    made = pack(ShardParams(**lenient), Folder(images), Directory(tmp_path / "shards"), "c", num_workers=1)
    assert made["splits"]["train"]["num_images"] == NUM_TRAIN
    assert len(made["quarantined"]) == 7
    with pytest.raises(BadData, match=r"6 allowed(.|\n)*or set shard.max_quarantined: 7\."):
        pack(
            ShardParams(**{**lenient, "max_quarantined": 6}),
            Folder(images),
            Directory(tmp_path / "shards"),
            "c",
            num_workers=1,
        )


def test_unusual_images_are_recoded_and_listed(images: Path, tmp_path: Path) -> None:
    dog = images / "train" / "dog"
    picture = Image.open(dog / "0001.jpg")
    picture.convert("CMYK").save(dog / "cmyk.jpg")
    picture.save(dog / "disguise.jpg", "PNG")
    picture.convert("L").save(dog / "grey.jpg")
    picture.save(dog / "progressive.jpg", progressive=True)
    made = pack(ShardParams(**SHARD), Folder(images), Directory(tmp_path / "shards"), "c", num_workers=1)
    assert {(item["key"], item["reason"]) for item in made["amended"]} == {
        ("dog_cmyk", "CMYK JPEG re-coded as RGB"),
        ("dog_disguise", "PNG re-coded as JPEG"),
    }
    split = ShardSet(tmp_path / "shards").split("train")
    for number in range(len(split)):
        opened = Image.open(io.BytesIO(split.read(number)))
        assert opened.format == "JPEG"
        assert opened.mode in ("RGB", "L")


def test_a_damaged_manifest_of_an_earlier_run_is_replaced(images: Path, shards: ShardSet) -> None:
    path, expected = shards.directory / manifest.NAME, contents(shards.directory)
    path.write_bytes(path.read_bytes().replace(b"folder", b"digits"))
    pack(ShardParams(**SHARD), Folder(images), Directory(shards.directory), "test", num_workers=1)
    assert contents(shards.directory) == expected


def test_any_name_becomes_a_plain_unique_key(images: Path, tmp_path: Path) -> None:
    emu = images / "train" / "emu"
    names = ["a.b.c.jpg", "ä ö.jpg", "same.jpg", "same.png", "SAME.jpg", "x" * 200 + ".jpg", "%s{key}.jpg"]
    for i, name in enumerate(names):
        draw(emu / name, 50 + i)
    made = pack(ShardParams(**SHARD), Folder(images), Directory(tmp_path / "shards"), "c", num_workers=1)
    split = ShardSet(tmp_path / "shards").split("train")
    keys = [split.key(number) for number in range(len(split))]
    assert len(set(keys)) == NUM_TRAIN + len(names)
    assert all("." not in key and key.isascii() for key in keys)
    renamed = set(made["renamed"].values())
    assert {f"train/emu/{name}" for name in names if name != "SAME.jpg"} == renamed


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("rm -r images/val/cat", "1 class without a usable image:\n  val/cat: no usable image of this class"),
        ("mkdir images/val/yak", "val/yak: a folder without images"),
        ("rm -r images/val", "no such folder"),
        ("rm images/train/cat/*", "train/cat: no usable image of this class"),
        ("rm -r images/*/cat images/*/dog", "holds 1 class folder; at least two are needed"),
        ("touch images/train/stray.jpg", "train/stray.jpg: not in a class folder"),
        ("mkdir images/train/cat/x.jpg", "train/cat/x.jpg: a folder, not an image"),
        (
            "chmod 0 images/train/cat; [ $UID = 0 ] && rm -r images/train/cat && ln -s cat images/train/cat",
            "train/cat: (Permission denied|a link to nothing)",
        ),
    ],
)
def test_wrong_folders_are_explained(change: str, expected: str, images: Path, tmp_path: Path) -> None:
    subprocess.run(["bash", "-c", change], cwd=tmp_path, check=True, timeout=10)
    with pytest.raises(BadData, match=expected):
        pack(ShardParams(**SHARD), Folder(images), Directory(tmp_path / "shards"), "c", num_workers=1)


def test_bad_data_is_exit_65_and_one_message(images: Path, params_file: Path, tmp_path: Path) -> None:
    (images / "train/cat/empty.jpg").touch()
    done = program("shard", *flags("shard", tmp_path, params_file), cwd=tmp_path)
    assert done.returncode == 65
    assert "train/cat/empty.jpg: empty file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "m").exists()


def test_images_in_both_splits_or_two_classes_are_reported(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    twin = images / "val" / "cat" / "0000.jpg"
    twin.write_bytes((images / "train" / "cat" / "0003.jpg").read_bytes())
    made = pack(ShardParams(**SHARD), Folder(images), Directory(tmp_path / "shards"), "c", num_workers=1)
    assert made["duplicates"] == [["train/cat_0003", "val/cat_0000"]]
    said = "1 image is in more than one %s (see 'duplicates' in the manifest): %s"
    assert said % ("split", "train/cat_0003 = val/cat_0000") in caplog.text
    assert "more than one class" not in caplog.text

    shutil.copy(twin, images / "train" / "dog" / "0000.jpg")
    pack(ShardParams(**SHARD), Folder(images), Directory(tmp_path / "again"), "c", num_workers=1)
    assert said % ("class", "train/cat_0003 = train/dog_0000 = val/cat_0000") in caplog.text


def test_digits_are_the_same_everywhere() -> None:
    digits = Digits()
    counts = {split: len(digits.originals(split)) for split in ("train", "val")}
    assert counts == {"train": 1501, "val": 296}
    for split in counts:
        labels = np.bincount([o.label for o in digits.originals(split)])
        assert labels.max() - labels.min() <= (9 if split == "train" else 2)  # 174 to 183 of a digit
    picture = Image.open(io.BytesIO(digits.read(digits.originals("val")[0])))
    assert (picture.size, picture.mode) == ((32, 32), "RGB")


def test_a_folder_with_other_files_is_not_touched(images: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "backup.tar").write_text("precious")
    with pytest.raises(WrongParameters, match=r"holds backup\.tar, which is not written by this stage"):
        pack(ShardParams(**SHARD), Folder(images), Directory(tmp_path / "shards"), "c", num_workers=1)
    assert contents(tmp_path / "shards") == {"backup.tar": b"precious"}
    manifest.write(tmp_path / "model", "vgg.checkpoint/1", {}, [])
    with pytest.raises(WrongParameters, match=r"holds manifest\.json"):
        pack(ShardParams(**SHARD), Folder(images), Directory(tmp_path / "model"), "c", num_workers=1)


def test_what_others_leave_hidden_in_the_folder_is_no_obstacle(images: Path, tmp_path: Path) -> None:
    """Finder, Jupyter when one looks into it, NFS when a deleted file is still open."""
    for _ in range(2):  # into an empty folder, and over finished shards
        (tmp_path / "shards/.ipynb_checkpoints").mkdir(parents=True, exist_ok=True)
        for name in (".DS_Store", ".nfs000000000a4c9d00005011"):
            (tmp_path / "shards" / name).touch()
        pack(ShardParams(**SHARD), Folder(images), Directory(tmp_path / "shards"), "c", num_workers=1)
    assert len(list((tmp_path / "shards").glob(".*"))) == 3
    assert ShardSet(tmp_path / "shards").manifest["splits"]["train"]["num_images"] == 30


def test_workers_do_not_outlive_a_killed_parent(images: Path, params_file: Path, tmp_path: Path) -> None:
    """kill -9 of the program alone, not of its process group: another run may start at once."""
    command = [sys.executable, "-m", "components.shard", *map(str, flags("shard", tmp_path, params_file))]
    child = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("shards/*.receipt")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    child.kill()
    child.wait(10)
    done = program("shard", *flags("shard", tmp_path, params_file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    pytest.fail("processes of the killed run are still alive")


@pytest.mark.faults
def test_killed_at_any_moment_and_run_again(images: Path, params_file: Path, shards: ShardSet, tmp_path: Path) -> None:
    """kill -9 at five moments: finished shards are kept, and the result equals an uninterrupted run."""
    expected = contents(shards.directory)
    target = tmp_path / "killed"
    arguments = [str(target) if a == tmp_path / "shards" else str(a) for a in flags("shard", tmp_path, params_file)]
    command = [sys.executable, "-m", "components.shard", *arguments]
    for tars in (0, 1, 3, 5, 6):
        child = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while len(list(target.glob("*.receipt"))) < tars and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait(10)
        kept = {path.name: path.stat().st_mtime_ns for path in target.glob("*.tar")}
        assert all(expected[name] == (target / name).read_bytes() for name in kept), "a partial shard is visible"
    done = program("shard", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(target) == expected
    assert any((target / name).stat().st_mtime_ns == kept[name] for name in kept), "finished shards were written again"


def test_unused_shards_are_closed(shards: ShardSet) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        split = ShardSet(shards.directory).split("train")
        split.read(0), split.read(len(split) - 1)
    del split
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(("name", "size"), [("a.jpg", 0), ("n01440764_10026.jpg", 110_123), ("x" * 96 + ".cls", 512)])
def test_members_equal_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    expected = info.tobuf(tarfile.USTAR_FORMAT) + b"x" * size + bytes(-size % 512)
    assert member_head(name, size) + b"x" * size + padding(size) == expected


@pytest.mark.parametrize(("size", "step"), [((1, 1), 1), ((33, 127), 1), ((33, 128), 15), ((1203, 799), 15)])
def test_sums_of_an_image_are_exact(size: tuple[int, int], step: int) -> None:
    file = io.BytesIO()
    photograph(size).save(file, "JPEG", quality=95)
    found = inspect(file.getvalue(), 10**6)
    rows = np.asarray(Image.open(file).convert("RGB")).astype(np.int64)
    pixels, some = rows.reshape(-1, 3), rows[::step].reshape(-1, 3)
    assert found.sums.tolist() == [len(pixels), *pixels.sum(0), len(some), *some.sum(0), *(some**2).sum(0)]


def test_other_umask_locale_time_zone_and_hash_seed_give_the_same_bytes(
    images: Path, params_file: Path, shards: ShardSet, tmp_path: Path
) -> None:
    target = tmp_path / "a longer path" / "shards"
    words = [str(target) if a == tmp_path / "shards" else str(a) for a in flags("shard", tmp_path, params_file)]
    command = ["bash", "-c", 'umask 077; exec "$@"', "_", sys.executable, "-m", "components.shard", *words]
    env = environment(LC_ALL="tr_TR.UTF-8", TZ="Asia/Tokyo", PYTHONHASHSEED="11")
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(target) == contents(shards.directory)


class Deadly(Folder):
    def read(self, original: Original) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is short
        raise AssertionError


def test_a_killed_worker_is_exit_74(images: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageFailure, match="a packing process was killed"):
        pack(ShardParams(**SHARD), Deadly(images), Directory(tmp_path / "shards"), "c", num_workers=1)


def test_the_server_of_workers_dies_between_two_of_them(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in one of 200 runs on a busy machine: multiprocessing still believes that it runs."""
    server: Any = ForkServer()

    def is_believed_to_run() -> None:
        if server._forkserver_pid is None:
            ForkServer.ensure_running(server)
        else:
            os.kill(server._forkserver_pid, signal.SIGKILL)
            os.waitid(os.P_PID, server._forkserver_pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(server, "ensure_running", is_believed_to_run)
    monkeypatch.setattr("multiprocessing.forkserver.connect_to_new_process", server.connect_to_new_process)
    with pytest.raises(StorageFailure, match="a packing process was killed or crashed"):
        pack(ShardParams(**SHARD), Folder(images), Directory(tmp_path / "shards"), "c", num_workers=2)
    assert not (tmp_path / "shards/manifest.json").exists()
    os.waitpid(server._forkserver_pid, 0)


def test_without_space_for_all_shards_nothing_is_started(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Directory(tmp_path / "shards")
    monkeypatch.setattr(Directory, "free_bytes", lambda self: 12_345)
    with pytest.raises(StorageFailure, match=r"the shards need about [\d,]+ bytes, 12,345 are free"):
        pack(ShardParams(**SHARD), Folder(images), target, "c", num_workers=1)
    assert contents(tmp_path / "shards") == {}


def test_a_full_disk_is_exit_74_and_the_next_run_continues(
    images: Path, params_file: Path, shards: ShardSet, tmp_path: Path
) -> None:
    """A file system that fills up while shards are written: visible shards are complete."""
    full = tmp_path / "full"
    full.mkdir()
    words = [str(full / "s") if a == tmp_path / "shards" else str(a) for a in flags("shard", tmp_path, params_file)]
    program_line = shlex.join([sys.executable, "-m", "components.shard", *words])
    images_bytes = sum(path.stat().st_size + 2048 for path in images.rglob("*.jpg"))  # what packing requires
    script = f"""
        mount -t tmpfs -o size=64m tmpfs {full} && mkdir {full}/s
        head -c $((64 * 1048576 - {images_bytes} - 12288)) /dev/zero > {full}/ballast
        {program_line}; echo "code $?"
        shopt -s nullglob
        ls {full}/s
        for tar in {full}/s/*.tar; do cmp $tar {shards.directory}/$(basename $tar) || echo PARTIAL; done
        rm {full}/ballast
        {program_line}; echo "code $?"
        diff -r {full}/s {shards.directory} && echo same
    """
    inside = ["unshare", "-rm", "bash", "-c", script]
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, timeout=10).returncode:
        pytest.skip("mount namespaces are not allowed here")
    done = subprocess.run(inside, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    assert "code 74" in done.stdout, output
    assert re.search(r"No space left on device \(\d[\d,]* bytes free\)", done.stderr), output
    assert re.search(r"The remaining shards need about \d[\d,]* bytes", done.stderr), output
    assert ".tar" in done.stdout, "it failed before the first shard"
    assert "Traceback" not in done.stderr
    assert "PARTIAL" not in done.stdout, output
    assert done.stdout.rstrip().endswith("same"), output
