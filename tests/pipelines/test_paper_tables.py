"""The paper's tables: the published numbers agree with themselves, and rows of ours stand beside the right ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluations import CIFAR, IMAGENET, fused_network, metrics, result, write, write_predictions

from components.evaluate.published import JITTER, NUM_IMAGES, TABLE_3, TABLE_4, TABLE_5, TABLE_6, Published
from pipelines.paper import __main__ as paper
from runtime.errors import BadData, Refused, WrongParameters

Q3, LOW = [256, 384, 512], [224, 256, 288]


def best(rows: tuple[Published, ...]) -> tuple[float, float]:
    return min((row.top1_error, row.top5_error) for row in rows)


def of(rows: tuple[Published, ...], configuration: str, method: str = "dense") -> Published:
    (row,) = [r for r in rows if (r.configuration, r.train_scale, r.method) == (configuration, JITTER, method)]
    return row


def test_the_published_numbers_agree_with_what_the_paper_says_about_them() -> None:
    assert (len(TABLE_3), len(TABLE_4), len(TABLE_5), len(TABLE_6)) == (12, 10, 6, 4)
    assert best(TABLE_3) == (25.5, 8.0)  # E with jitter, the last row
    assert best(TABLE_4) == (24.8, 7.5)  # §4.2: "our best single-network performance is 24.8%/7.5%"
    for net in "DE":  # Table 5's dense column is Table 4's last rows
        assert of(TABLE_5, net) == of(TABLE_4, net)
        crops, both = of(TABLE_5, net, "multi_crop"), of(TABLE_5, net, "multi_crop_and_dense")
        assert both.top1_error < crops.top1_error < of(TABLE_5, net).top1_error  # §4.3: they are complementary
    single = {(row.configuration, row.train_scale): row for row in TABLE_3}
    for row in TABLE_4:  # §4.2: scale jittering at test time leads to better performance
        assert row.top1_error < single[row.configuration, row.train_scale].top1_error
        assert set(row.test_scales) & set(single[row.configuration, row.train_scale].test_scales)
    fused = {row.method: row for row in TABLE_6 if len(row.members) == 2}
    for method, row in fused.items():  # two networks are better than either
        assert row.top1_error < min(of(TABLE_5, net, method).top1_error for net in "DE")


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """D with jitter at three seeds, E-384 once, A once; D multi-crop of seed 1 evaluated separately."""
    for seed, error in ((1, 25.0), (2, 25.3), (3, 25.6)):
        modes = {
            "centre_crop_Q384": result(28.0, 9.0, "centre_crop", [384], mirror=False),
            "dense_Q384_flip": result(error + 1, 8.2, "dense", [384]),
            "dense_Q256-384-512_flip": result(error, 7.6, "dense", Q3),
        }
        write(tmp_path / f"d-jitter-{seed}", metrics("D", list(JITTER), modes, IMAGENET, seed))
    crops = {
        "multi_crop_Q256-384-512_flip": result(24.9, 7.5, "multi_crop", Q3),
        "multi_crop_and_dense_Q256-384-512_flip": result(24.5, 7.3, "multi_crop_and_dense", Q3),
    }
    again = metrics("D", list(JITTER), crops, IMAGENET, 1)
    write_predictions(tmp_path / "d-crops", again)
    write(tmp_path / "d-crops", again)  # the same numbers twice
    write(tmp_path / "a", metrics("A", 256, {"dense_Q256_flip": result(29.4, 10.3, "dense", [256])}, IMAGENET))
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    paper.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    return json.loads(shown(capsys, *arguments, "--json"))


def test_golden_rows_of_imagenet(imagenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "--table", 3, "--runs", imagenet).splitlines()
    assert lines[0] == "Table 3: single test scale, dense (ILSVRC-2012 validation, 50,000 images)"
    rows = [line.split() for line in lines[3:15]]
    assert [row[0] for row in rows] == [row.configuration for row in TABLE_3]  # in the paper's order
    assert " ".join(rows[0]) == "A 256 256 1 29.40 [29.00, 29.80] 10.30 [9.90, 10.70] 29.6 10.4"
    assert rows[1] == ["A-LRN", "256", "256", "29.7", "10.5"]  # not run: empty
    assert rows[8] == ["D", "[256;512]", "384", "3", "26.30", "(26.00–26.60)", "8.20", "(8.20–8.20)", "25.6", "8.1"]
    assert lines[-2].startswith("missing: A-LRN S=256 Q=256 · B S=256 Q=256 · C S=256 Q=256 · C S=384 Q=384 · C S=[")
    assert lines[-2].count("·") == 9  # ten of twelve
    crops = imagenet / "d-crops/data/predictions/manifest.json"
    assert lines[-1] == f"not in this table: {crops}"

    table = as_json(capsys, "--table", 5, "--runs", imagenet)
    assert [(row["method"], row["num_seeds"], row["paper"]) for row in table["rows"][:3]] == [
        ("dense", 3, {"top1_error": 24.8, "top5_error": 7.5}),
        ("multi_crop", 1, {"top1_error": 24.6, "top5_error": 7.5}),
        ("multi_crop_and_dense", 1, {"top1_error": 24.4, "top5_error": 7.2}),
    ]
    assert table["rows"][0]["top1_error"] == {"mean": pytest.approx(0.253), "range": [0.25, 0.256], "interval": None}
    assert table["rows"][1]["top1_error"]["interval"] == pytest.approx([0.245, 0.253])

    markdown = shown(capsys, "--table", 4, "--runs", imagenet, "--markdown").splitlines()
    assert "| D | [256;512] | 256,384,512 | 3 | 25.30 (25.00–25.60) | 7.60 (7.60–7.60) | 24.8 | 7.5 |" in markdown
    assert "| E | 384 | 352,384,416 |  |  |  | 26.7 | 8.6 |" in markdown


def test_other_images_have_no_column_of_the_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modes = {"dense_Q36": result(30, 2, "dense", [36], 10_000, False)}
    modes["dense_Q32-36-40"] = result(29, 2, "dense", [32, 36, 40], 10_000, False)
    write(tmp_path / "one", metrics("D", [32, 40], modes, CIFAR))
    for number in (3, 4):
        text = shown(capsys, "--table", number, "--runs", tmp_path)
        assert text.splitlines()[0].endswith("(NOT ImageNet: folder, 10,000 images)")
        assert "paper top-1" not in text
        assert "its numbers do not compare" in text
    table = as_json(capsys, "--table", 3, "--runs", tmp_path)
    assert not any("paper" in row for row in table["rows"])
    assert [row["configuration"] for row in table["rows"]] == ["A", "A-LRN", "B", "C", "D", "E"]
    assert table["missing"] == ["A", "A-LRN", "B", "C", "E"]
    # half of the paper's images are not its validation set either
    half = {"dense_Q256_flip": result(29.4, 10.3, "dense", [256], NUM_IMAGES // 2)}
    write(tmp_path / "half", metrics("A", 256, half, IMAGENET))
    assert not as_json(capsys, "--table", 3, "--runs", tmp_path / "half")["comparable"]
    with pytest.raises(WrongParameters, match="50,000 images, these evaluations 10,000"):
        shown(capsys, "--table", 3, "--runs", tmp_path / "one", "--imagenet")


def test_a_folder_is_imagenet_only_if_the_user_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modes = {"dense_Q256_flip": result(29.4, 10.3, "dense", [256])}
    write(tmp_path, metrics("A", 256, modes, {**IMAGENET, "dataset": "folder"}))
    assert not as_json(capsys, "--table", 3, "--runs", tmp_path)["comparable"]
    assert as_json(capsys, "--table", 3, "--runs", tmp_path, "--imagenet")["rows"][0]["paper"]["top1_error"] == 29.6


def test_networks_that_the_paper_does_not_have_are_rows_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = {"dense_Q256_flip": result(26, 8, "dense", [256])}
    write(tmp_path / "bn", metrics("D", 256, modes, IMAGENET, batch_norm=True))
    write(tmp_path / "imported", metrics("D", 256, modes, IMAGENET, source="imported"))
    plain = {"dense_Q256": result(27.5, 9, "dense", [256], mirror=False)}
    write(tmp_path / "plain", metrics("D", 256, plain, IMAGENET))
    rows = as_json(capsys, "--table", 3, "--runs", tmp_path)["rows"]
    ours = {(r["configuration"], r["source"], r["mirror"]): r["paper"] for r in rows if r["num_seeds"]}
    published = {"top1_error": 27.0, "top5_error": 8.8}
    assert ours == {
        ("D", "imported", True): published,
        ("D", "trained", False): None,  # the paper averages with the mirror image
        ("D-BN", "trained", True): None,
    }


def test_a_fusion_goes_by_its_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mode = "multi_crop_and_dense_Q256-384-512_flip"
    modes = {mode: result(24.5, 7.3, "multi_crop_and_dense", Q3)}
    first, other = metrics("D", list(JITTER), modes, IMAGENET), metrics("A", 256, modes, IMAGENET)
    fused = {**modes, "fusion": result(23.8, 6.9, "fusion", Q3)}
    best = [fused_network(first, "multi_crop_and_dense"), fused_network(other, "dense")]
    content = metrics("E", list(JITTER), fused, IMAGENET)
    for name, partner in zip(("paper", "unlike"), best, strict=True):
        networks = [fused_network(content, "multi_crop_and_dense"), partner]
        write(tmp_path / name, {**content, "fused": networks})
        table = as_json(capsys, "--table", 6, "--runs", tmp_path / name)
        (row,) = [row for row in table["rows"] if row["num_seeds"]]
        if name == "paper":
            assert sorted(row["members"]) == [["D", [256, 512]], ["E", [256, 512]]]
            assert row["paper"] == {"top1_error": 23.7, "top5_error": 6.8}
            assert len(table["missing"]) == 3
        else:
            assert sorted(row["members"]) == [["A", 256], ["E", [256, 512]]]
            assert (row["method"], row["paper"]) == ("dense + multi_crop_and_dense", None)
    with pytest.raises(BadData, match="lacks fused"):  # what was fused is not known
        shown(capsys, "--table", 6, "--runs", write(tmp_path / "old", content))


def test_what_does_not_belong_together_is_refused(imagenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write(imagenet / "cifar", metrics("A", 32, {"d": result(30, 2, "dense", [32], 10_000)}, CIFAR))
    with pytest.raises(Refused, match="evaluations of different data") as refused:
        shown(capsys, "--table", 3, "--runs", imagenet)
    assert str(other) in str(refused.value)
    classes = {**IMAGENET, "classes_sha256": "e" * 64}
    write(imagenet / "b", metrics("B", 256, {"d": result(28, 9, "dense", [256])}, classes))
    with pytest.raises(Refused, match="different classes"):
        shown(capsys, "--table", 3, "--runs", imagenet / "a", imagenet / "b")
    changed = metrics("A", 256, {"dense_Q256_flip": result(29.5, 10.3, "dense", [256])}, IMAGENET)
    write(imagenet / "per-position", changed)  # the same weights, another softmax
    with pytest.raises(Refused, match="two results for A S=256 Q=256 of the same weights"):
        shown(capsys, "--table", 3, "--runs", imagenet / "a", imagenet / "per-position")


def test_seeds_of_a_row_are_evaluated_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modes = {"dense_Q256_flip": result(29.4, 10.3, "dense", [256])}
    for seed, softmax in ((1, "after_mean"), (2, "after_mean"), (3, "per_position")):
        content = metrics("A", 256, modes, IMAGENET, seed)
        write_predictions(tmp_path / f"{seed}", content, softmax=softmax)
    assert as_json(capsys, "--table", 3, "--runs", tmp_path / "1", tmp_path / "2")["rows"][0]["num_seeds"] == 2
    with pytest.raises(Refused, match="other options: softmax after_mean and per_position"):
        shown(capsys, "--table", 3, "--runs", tmp_path)


def test_the_metrics_file_of_a_project_says_what_its_predictions_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = metrics("A", 256, {"dense_Q256_flip": result(29.4, 10.3, "dense", [256])}, IMAGENET)
    write(tmp_path / "a", content)
    bare = {name: value for name, value in content.items() if name not in ("training", "dataset", "classes_sha256")}
    write_predictions(tmp_path / "a", {**bare, "data_digest": content["data_digest"]})
    assert as_json(capsys, "--table", 3, "--runs", tmp_path)["rows"][0]["num_seeds"] == 1
    with pytest.raises(BadData, match=r"manifest.json: lacks classes_sha256, dataset, training: it"):
        shown(capsys, "--table", 3, "--runs", tmp_path / "a/data")


def test_bad_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WrongParameters, match="no such file or folder"):
        shown(capsys, "--table", 3, "--runs", tmp_path / "none")
    with pytest.raises(BadData, match="no finished evaluation"):
        shown(capsys, "--table", 3, "--runs", tmp_path)
    predictions = write_predictions(tmp_path / "x", metrics("A", 256, {"d": result(1, 1, "dense", [256])}, IMAGENET))
    path = predictions / "manifest.json"
    path.write_text(path.read_text().replace("ilsvrc2012", "ilsvrc2010"))
    with pytest.raises(BadData, match=f"{path}: damaged"):
        shown(capsys, "--table", 3, "--runs", predictions)
    old = tmp_path / "evaluate.json"
    old.write_text(json.dumps({"modes": {}, "weights_sha256": "1"}))
    with pytest.raises(BadData, match="lacks data_digest, classes_sha256, dataset …: it is of an earlier"):
        shown(capsys, "--table", 3, "--runs", old)
    old.write_text("[1")
    with pytest.raises(BadData, match="not the metrics of an evaluation"):
        shown(capsys, "--table", 3, "--runs", old)
