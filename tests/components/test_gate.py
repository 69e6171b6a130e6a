"""The gate as a separate step before registration: compares with the champion, and tracks its verdict."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from components.evaluate import hits
from components.evaluate.report import SCHEMA
from components.register.gate import gate_passes, main
from components.tracking import access, provenance
from runtime import manifest
from runtime.errors import Refused
from runtime.shards.shardset import ShardSet
from vgg.evaluation.predictions import row_type

GATE = {
    "max_top1_error": 0.3, "max_top5_error": 0.2, "max_regression": 0.1, "confidence": 0.5,
    "incomparable_champion": "refuse",
}  # fmt: skip
SECTION = {"model_name": "vgg", "exports": [], "gate": GATE}


class Evaluated:
    """Outputs of the evaluate stage: a network that misclassifies the first `wrong` images."""

    def __init__(self, folder: Path, shards: ShardSet, wrong: int, weights: str = "a") -> None:
        self.folder, self.shards, num = folder, shards, len(shards.split("val"))
        rows = np.zeros(num, row_type(1))
        rows["number"] = np.arange(num)
        rows["modes"]["rank"][:wrong, 0] = 1
        self.metrics = {
            "headline": "dense", "modes": {}, "top1_error": wrong / num, "top5_error": 0.0,
            "num_images": num, "weights_sha256": weights * 64, "data_digest": shards.digest,
        }  # fmt: skip
        folder.mkdir()
        np.save(folder / "predictions.npy", rows)
        manifest.write(
            folder, SCHEMA, {"evaluate": {"fuse": []}, "metrics": {}}, [manifest.file_entry(folder, "predictions.npy")]
        )
        self.path = folder.with_suffix(".json")
        self.path.write_text(json.dumps(self.metrics))
        self.hits = hits.hits_of(rows, shards.digest)

    def check(self, *more: str) -> bool:
        """The answer of the gate."""
        answer, shards = self.folder.with_suffix(".answer"), self.shards
        arguments = ["--params", json.dumps(SECTION), "--shards", str(shards.directory)]
        arguments += ["--predictions", str(self.folder), "--evaluation", str(self.path), "--answer", str(answer)]
        main([*arguments, *more])
        return bool(json.loads(answer.read_text()))

    def register(self, client: MlflowClient, alias: str = "champion") -> str:
        """A version as the register stage makes it, as far as the gate reads it."""
        files = self.folder.with_suffix(".files") / "artifacts"
        files.mkdir(parents=True)
        (files / hits.FILE).write_bytes(hits.write(self.hits, hits.keys_sha256(self.shards)))
        if not client.search_registered_models("name = 'vgg'"):
            client.create_registered_model("vgg")
        names = ("top1_error", "top5_error", "num_images", "data_digest")
        tags = {"weights_sha256": self.metrics["weights_sha256"]}
        tags["evaluation"] = json.dumps({name: self.metrics[name] for name in names})
        version = client.create_model_version("vgg", str(files.parent), tags=tags).version
        client.set_registered_model_alias("vgg", alias, version)
        return str(version)


def parent(client: MlflowClient) -> Any:
    experiment = client.get_experiment_by_name(access.EXPERIMENT)
    [found] = client.search_runs([experiment.experiment_id], f"tags.`vgg.lineage` = '{provenance.lineage('{}')}'")
    return found


def tag(client: MlflowClient) -> str:
    """Tag vgg.gate of the pipeline's run in MLflow."""
    return str(parent(client).data.tags["vgg.gate"])


