"""A study as Kubeflow runs: the real submission against the fake server; what the cluster would store is put there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import kfpserver
import pytest
from kfpserver import ROUTES, Frame
from kfpstate import Ask, Item, KfpState
from kfpworld import World, package, world  # noqa: F401
from test_paper_runs import write_recipe

from components.closure import fingerprints
from pipelines.kfp.failure import RunFailed
from pipelines.paper import __main__ as paper
from runtime import manifest
from runtime.errors import Refused
from runtime.store import storage

IMAGES = "/store/photographs"


class Store:
    """Finished outputs in VGG_STORE, as the stages of a run with these arguments leave them there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, kind: str, identity: dict[str, Any], **body: Any) -> tuple[Path, dict[str, Any]]:
        folder = self.root / kind / manifest.digest_of(identity)[: storage.KEY_DIGITS]
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / "step-00000008/weights.safetensors"
        weights.parent.mkdir(exist_ok=True)
        weights.write_bytes(manifest.canonical_json(identity))
        entry = manifest.file_entry(folder, "step-00000008/weights.safetensors")
        return folder, manifest.write(folder, f"vgg.{kind}/1", body, [entry])

    def finish(self, given: dict[str, Any]) -> None:
        """Whatever a run with these arguments makes.  The identities are those of components.stage.Stage."""

        def identity(stage: str, **inputs: str) -> dict[str, Any]:
            return {stage: given[stage], "code": fingerprints(stage), **inputs}

        folder, content = self.put("shards", identity("shard", images=given["images"]))
        inputs = {"shards": manifest.directory_digest(folder, content)}
        first = {}
        if given.get("initial"):
            address, _, digest = given["initial"].partition("#")
            before = Path(storage.resolve(address))
            entries = manifest.read(before, "vgg.checkpoints/1")
            assert manifest.directory_digest(before, entries) == digest  # as training verifies it
            first["initial"] = hashlib.sha256((before / "step-00000008/weights.safetensors").read_bytes()).hexdigest()
        trained = self.put("checkpoints", identity("train", **inputs, **first), last="step-00000008")
        inputs["checkpoint"] = manifest.directory_digest(*trained)
        self.put("predictions", identity("evaluate", **inputs))


def test_runs_go_one_after_another_and_a_finished_one_is_not_submitted_again(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VGG_STORE", str(tmp_path / "store"))
    store, create, broken = Store(tmp_path / "store"), world.kfp.create_run, set()

    def run_and_store(ask: Ask) -> Item:
        given = ask.body["runtime_config"]["parameters"]
        if given["train"]["configuration"] not in broken:
            store.finish(given)
        return create(ask)

    served = [(*r[:2], lambda _, ask: run_and_store(ask), r[3]) if r[2] is KfpState.create_run else r for r in ROUTES]
    monkeypatch.setattr(kfpserver, "ROUTES", served)
    for name, init in (("a", "kaiming"), ("b", "shallower"), ("d", "shallower")):
        write_recipe(tmp_path / f"r/{name}.yaml", configuration=name.upper(), init=init, train_scale=32)
    flags = ["--run", "--cluster", "--recipes", str(tmp_path / "r"), "--folder", str(tmp_path / "runs")]
    flags += ["--images", IMAGES, "--", "--host", world.kfp.endpoint, "--poll", "0.01", *world.images()]

    broken.add("D")  # "succeeds", but what it should have made is not there
    with pytest.raises(Refused, match="run d has succeeded, but its predictions are not in the store"):
        paper.main(flags)
    given = [run["runtime_config"]["parameters"] for run in world.kfp.runs]
    assert [one["train"]["configuration"] for one in given] == ["A", "B", "D"]
    assert not given[0].get("initial")
    assert given[1]["initial"].startswith("store:checkpoints/") and given[1]["initial"] == given[2]["initial"]
    assert {one["images"] for one in given} == {IMAGES}
    assert len({one["images_version"] for one in given}) == 1  # Kubeflow takes the shards from its cache

    world.kfp.frames = [Frame("FAILED", {"train": "FAILED"}, {"train": "components.train: exit code 65: bad image"})]
    with pytest.raises(RunFailed, match=r"(?s)run d: .*bad image") as failed:
        paper.main(flags)
    assert failed.value.exit_code == 65
    assert len(world.kfp.runs) == 4  # only D once more

    broken.clear()  # evaluated, but the gate is closed: the table has what it needs
    gate = {"gate": "components.register.gate: exit code 78: worse than the champion"}
    world.kfp.frames = [Frame("FAILED", {"gate": "FAILED"}, gate)]
    paper.main(flags)
    assert "run d is evaluated, but was not registered" in world.caplog.text
    for name in "abd":
        assert manifest.read(tmp_path / "runs" / name, "vgg.predictions/1")
    paper.main(flags)
    assert len(world.kfp.runs) == 5
    assert not world.kfp.surprises
