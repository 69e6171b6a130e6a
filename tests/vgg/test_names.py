"""Names of classes and files: judged once, before any work; what is allowed survives every locale and every writer."""

from __future__ import annotations

import csv
import html
import io
import json
import os
from pathlib import Path

import pytest
from conftest import SHARD, draw, draw_images, flags, program
from trainings import run

from runtime.errors import BadData
from runtime.shards.shardset import ShardSet
from runtime.targets import Directory
from vgg.params.shard import ShardParams
from vgg.sharding.names import escaped, local, text
from vgg.sharding.pack import pack
from vgg.sharding.sources import Folder

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ALLOWED = ["-1", 'Größe "5", $\\frac$, ' + 150 * "x", "été; <b>&amp;", "猫 🐈\u200d⬛"]


def rename(images: Path, old: str, new: str | bytes) -> None:
    """Rename a class folder in both splits."""
    for split in ("train", "val"):
        os.rename(os.fsencode(images / split / old), os.fsencode(images / split) + b"/" + os.fsencode(new))


def refusal(images: Path, tmp_path: Path) -> str:
    with pytest.raises(BadData) as caught:
        pack(ShardParams(**SHARD), Folder(images), Directory(tmp_path / "shards"), "c", num_workers=1)
    assert not list((tmp_path / "shards").glob("*.tar"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"caf\xe9", r"'train/caf\xe9': not UTF-8"),
        ("two\nlines", r"'train/two\nlines': holds control characters"),
        ("ta\tb", r"'train/ta\tb': holds control characters"),
        ("right\u202eleft", r"'train/right\u202eleft': holds control characters"),
        ("line\u2028separator", r"'train/line\u2028separator': holds control characters"),
        (" cat", "'train/ cat': begins or ends with a space"),
        ("cat\u3000", r"'train/cat\u3000': begins or ends with a space"),
        ('=HYPERLINK("http:cat")', """class '=HYPERLINK("http:cat")': spreadsheets take it for a formula"""),
        ("@cat", "class '@cat': spreadsheets take it for a formula"),
        ("-cat", "class '-cat': spreadsheets take it for a formula"),
        ("+1+cat", "class '+1+cat': spreadsheets take it for a formula"),
    ],
)
def test_unusable_class_names_are_refused_by_their_escaped_name(
    name: str | bytes, expected: str, images: Path, tmp_path: Path
) -> None:
    rename(images, "cat", name)
    message = refusal(images, tmp_path)
    assert f"\n  {expected}\n" in message
    assert message.isascii()


def test_every_finding_is_in_one_message(images: Path, tmp_path: Path) -> None:
    """Also when the names of the classes already differ between the splits."""
    os.rename(images / "train/cat", images / "train/caf\u00e9")
    os.rename(images / "val/cat", images / "val/cafe\u0301")
    os.rename(images / "train/dog/0001.jpg", os.fsencode(images / "train/dog") + b"/\xff.jpg")
    draw(images / "val/emu/u\u0308.jpg", 1)
    draw(images / "val/emu/\u00fc.jpg", 2)
    draw(images / "val/emu/end .jpg", 3)  # a space in the middle
    draw(images / "val/emu/bell\x07.jpg", 4)
    message = refusal(images, tmp_path)
    assert message.splitlines()[0] == "4 unusable names:"
    for line in (
        r"'caf\xe9' and 'cafe\u0301': the same name, composed differently",
        r"'train/dog/\xff.jpg': not UTF-8",
        r"'val/emu/bell\x07.jpg': holds control characters",
        r"'val/emu/\xfc.jpg' and 'val/emu/u\u0308.jpg': the same name, composed differently",
    ):
        assert f"\n  {line}\n" in message, message


def test_a_fault_of_a_class_is_reported_once_for_each_folder(images: Path, tmp_path: Path) -> None:
    rename(images, "cat", "cat ")
    assert refusal(images, tmp_path).count("'train/cat '") == 1
    assert refusal(images, tmp_path).startswith("2 unusable names:")


def test_the_program_refuses_a_name_that_is_not_utf8_in_every_locale(params_file: Path, tmp_path: Path) -> None:
    draw_images(tmp_path / "images")
    rename(tmp_path / "images", "cat", b"caf\xe9")
    done = program("shard", *flags("shard", tmp_path, params_file), cwd=tmp_path, **ASCII)
    assert done.returncode == 65
    assert r"'train/caf\xe9': not UTF-8" in done.stderr
    assert "Traceback" not in done.stderr


def test_names_are_bytes_in_every_locale() -> None:
    for name in (b"caf\xe9", "café".encode(), b"plain"):
        assert os.fsencode(local(text(name))) == name
        assert text(os.fsdecode(name)) == text(name)
    assert [escaped(text(name)) for name in (b"caf\xe9", "café".encode())] == [r"'caf\xe9'", r"'caf\xe9'"]


@pytest.mark.faults
def test_allowed_names_survive_sharding_and_evaluation_in_every_locale(params_file: Path, tmp_path: Path) -> None:
    """The real programs, under UTF-8 and under ASCII: one digest; then every table and page of the evaluation."""
    home = tmp_path / "größe"
    images = home / "images"
    draw_images(images)
    for old, new in zip(("cat", "dog", "emu"), ALLOWED[:3], strict=True):
        rename(images, old, new)
    for split in ("train", "val"):
        for number in range(3):
            draw(images / split / ALLOWED[3] / f"{number}é.jpg", 100 + number + (10 if split == "val" else 0))
    digests = set()
    for locale in ({}, ASCII):
        done = program("shard", *flags("shard", home, params_file), cwd=tmp_path, **locale)
        assert done.returncode == 0, done.stderr
        digests.add(ShardSet(home / "shards").digest)
        if not locale:
            os.rename(home / "shards", home / "first")
    assert len(digests) == 1
    shards = ShardSet(home / "shards")
    assert shards.wnids == sorted(ALLOWED)
    keys = [shards.split("val").key(number) for number in range(16)]
    assert all((key.isascii() and key[0].isalnum()) or key[0] == "_" for key in keys)

    run(shards, home / "model", epochs=1)
    done = program("evaluate", *flags("evaluate", home, params_file), cwd=tmp_path, **ASCII)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("its font lacks letters of the class names") == 1  # of the picture
    assert "Warning" not in done.stderr
    rows = list(csv.reader(io.StringIO((home / "m/confusion.csv").read_text(encoding="utf-8"))))
    assert rows[0] == ["actual", "predicted", "images"]
    assert sum(int(row[2]) for row in rows[1:]) == 16
    shown = {name: name.replace("_", " ").split(",")[0] for name in ALLOWED}
    labels = {name if "_" not in name else f"{name} {shown[name]}" for name in ALLOWED}
    assert {row[0] for row in rows[1:]} == labels
    assert {row[1] for row in rows[1:]} <= labels
    for name, width in (("confusion.csv", 3), ("mistakes.csv", 4)):
        table = list(csv.reader(io.StringIO((home / "predictions" / name).read_text(encoding="utf-8"))))
        assert {len(row) for row in table} == {width}
        assert {row[2] for row in table[1:]} <= set(ALLOWED)
    page = (home / "m/report.html").read_text(encoding="utf-8")
    assert "<b>&amp;" not in page
    for name in ALLOWED:
        assert html.escape(shown[name]) in page or html.escape(name) in page
    assert json.loads((home / "m/evaluate.json").read_text(encoding="utf-8"))["num_images"] == 16
