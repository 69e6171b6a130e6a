"""A version with a localiser: JPEG in, classes with boxes out, as the localise stage found them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from conftest import environment, flags, program
from localised import flags as localise_flags
from localised import prepared, project, shards  # noqa: F401
from stepcommand import command_of

from components.classify.__main__ import main as classify
from components.lineage.__main__ import main as lineage
from components.register.__main__ import main as register
from pipelines.definition.package import compiled
from runtime import manifest
from runtime.errors import Refused
from runtime.shards.shardset import ShardSet

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
ADDED = {"artifacts/localiser.json", "artifacts/localiser.safetensors"}


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_from_boxes_to_a_served_model(
    project: Path,
    shards: ShardSet,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(project)
    uri = f"sqlite:///{project}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)

    def run(stage: str, words: list[object]) -> None:
        done = program(stage, *words, cwd=project)
        assert done.returncode == 0, done.stderr

    plain = [str(word) for word in flags("register", project, project / "params.yaml")]
    boxed = [*plain, "--localiser", str(project / "localiser"), "--localisations", str(project / "localisations")]
    run("evaluate", flags("evaluate", project, project / "params.yaml"))
    run("localise", localise_flags(project))
    register(plain)
    run("register", list(boxed))

    # another version, with two more files; the others have the same bytes, but for what names the run
    client = mlflow.MlflowClient()
    assert client.get_registered_model("tiny").aliases == {"champion": 2}  # the same weights: still the champion
    tags = [client.get_model_version("tiny", number).tags for number in ("1", "2")]
    assert "localiser_sha256" not in tags[0] and "class_given_error" in tags[1]
    folders = [Path(mlflow.artifacts.download_artifacts(f"models:/tiny/{number}")) for number in (1, 2)]
    listed = [
        {e["path"]: e["sha256"] for e in json.loads((folder / "files.json").read_bytes())["files"]}
        for folder in folders
    ]
    assert listed[1].keys() - listed[0].keys() == ADDED
    differ = {path for path, sha256 in listed[0].items() if listed[1][path] != sha256}
    assert differ == {"MLmodel", "artifacts/MODEL_CARD.md", "artifacts/provenance.json"}
    assert listed[1]["artifacts/localiser.safetensors"] == tags[1]["localiser_sha256"]
    cards = [(folder / "artifacts/MODEL_CARD.md").read_text() for folder in folders]
    assert "## Boxes" in cards[1] and "both corners inside the box" in cards[1] and "Boxes" not in cards[0]
    signatures = [(folder / "MLmodel").read_text() for folder in folders]
    assert '"name": "boxes"' in signatures[1] and '"name": "boxes"' not in signatures[0]

    # the boxes of the evaluation
    model, split = mlflow.pyfunc.load_model("models:/tiny@champion"), shards.split("val")
    guesses, boxes = (np.load(project / f"localisations/{name}.npy") for name in ("guesses", "boxes"))
    answers = model.predict([split.read(number) for number in range(len(split))])
    for number, row in answers.iterrows():
        known = dict(zip(guesses[number].tolist(), (boxes[-1, number] - [0, 0, 1, 1]).tolist(), strict=True))
        assert row["boxes"] == [known[label] for label in row["classes"]]
    assert "boxes" not in model.predict(split.read(0), params={"boxes": False}).columns
    assert [len(row) for row in model.predict(split.read(0), params={"top_k": 2})["boxes"]] == [2]

    # for people
    (project / "photo.jpg").write_bytes(split.read(0))
    capsys.readouterr()
    classify(["models:/tiny@champion", "photo.jpg", "--top", "1"])
    box = answers["boxes"][0][0]
    assert capsys.readouterr().out.rstrip().endswith("  box {}, {}, {}, {}".format(*box))
    classify(["models:/tiny@champion", "photo.jpg", "--json"])
    assert [p["box"] for p in json.loads(capsys.readouterr().out)["predictions"]] == answers["boxes"][0]
    classify(["models:/tiny/1", "photo.jpg", "--json"])
    assert "box" not in json.loads(capsys.readouterr().out)["predictions"][0]

    # again: the same version; without: the one without
    caplog.set_level("INFO", "vgg")
    register(boxed)
    assert "version 2 is champion (these weights were registered before)" in caplog.text
    digest = json.loads((project / "m/register.record.json").read_text())["inputs"]["localiser"]
    lineage(["models:/tiny@champion", "--verify"])
    shown = capsys.readouterr().out
    assert f"localiser {digest}" in shown and "DAMAGED" not in shown
    register(plain)
    assert client.get_registered_model("tiny").aliases == {"champion": 1}

    # damage is found, and another version made
    stored = next(path for path in (project / "mlruns").rglob("localiser.safetensors"))
    content = bytearray(stored.read_bytes())
    content[-50] ^= 1
    stored.write_bytes(content)
    with pytest.raises(ValueError, match=r"localiser.json says [0-9a-f]{64}: the weights are damaged"):
        mlflow.pyfunc.load_model("models:/tiny/2")
    register(boxed)
    assert client.get_model_version("tiny", "2").tags["vgg.damaged"].startswith("artifacts/localiser.safetensors")
    assert client.get_registered_model("tiny").aliases == {"champion": 3}

    # what does not belong together
    entry = next((project / "localiser").rglob("weights.safetensors"))
    content = bytearray(entry.read_bytes())
    entry.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Refused, match="does not have the sha256"):
        register(boxed)
    entry.write_bytes(content)
    swapped = [*plain, "--localiser", str(project / "model"), "--localisations", str(project / "localisations")]
    with pytest.raises(Refused, match="no localiser"):
        register(swapped)
    other: dict[str, Any] = json.loads((project / "localisations/manifest.json").read_text())
    body = {name: value for name, value in other.items() if name in ("localise", "metrics", "inputs", "classes_sha256")}
    for change, message in (
        ({"inputs": {**body["inputs"], "weights_sha256": "0" * 64}}, "of another localiser"),
        ({"inputs": {**body["inputs"], "shards": "0" * 32 + ".dir"}}, "of other shards"),
        ({"metrics": {**body["metrics"], "classifier_sha256": "0" * 64}}, "made from other weights"),
        ({"localise": {**body["localise"], "fuse": ["x"]}}, "boxes of several localisers"),
    ):
        manifest.write(project / "localisations", other["schema"], {**body, **change}, other["files"])
        with pytest.raises(Refused, match=message):
            register(boxed)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_the_commands_of_both_steps_run(
    project: Path,
) -> None:
    """As a launcher starts them, from the store: localise trains in its pod, register takes what it has made."""
    store, params = project / "store", json.loads((project / "params.yaml").read_text())
    tracking = f"sqlite:///{project}/mlflow.db"
    done = program("evaluate", *flags("evaluate", project, project / "params.yaml"), cwd=project)
    assert done.returncode == 0, done.stderr
    given = {
        "images": str(project / "images"), "images_version": "", "shards": str(project / "shards"),
        "checkpoint": str(project / "model"), "predictions": str(project / "predictions"), "image": "localhost/x:1",
        "gpus": "0", "cpu": "2", "memory": "4Gi",
    }  # fmt: skip

    def step(name: str, **more: str) -> dict[str, str]:
        folder = project / "out"
        floats = json.loads(json.dumps(params[name]), parse_int=float)
        command = command_of(compiled(True), name, {**given, **more, "params": floats}, folder)
        env = environment(VGG_STORE=str(store), MLFLOW_TRACKING_URI=tracking, VGG_PIPELINE_RUN="run-9")
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        found: dict[str, str] = json.loads((folder / f"{name}-output.json").read_text())["parameterValues"]
        return found

    boxes = step("localise")
    assert boxes.keys() == {"localiser", "localisations"}
    assert boxes["localiser"].startswith("store:localisers/")
    assert step("register", **boxes) == {"model": "models:/tiny@champion"}
    client = mlflow.MlflowClient(tracking, tracking)
    tags = client.get_model_version("tiny", "1").tags
    assert json.loads((project / "out/metrics").read_text())["localiser_sha256"] == tags["localiser_sha256"]
    [experiment] = [e for e in client.search_experiments() if e.name == "vgg-imagenet"]
    runs = client.search_runs([experiment.experiment_id], "tags.`vgg.stage` = 'localise'")
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert runs[0].data.tags["vgg.result.localiser"] == boxes["localiser"].partition("#")[2]
    assert runs[0].data.tags["mlflow.parentRunId"]
