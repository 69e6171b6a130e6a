"""Scenes of digits: deterministic, exact boxes, and splits that share no digit."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARD
from PIL import Image

from runtime.shards.shardset import ShardSet
from runtime.targets import Directory
from vgg.params.shard import ShardParams
from vgg.sharding import scenes
from vgg.sharding.open import open_source
from vgg.sharding.pack import pack
from vgg.sharding.scenes import SIDE, DigitScenes
from vgg.sharding.sources import Digits

SAMPLE = range(0, 3000, 31)


@pytest.fixture(scope="module")
def source() -> DigitScenes:
    return DigitScenes()


def test_a_box_bounds_the_pixels_that_differ_from_the_background(source: DigitScenes) -> None:
    """Found by walking over the pixels of the finished scene, not from its masks."""
    for number in SAMPLE:
        scene = source.scene("train", number)
        differs = (scene.pixels != scene.background).any(axis=2)
        for pasted in scene.pasted:
            others = np.zeros_like(differs)
            for other in scene.pasted:
                others |= other.mask if other is not pasted else False
            own = [(x, y) for y in range(SIDE) for x in range(SIDE) if differs[y, x] and not others[y, x]]
            columns, rows = [x for x, _ in own], [y for _, y in own]
            assert pasted.box == (min(columns), min(rows), max(columns), max(rows)), number


def test_the_shares_of_the_kinds_of_scene_and_the_label(source: DigitScenes) -> None:
    kinds, heights = Counter(), []
    for number in SAMPLE:
        scene = source.scene("train", number)
        label, *others = [pasted.label for pasted in scene.pasted]
        assert label == source.originals("train")[number].label
        kinds["one" if not others else "two" if others == [label] else "clutter"] += 1
        if others and others != [label]:
            main, clutter = (scene.pixels[pasted.mask].mean() for pasted in scene.pasted)
            assert main > clutter + 20
            assert scene.pasted[0].mask.sum() > scene.pasted[1].mask.sum()
        assert not np.logical_and.reduce([pasted.mask for pasted in scene.pasted]).any() or not others
        heights.append(scene.pasted[0].box[3] - scene.pasted[0].box[1] + 1)
    assert kinds["one"] / len(SAMPLE) == pytest.approx(0.7, abs=0.12)
    assert kinds["two"] / len(SAMPLE) == pytest.approx(0.15, abs=0.1)
    assert min(heights) < 20
    assert max(heights) > 30


def test_no_digit_is_in_scenes_of_both_splits(source: DigitScenes, monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, set[bytes]] = {"train": set(), "val": set()}
    original, split = scenes._enlarged, ""

    def enlarged(digit: np.ndarray, size: int) -> np.ndarray:
        used[split].add(digit.tobytes())
        return original(digit, size)

    monkeypatch.setattr(scenes, "_enlarged", enlarged)
    monkeypatch.setattr(scenes, "_background", lambda _: np.zeros((SIDE, SIDE, 3), np.uint8))  # to be quick
    for split in used:
        for number in range(scenes.NUM_SCENES[split]):
            source.scene(split, number)
    digits = Digits()
    expected = {s: {digits.images[int(o.name)].tobytes() for o in digits.originals(s)} for s in used}
    assert used["train"] == expected["train"]  # all of them
    assert used["val"] <= expected["val"]
    assert not used["train"] & used["val"]


def test_scenes_are_the_same_everywhere(source: DigitScenes) -> None:
    """A change of these digests changes every result on this data set."""
    digest = hashlib.sha256()
    for number in range(40):
        digest.update(source.scene("train", number).pixels.tobytes())
        digest.update(source.scene("val", number).pixels.tobytes())
    assert digest.hexdigest() == "37f113849c81d299ce91311ee5a538f8d6db03236271b7404deb441b98f6a4d3"
    archive = hashlib.sha256(source.annotation_archive("val")).hexdigest()
    assert archive == "9e1703d9e44db6ad0c076c10ce72ba449324eb28a08af78d40da1cde0b2ad67b"


def test_workers_read_the_same_jpegs_and_they_show_the_scene(source: DigitScenes) -> None:
    worker = pickle.loads(pickle.dumps(source))
    for original in source.originals("val")[:20]:
        data = worker.read(original)
        assert data == source.read(original)
        decoded = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)
        scene = source.scene("val", int(original.name.split("/")[1]))
        assert np.abs(decoded - scene.pixels).mean() < 6


def test_scenes_are_packed_as_any_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scenes, "NUM_SCENES", {"train": 20, "val": 10})
    params = ShardParams(**{**SHARD, "source": "digit-scenes"})
    pack(params, open_source("digit-scenes", tmp_path), Directory(tmp_path / "shards"), "test", num_workers=1)
    shards = ShardSet(tmp_path / "shards")
    assert shards.wnids == [c.wnid for c in Digits().classes]
    assert {(int(row["width"]), int(row["height"])) for row in shards.split("val").rows} == {(SIDE, SIDE)}
    assert shards.manifest["amended"] == shards.manifest["remarks"] == []
