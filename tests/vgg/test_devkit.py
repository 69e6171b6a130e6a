"""ILSVRC editions and their devkits: a devkit that is damaged or of another year is refused."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from archives import (
    COST_2010,
    COUNTS_2012,
    LABELS_2010,
    LABELS_2012,
    SYNSETS_2010,
    SYNSETS_2012,
    Row,
    devkit,
    lines,
    message,
    meta_mat,
    tar,
    write_2010,
    write_2012,
)

from vgg.sharding.editions import EDITIONS
from vgg.sharding.ilsvrc import Archives


def test_the_editions_are_the_published_ones() -> None:
    """Counts from the devkits' readmes and the papers; md5s as in torchvision."""
    new, old = EDITIONS["ilsvrc2012"], EDITIONS["ilsvrc2010"]
    assert (new.num_classes, new.train.num_images, new.val.num_images, new.test) == (1000, 1_281_167, 50_000, None)
    assert (new.train.per_class, new.val.per_class) == ((732, 1300), (50, 50))
    assert new.devkit.md5 == "fa75699e90414af021442c21a62c3abf"
    assert new.train.archive.md5 == "1d675b47d978889d74fa0da5fadfb00e"
    assert new.val.archive.md5 == "29b22e2961454d5413ddabcf34fc5622"
    assert [archive.md5 for archive in new.boxes] == [
        "9271167e2176350e65cfe4e546f14b17",
        "f4cd18b5ea29fe6bbea62ec9c20d80f0",
    ]
    assert old.test
    assert old.patches
    assert (old.train.num_images, old.val.num_images, old.test.num_images) == (1_261_406, 50_000, 150_000)
    assert (old.train.per_class, old.val.per_class, old.test.per_class) == ((668, 3047), (50, 50), (150, 150))
    archives = (old.devkit, old.train.archive, old.val.archive, old.test.archive, old.patches)
    assert [archive.md5 for archive in archives] == [None] * 5


def rewritten(edition: str, meta: bytes, labels: bytes) -> bytes:
    return devkit("kit", edition, meta, labels)


def with_row(number: int, **changes: object) -> list[Row]:
    return [replace(row, **changes) if row.id == number else row for row in SYNSETS_2012]


GOOD_META = meta_mat("ILSVRC2012", SYNSETS_2012, COUNTS_2012)
GOOD_LABELS = lines(LABELS_2012)


@pytest.mark.parametrize(
    ("kit", "expected"),
    [
        (rewritten("ILSVRC2012", meta_mat("ILSVRC2014", SYNSETS_2012, COUNTS_2012), GOOD_LABELS), "no ILSVRC2012_ID"),
        (rewritten("ILSVRC2010", GOOD_META, GOOD_LABELS), "data/ILSVRC2012_validation_ground_truth.txt is missing"),
        (rewritten("ILSVRC2012", b"MATLAB 7.3 MAT-file", GOOD_LABELS), "meta.mat cannot be read"),
        (rewritten("ILSVRC2012", meta_mat("ILSVRC2012", [], {}), GOOD_LABELS), "not the devkit of ILSVRC2012"),
        (rewritten("ILSVRC2012", meta_mat("ILSVRC2012", with_row(3, id=9), COUNTS_2012), GOOD_LABELS), "not 1 to 4"),
        (rewritten("ILSVRC2012", meta_mat("ILSVRC2012", with_row(5, id=4), COUNTS_2012), GOOD_LABELS), "not 1 to 4"),
        (
            rewritten("ILSVRC2012", meta_mat("ILSVRC2012", with_row(3, id=2.5), COUNTS_2012), GOOD_LABELS),
            "text and num",
        ),
        (
            rewritten("ILSVRC2012", meta_mat("ILSVRC2012", with_row(3, wnid="dog"), COUNTS_2012), GOOD_LABELS),
            "'dog' is",
        ),
        (
            rewritten("ILSVRC2012", meta_mat("ILSVRC2012", SYNSETS_2012[1:], COUNTS_2012), GOOD_LABELS),
            "it has 3 classes",
        ),
        (
            rewritten("ILSVRC2012", meta_mat("ILSVRC2012", SYNSETS_2012, {**COUNTS_2012, "n01440764": 6}), GOOD_LABELS),
            "it lists 21 images for training",
        ),
        (rewritten("ILSVRC2012", GOOD_META, GOOD_LABELS + b"1\n"), "9 labels for 8 images"),
        (rewritten("ILSVRC2012", GOOD_META, lines([3, 1, 4, 2, 2, 4, 1, 5])), "line 8: '5' is not a class"),
        (rewritten("ILSVRC2012", GOOD_META, lines([0, 1, 4, 2, 2, 4, 1, 3])), "line 1: '0' is not a class"),
        (rewritten("ILSVRC2012", GOOD_META, b"3\n1\n4\n2\n2\n-4\n1\n3\n"), "line 6: '-4' is not a class"),
        (rewritten("ILSVRC2012", GOOD_META, lines([3, 1, 4, 2, 2, 4, 1, 1])), "id 1: 3"),
        (rewritten("ILSVRC2012", GOOD_META, GOOD_LABELS)[:-20], "not a complete .tar.gz"),
        (b"<html>404</html>", "not a complete .tar.gz"),
        (gzip.compress(b"not a tar" * 200, mtime=0), "not a complete .tar.gz"),
        (gzip.compress(tar({f"{copy}/data/meta.mat": GOOD_META for copy in "ab"})), "duplicate data/meta.mat"),
    ],
)
def test_a_wrong_or_damaged_devkit_is_refused(kit: bytes, expected: str, tmp_path: Path) -> None:
    edition = write_2012(tmp_path)
    (tmp_path / edition.devkit.name).write_bytes(kit)
    text = message(lambda: Archives(tmp_path, edition).classes)
    assert expected in text
    assert str(tmp_path / edition.devkit.name) in text


def test_a_devkit_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edition = write_2012(tmp_path)
    monkeypatch.setattr("vgg.sharding.devkit.MAX_DEVKIT_BYTES", 10_000)
    (tmp_path / edition.devkit.name).write_bytes(gzip.compress(bytes(20_000)))
    assert "more than 10,000 bytes" in message(lambda: Archives(tmp_path, edition).classes)


@pytest.mark.parametrize("cost", [None, COST_2010[:3], COST_2010 + 0.5, COST_2010.astype(int) - 1])
def test_a_wrong_cost_matrix_is_refused(cost: np.ndarray | None, tmp_path: Path) -> None:
    edition = write_2010(tmp_path)
    counts = {"n01440764": 5, "n02487347": 4, "n02872752": 6, "n04596742": 5}
    variables = {} if cost is None else {"cost_matrix": cost}
    meta = meta_mat("ILSVRC2010", SYNSETS_2010, counts, **variables)
    kit = devkit("devkit-1.0", "ILSVRC2010", meta, lines(LABELS_2010["val"]))
    (tmp_path / edition.devkit.name).write_bytes(kit)
    assert "cost_matrix" in message(lambda: Archives(tmp_path, edition).classes)
