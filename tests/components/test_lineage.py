"""The chain of a model: known from every link, verified link by link, with the server alone, with the files alone."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chain import Chain, flip, make
from conftest import NUM_TRAIN, NUM_VAL, environment

from components.lineage.__main__ import main
from components.lineage.places import KINDS
from components.lineage.render import WIDTH
from runtime.errors import Refused, Unreachable, WrongParameters

KINDS_IN_ORDER = ["version", "evaluation", "training", "data", "source"]
NO_SERVER = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def chain(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """One for all tests of this file, which is the current folder; they leave it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        yield make(tmp_path_factory.mktemp("project"), empty_database, patch)


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """What the program prints as JSON."""

    def ask(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        main([*arguments, "--json"])
        return json.loads(capsys.readouterr().out)

    return ask


def links(answer: dict[str, Any]) -> list[dict[str, Any]]:
    found = [answer["chain"]]
    while found[-1]["inputs"]:
        found += found[-1]["inputs"]
    return found


def test_the_schemas_are_those_of_the_writers() -> None:
    modules = (
        "components.evaluate.report", "runtime.checkpoint", "runtime.shards.shardset", "components.localise.report",
        "vgg.localisation.boxset",
    )  # fmt: skip
    assert list(KINDS) == [importlib.import_module(module).SCHEMA for module in modules]


def test_the_chain(chain: Chain, ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    whole = links(ask("models:/tiny@champion"))
    assert [link["kind"] for link in whole] == KINDS_IN_ORDER
    version, _, training, data, source = whole
    weights = json.loads(Path("metrics/train.json").read_text())["weights_sha256"]
    assert version["digest"] == training["facts"]["weights"] == weights
    assert training["params"]["epochs"] == 1
    assert data["facts"]["images"].startswith(f"{NUM_TRAIN} train + {NUM_VAL} val, 3 classes")
    assert source["where"] == ["data/images"]
    for link in whole[1:4]:
        assert link["record"]["pipeline_run"] == "run-1"
        assert link["record"]["machine"]["cpu"]
        assert link["record"]["code"]["git"]["commit"]
    assert any(user == "models:/tiny/1" for user in training["used_by"])

    # the same chain from each of its links, by number, run, folder and digest
    [run] = [where.split()[-1] for where in training["where"] if where.startswith("MLflow run")]
    parent = chain.client.get_run(run).data.tags["mlflow.parentRunId"]
    for reference, first in (
        ("models:/tiny/1", 0), (version["where"][0].split()[-1], 0), (parent, 1), ("data/predictions", 1),
        (run, 2), ("models/vgg", 2), (training["digest"], 2), ("data/shards/manifest.json", 3), ("data/shards/", 3),
    ):  # fmt: skip
        assert [link["digest"] for link in links(ask(reference))] == [link["digest"] for link in whole[first:]]

    # for people
    main(["models:/tiny@champion"])
    tree = capsys.readouterr().out.splitlines()
    branches = [line.lstrip(" └─").split()[0] for line in tree if "└─" in line or line[0] not in " │"]
    assert branches == KINDS_IN_ORDER
    assert max(map(len, tree)) <= WIDTH
    assert "as in params.yaml" in "\n".join(tree)
    main(["models:/tiny@champion", "--mermaid"])
    diagram = capsys.readouterr().out
    assert diagram.startswith("flowchart LR")
    assert diagram.count("-->") == 4

    for wrong, error, says in (
        ("models:/tiny", WrongParameters, "models:/NAME@ALIAS or models:/NAME/NUMBER"),
        ("models:/tiny/7", Refused, "has no models:/tiny/7"),
        ("models:/other@champion", Refused, "has no models:/other@champion"),
        ("0" * 32, Refused, f"has no run {'0' * 32}"),
        ("metrics", Refused, "metrics: no finished shards, checkpoint, predictions, boxes or localisations"),
    ):
        with pytest.raises(error, match=re.escape(says)):
            main([wrong])


def test_the_verdict_reaches_a_shell_whose_reader_has_seen_enough(tmp_path: Path) -> None:
    """… | head: nothing more is printed, and the exit code is the one of the verdict."""
    script = (
        "from components import program\nfrom runtime.errors import Refused\n"
        "def work():\n    for _ in range(9999):\n        program.say('x' * 99)\n    raise Refused('damaged')\n"
        "program.run(work)"
    )
    line = f'{sys.executable} -c "$1" 2>err | head -1 >/dev/null; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", line, "-", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, (tmp_path / "err").read_text()) == ("78\n", "error: damaged\n")


def test_every_flipped_bit_is_named(chain: Chain, ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    answer = ask("models:/tiny/1", "--verify")
    assert [link["state"] for link in links(answer)] == ["verified"] * 5
    assert links(answer)[-1]["facts"]["compared"] == f"{NUM_TRAIN + NUM_VAL} images"
    assert "not reached: nothing" in caplog.text
    step = json.loads(Path("models/vgg/manifest.json").read_text())["last"]
    for link, path, says in (
        ("version", chain.files / "weights.safetensors", "weights.safetensors: does not have the sha256"),
        ("version", chain.files / "network.json", "network.json: does not have the sha256"),
        ("version", chain.files / "MODEL_CARD.md", "MODEL_CARD.md: does not have the sha256"),
        ("evaluation", Path("data/predictions/predictions.npy"), "predictions.npy: does not have the sha256"),
        ("evaluation", Path("data/predictions/manifest.json"), "data/predictions/manifest.json: damaged"),
        ("training", Path(f"models/vgg/{step}/weights.safetensors"), f"{step}/weights.safetensors: does not have"),
        ("training", Path(f"models/vgg/{step}/state.json"), "state.json: does not have the sha256"),
        ("training", Path("models/vgg/manifest.json"), "models/vgg/manifest.json: damaged"),
        ("data", Path("data/shards/train-00000.tar"), "train-00000.tar: "),
        ("data", Path("data/shards/val.index.npy"), "val.index.npy: wrong sha256"),
        ("data", Path("data/shards/manifest.json"), "data/shards/manifest.json: damaged"),
        ("source", Path("data/images/train/cat/0003.jpg"), "train/cat/0003.jpg: is not the image in the shards"),
    ):
        flip(path, 700 if path.suffix == ".tar" else -20)
        with pytest.raises(Refused, match=f"chain is broken:\n  {link} .*{re.escape(says)}") as refusal:
            main(["models:/tiny/1", "--verify"])
        assert len(refusal.value.everything) == 1, refusal.value
        flip(path, 700 if path.suffix == ".tar" else -20)
    image, other = Path("data/images/val/dog/0001.jpg"), Path("data/images/val/dog/other.jpg")
    image.rename(other)
    with pytest.raises(Refused, match=r"val/dog/other.jpg: is not in the shards(.|\n)*1 image of the shards missing"):
        main(["data/shards", "--verify"])
    other.rename(image)


def test_what_is_written_in_the_tags_is_verified_too(chain: Chain) -> None:
    client = chain.client
    tags = client.get_model_version("tiny", "1").tags
    better = {**json.loads(tags["evaluation"]), "top1_error": 0.001}
    for tag, value, says in (
        ("weights_sha256", "0" * 64, f"its tag weights_sha256 is {'0' * 64}"),
        ("evaluation", json.dumps(better), "its tag evaluation says top1_error 0.001, the predictions say"),
    ):
        client.set_model_version_tag("tiny", "1", tag, value)
        with pytest.raises(Refused, match=says):
            main(["models:/tiny/1", "--verify"])
        client.set_model_version_tag("tiny", "1", tag, tags[tag])


def test_the_server_alone_and_the_files_alone(
    chain: Chain, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    whole = links(ask("models:/tiny/1"))
    with monkeypatch.context() as patch:
        (tmp_path / "elsewhere").mkdir()
        patch.chdir(tmp_path / "elsewhere")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{chain.where}/mlflow.db")
        answer = ask("models:/tiny@champion", "--verify")
        assert [link["state"] for link in links(answer)] == ["verified"] + ["not reached"] * 4
        assert "no copy was found" in caplog.text
        assert not list(Path().iterdir())
        for mine, known in zip(links(answer), whole, strict=True):
            assert (mine["digest"], mine.get("params")) == (known["digest"], known.get("params"))

    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", NO_SERVER)
        caplog.clear()
        answer = ask("data/predictions", "--verify")
        assert [link["state"] for link in links(answer)] == ["verified"] * 4
        assert [link["record"] for link in links(answer)[:3]]
        assert f"not asked: MLflow at {NO_SERVER} does not answer" in caplog.text
        with pytest.raises(Unreachable, match="MLflow is not reached"):
            main(["models:/tiny@champion"])
        registered = {"model_name": "tiny", "version": 1, "uri": "models:/tiny@champion"}
        registered |= {"weights_sha256": whole[0]["digest"]}
        metrics, record = Path("metrics/register.json"), Path("metrics/register.record.json")
        metrics.write_text(json.dumps(registered))
        record.write_text(json.dumps(whole[0]["record"]))
        assert [link["digest"] for link in links(ask("models:/tiny@champion"))] == [link["digest"] for link in whole]
        metrics.unlink()
        record.unlink()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    assert links(ask("models/vgg", "--verify"))[0]["state"] == "verified"
    assert not (tmp_path / "none.db").exists()


def test_copies_are_found_by_content(chain: Chain, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In VGG_STORE, beside the outputs, and not what is now at the same path."""
    whole = links(ask("models:/tiny/1"))
    monkeypatch.setenv("VGG_STORE", str(tmp_path / "store"))
    shutil.copytree("data/shards", tmp_path / "store/shards/a")
    Path("data/shards").rename(tmp_path / "shards")
    Path("models/vgg").rename("models/vgg.previous")
    answer = links(ask("models:/tiny/1", "--verify"))
    assert [link["state"] for link in answer] == ["verified"] * 5
    assert answer[2]["where"][0] == "models/vgg.previous"
    assert answer[3]["where"][0] == str(tmp_path / "store/shards/a")
    assert [link["digest"] for link in answer] == [link["digest"] for link in whole]
    Path("models/vgg.previous").rename("models/vgg")
    (tmp_path / "shards").rename("data/shards")
