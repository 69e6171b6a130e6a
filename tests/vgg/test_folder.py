"""Folders of images as people have them: links, files that no one means, odd entries."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import NUM_TRAIN, NUM_VAL, SHARD, draw, flags, program

from runtime import manifest
from runtime.errors import BadData
from runtime.shards.shardset import ShardSet
from runtime.targets import Directory
from vgg.params.shard import ShardParams
from vgg.sharding.pack import pack
from vgg.sharding.sources import Folder


def packed(images: Path, shards: Path, **changes: object) -> dict[str, object]:
    return pack(ShardParams(**{**SHARD, **changes}), Folder(images), Directory(shards), "c", num_workers=1)


def test_links_to_images_give_the_shards_of_the_images(images: Path, shards: ShardSet, tmp_path: Path) -> None:
    """One class as a Hugging Face snapshot (relative links to blobs), one as a link, one with a linked subfolder."""
    plain = {path.relative_to(images): path.read_bytes() for path in images.rglob("*.jpg")}
    linked = tmp_path / "snapshots" / "main"
    for path, data in plain.items():
        blob = tmp_path / "blobs" / str(abs(hash(path)))
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(data)
        if path.parts[1] == "cat":
            (linked / path).parent.mkdir(parents=True, exist_ok=True)
            (linked / path).symlink_to(os.path.relpath(blob, (linked / path).parent))
    for split in ("train", "val"):
        (linked / split / "dog").symlink_to(images / split / "dog")
        (linked / split / "emu").symlink_to(images / split / "emu")
    source = Folder(linked)
    assert source.linked_folders == [f"{split}/{name}" for split in ("train", "val") for name in ("dog", "emu")]
    packed(linked, tmp_path / "again")
    for path in shards.directory.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_linked_subfolders_are_read_and_loops_are_named(images: Path, tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "more.jpg", 99)
    cat = images / "train" / "cat"
    (cat / "more").symlink_to(tmp_path / "elsewhere")
    assert packed(images, tmp_path / "a")["splits"]["train"]["num_images"] == NUM_TRAIN + 1  # type: ignore[index]
    (cat / "again").symlink_to(cat)
    (tmp_path / "elsewhere" / "up").symlink_to(images / "train")
    (cat / "self.jpg").symlink_to("self.jpg")
    (images / "train" / "class").symlink_to(".")
    (images / "train" / "gone").symlink_to("nowhere")
    with pytest.raises(BadData) as caught:
        packed(images, tmp_path / "b")
    found = dict(line.split(": ", 1) for line in caught.value.everything)
    assert found.pop("train/cat/self.jpg") == "cannot be read: Too many levels of symbolic links"
    assert found.pop("train/cat/again") == "a link to a folder that holds it"
    assert found.pop("train/cat/more/up") == "a link to a folder that holds it"
    assert found.pop("train/class") == "a link to a folder that holds it"
    assert found == {"train/gone": "a link to nothing"}


def test_a_change_of_the_target_of_a_link_is_noticed(images: Path, tmp_path: Path) -> None:
    image, blob = images / "train" / "cat" / "0000.jpg", tmp_path / "blob"
    image.rename(blob)
    image.symlink_to(blob)
    stamps = []
    for _ in range(2):
        stamps.append({o.name: o.stamp for o in Folder(images).originals("train")})
        draw(tmp_path / "blob.jpg", 123)
        (tmp_path / "blob.jpg").rename(blob)
    assert [name for name in stamps[0] if stamps[0][name] != stamps[1][name]] == ["train/cat/0000.jpg"]


@pytest.mark.faults
def test_links_of_dvc_s_cache_are_followed(images: Path, shards: ShardSet, tmp_path: Path) -> None:
    """dvc add with cache.type symlink replaces every image by a link into .dvc/cache."""

    def dvc(*words: str) -> None:
        subprocess.run(["dvc", *words], cwd=tmp_path, check=True, capture_output=True, timeout=60)

    dvc("init", "--no-scm", "-q")
    dvc("config", "core.analytics", "false")
    dvc("config", "cache.type", "symlink")
    dvc("add", "-q", "images")
    assert all(path.is_symlink() for path in images.rglob("*.jpg"))
    made = packed(images, tmp_path / "again")
    assert made["images_sha256"] == shards.manifest["images_sha256"]


def test_files_that_no_one_means_are_passed_over_and_counted(
    images: Path, shards: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notes = ["Thumbs.db", "cat/Thumbs.db", "cat/desktop.ini", "cat/.DS_Store", "cat/._0000.jpg", "cat/a.TXT"]
    notes += ["labels.csv", "cat/0000.xml", "dog/annotation.json", "README.md"]
    for name in notes:
        (images / "train" / name).write_text("no image")
    (images / "train" / ".cache").mkdir()
    (images / "train" / ".cache" / "x.jpg").write_text("no image")
    with caplog.at_level("INFO"):
        made = packed(images, tmp_path / "again")
    counts = {".*": 3, ".csv": 1, ".db": 2, ".ini": 1, ".json": 1, ".md": 1, ".txt": 1, ".xml": 1}
    assert made["source"] == {"passed_over": counts}
    assert "11 files passed over, never images: 3 .*, 1 .csv, 2 .db" in caplog.text
    for path in shards.directory.iterdir():
        assert path.name == manifest.NAME or (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_all_findings_come_together_and_quarantine_gets_past_odd_entries(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged image, an image beside the class folders, an empty folder like an image, an empty class."""
    (images / "train" / "cat" / "0000.jpg").write_bytes(b"")
    (images / "train" / "stray.jpg").write_bytes(b"")
    (images / "train" / "x.jpg").mkdir()
    (images / "val" / "yak").mkdir()
    odd = {
        "train/stray.jpg: not in a class folder", "train/x.jpg: a folder without images",
        "val/yak: a folder without images", "train/cat/0000.jpg: empty file",
    }  # fmt: skip
    lenient = {"on_bad_image": "quarantine", "max_quarantined": 4}
    with pytest.raises(BadData, match="4 unusable images") as caught:
        packed(images, tmp_path / "shards")
    assert set(caught.value.everything) == odd
    made = packed(images, tmp_path / "shards", **lenient)
    assert {f"{item['name']}: {item['reason']}" for item in made["quarantined"]} == odd  # type: ignore[attr-defined]
    assert [c["wnid"] for c in made["classes"]] == ["cat", "dog", "emu"]  # type: ignore[attr-defined]
    assert ShardSet(tmp_path / "shards").split("train").rows["label"].max() == 2
    draw(images / "train" / "yak" / "1.jpg", 1)  # now it is a class, which nothing measures
    caplog.clear()
    with pytest.raises(BadData, match="1 class without a usable image, 3 unusable images") as caught:
        packed(images, tmp_path / "shards", **lenient)
    assert caplog.messages[0].startswith("faults of the layout, before images are checked:\n  val/yak: no usable")
    assert set(caught.value.everything) == {"val/yak: no usable image of this class"} | odd - {
        "val/yak: a folder without images"
    }
    assert "quarantine" not in str(caught.value)