def test_the_gate_without_a_champion(
    client: MlflowClient, shards: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Evaluated(tmp_path / "good", shards, 2).check()
    assert tag(client) == "passed"
    assert not Evaluated(tmp_path / "bad", shards, 5).check()
    assert "max_top1_error" in tag(client)
    assert "gate failed: top1_error 0.3846" in caplog.text


def test_the_model_is_compared_with_the_champion(client: MlflowClient, shards: ShardSet, tmp_path: Path) -> None:
    """On the same images, one by one.  What fails here may still get a version, as challenger."""
    champion = Evaluated(tmp_path / "champion", shards, 1, "c")
    champion.register(client)
    assert Evaluated(tmp_path / "worse", shards, 3).check()
    assert "3 images" not in tag(client)
    assert "2 images only this model gets wrong, 0 only the champion, of 13" in tag(client)
    run = parent(client).data.tags["vgg.run.gate"]
    verdict = json.loads(Path(download_artifacts(run_id=run, artifact_path="gate/gate.json")).read_text())
    assert (verdict["registrable"], verdict["passed"], verdict["champion_moves"]) == (True, False, False)
    [rule] = [rule for rule in verdict["rules"] if not rule["passed"] and rule["kind"] == "comparison"]
    assert (rule["name"], rule["limit"]) == ("max_regression", 0.1)
    assert Evaluated(tmp_path / "near", shards, 2).check()
    assert tag(client) == "passed"
    assert champion.check()
    assert Evaluated(tmp_path / "best", shards, 0, "b").check()
    assert Evaluated(tmp_path / "worst", shards, 3, "d").check("--replace-champion")
    assert tag(client) == "passed"


def test_a_champion_whose_alias_was_deleted_is_named(
    client: MlflowClient, shards: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Evaluated(tmp_path / "champion", shards, 1, "c").register(client)
    client.delete_registered_model_alias("vgg", "champion")
    assert Evaluated(tmp_path / "worse", shards, 3).check()
    assert "'vgg' has version 1, but none has the alias champion; was it deleted?" in caplog.text


def test_a_champion_of_other_images_is_evaluated_on_these(
    client: MlflowClient, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If parameters say so; tests/components/test_register.py evaluates a real one."""
    champion = Evaluated(tmp_path / "champion", shards, 0, "c")
    here, champion.hits = champion.hits, replace(champion.hits, data_digest="elsewhere")
    champion.metrics["data_digest"] = "elsewhere"
    champion.register(client)
    asked = []
    monkeypatch.setattr("components.register.compare.reevaluated", lambda *given: asked.append(given) or here)
    assert Evaluated(tmp_path / "new", shards, 3).check()
    assert tag(client).startswith("the champion was evaluated on other images (elsewhere instead of ")
    assert not asked
    monkeypatch.setitem(GATE, "incomparable_champion", "reevaluate")
    assert Evaluated(tmp_path / "again", shards, 3).check()
    assert "3 images only this model gets wrong, 0 only the champion" in tag(client)
    assert len(asked) == 1


@pytest.mark.parametrize("damage", ["bits", "tag", "missing"])
def test_predictions_of_the_champion_that_cannot_be_trusted(
    damage: str, client: MlflowClient, shards: ShardSet, tmp_path: Path
) -> None:
    champion = Evaluated(tmp_path / "champion", shards, 1, "c")
    version = champion.register(client)
    path = tmp_path / "champion.files/artifacts" / hits.FILE
    if damage == "missing":
        path.unlink()
        assert Evaluated(tmp_path / "new", shards, 0).check()
        assert "has no predictions of single images" in tag(client)
        return
    if damage == "bits":
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    else:
        stated = client.get_model_version("vgg", version).tags["evaluation"]
        client.set_model_version_tag("vgg", version, "evaluation", stated.replace("0.07", "0.01"))
    with pytest.raises(Refused, match=r"per_image\.json: (damaged|is not of the evaluation)"):
        Evaluated(tmp_path / "new", shards, 0).check()


def test_an_evaluation_that_does_not_fit_is_refused(client: MlflowClient, shards: ShardSet, tmp_path: Path) -> None:
    evaluated = Evaluated(tmp_path / "new", shards, 1)
    evaluated.path.write_text(json.dumps({**evaluated.metrics, "top1_error": 0.0}))
    assert not evaluated.check()  # the predictions have one error
    evaluated.path.write_text("{}")
    with pytest.raises(Refused, match="lacks"):
        evaluated.check()


@pytest.mark.parametrize("passes", [pytest.param(True, marks=pytest.mark.faults), False])
def test_the_component_runs_this_program_as_a_step(
    passes: bool, client: MlflowClient, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Kubeflow's Python component calls it: a bool, or the program's exit code."""
    good, bad = Evaluated(tmp_path / "e", shards, 1), tmp_path / "bad.json"
    bad.write_text("{}")
    if passes:
        assert gate_passes(SECTION, str(shards.directory), str(good.folder), str(good.path)) is True
        return
    with pytest.raises(SystemExit) as exited:
        gate_passes(SECTION, str(shards.directory), str(good.folder), str(bad))
    assert exited.value.code == 78
