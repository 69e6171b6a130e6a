"""The chain of a localiser: found from its folder, its boxes and its run; a flipped bit in any of them is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from localised import finished, prepared  # noqa: F401  # fixtures
from mlflow import MlflowClient

from components.doctor import files
from components.doctor.finding import Patient
from components.lineage import render, verify, walk
from components.lineage.links import Link

CHAIN = ["localisations", "localiser", "training", "boxes", "data", "source"]


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished project, with the stages that made it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    made = {"shard": ["shards"], "train": ["model"], "localise": ["boxes", "localiser", "localisations"]}
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {name: {"outs": outs} for name, outs in made.items()}}))
    (tmp_path / "metrics").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def verified(reference: str, project: Path) -> Link:
    steps = walk.Walk(project)
    chain = steps.start(reference)
    verify.verify(chain, steps.server, steps.locator)
    return chain


def test_the_chain_from_a_folder_and_from_a_run(project: Path) -> None:
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    [experiment] = client.search_experiments(filter_string="name = 'vgg-imagenet'")
    [run] = client.search_runs([experiment.experiment_id], "tags.`vgg.stage` = 'localise'")
    for reference, kinds in (
        ("localisations", CHAIN), (run.info.run_id, CHAIN), ("localiser", CHAIN[1:]), ("boxes", CHAIN[3:]),
    ):  # fmt: skip
        chain = verified(reference, project)
        assert [link.kind for link in chain.all()] == kinds
        assert verify.broken(chain) == []
        assert [link.state for link in chain.all() if link.kind != "source"] == ["verified"] * (len(kinds) - 1)
    text = "\n".join(render.tree(verified("localisations", project), project))
    assert "localisation error " in text and run.info.run_id in text
    assert "localise run" in str(verified("model", project).used_by)


@pytest.mark.parametrize(
    "damaged",
    [
        "localiser/step-*/weights.safetensors", "localiser/manifest.json", "boxes/train.boxes.npy",
        "boxes/manifest.json", "localisations/boxes.npy", "localisations/val.pred.det.txt",
        "localisations/manifest.json",
    ],
)  # fmt: skip
def test_a_flipped_bit_is_named(damaged: str, project: Path) -> None:
    reference = verified("localisations", project).digest
    [path] = project.glob(damaged)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    kind = damaged.partition("/")[0]
    broken = verify.broken(verified(reference, project))
    assert broken and all(path.name in line and line.startswith(kind) for line in broken), broken
    [finding] = files.damaged(Patient(project, deep=True))
    assert path.name in finding.what and "stage localise again" in finding.cure