def test_a_class_of_unusable_images_is_refused_also_in_quarantine(images: Path, tmp_path: Path) -> None:
    for path in (images / "train" / "emu").iterdir():
        path.write_bytes(b"")
    with pytest.raises(BadData, match="train/emu: no usable image of this class"):
        packed(images, tmp_path / "shards", on_bad_image="quarantine", max_quarantined=100)
    assert not (tmp_path / "shards" / manifest.NAME).exists()


def test_a_flat_val_is_one_short_message_and_a_file(images: Path, params_file: Path, tmp_path: Path) -> None:
    shutil.rmtree(images / "val")
    (images / "val").mkdir()
    for number in range(3000):
        (images / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").touch()
    done = program("shard", *flags("shard", tmp_path, params_file), cwd=tmp_path)
    assert done.returncode == 65
    assert len(done.stderr) < 1500, done.stderr
    assert "and 2,995 more\nAll 3,000 are listed in " in done.stderr
    whole = tmp_path / "shards.findings.txt"
    assert done.stderr.rstrip().endswith(str(whole))
    lines = whole.read_text().splitlines()
    assert len(lines) == 3000
    assert lines[-1] == "val/ILSVRC2012_val_00002999.JPEG: not in a class folder"
    for name in os.listdir(images / "val"):
        (images / "val" / name).unlink()
    for name in ("cat", "dog", "emu"):
        draw(images / "val" / name / "1.jpg", 1)
    done = program("shard", *flags("shard", tmp_path, params_file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not whole.exists()
    assert json.loads((tmp_path / "m" / "shard.json").read_bytes())["num_val"] == 3 < NUM_VAL


def test_a_pickled_folder_is_small(images: Path) -> None:
    source = Folder(images)
    original = source.originals("val")[0]
    again = pickle.dumps(source)
    assert len(again) < 500
    assert pickle.loads(again).read(original) == source.read(original)
