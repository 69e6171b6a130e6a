"""The exported graphs: compared with the network, without weights of their own, usable without this project."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import run

from components.register.version import exports
from runtime.errors import Refused
from runtime.shards.shardset import ShardSet
from vgg.network.trained import Trained

USER = """
import sys, numpy as np, onnxruntime, torch
from safetensors.torch import load_file
images = np.load("images.npy")
weights = load_file("weights.safetensors")
for count in (1, len(images)):
    pt2 = torch.export.load("model.pt2").module()(weights, torch.from_numpy(images[:count]))
    onnx = onnxruntime.InferenceSession("model.onnx").run(["probabilities", "embedding"], {"images": images[:count]})
    for ours, theirs in zip(pt2, onnx):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)
np.savez("found.npz", *onnx)
assert not {"vgg", "runtime", "components"} & sys.modules.keys()
"""


def export(shards: ShardSet, tmp_path: Path, **changes: object) -> tuple[Trained, Path]:
    """A training of one epoch and the folder of its graphs, which lie beside its weights."""
    run(shards, tmp_path / "model", epochs=1, **changes)
    trained, folder = Trained.open(tmp_path / "model"), tmp_path / "written"
    folder.mkdir()
    shutil.copy(trained.step.path / "weights.safetensors", folder)
    jpegs = [shards.split("val").read(n) for n in range(8)]
    written = exports.export(trained, folder, ["pt2", "onnx"], jpegs, 40, 10**6)
    assert written == {form: str(folder / f"model.{form}") for form in ("pt2", "onnx")}
    assert max(Path(path).stat().st_size for path in written.values()) < 200_000
    return trained, folder


def test_graphs_answer_as_the_network_does(narrow: None, shards: ShardSet, tmp_path: Path) -> None:
    """export() itself compares them; here that it does: other weights are refused."""
    trained, folder = export(shards, tmp_path, batch_norm=True)
    layout = exports._layout(folder / "weights.safetensors")
    offset, length = layout["classifier.6.weight"]
    with open(folder / "weights.safetensors", "r+b") as file:
        file.seek(offset)
        file.write(np.full(length // 4, 0.5, np.float32).tobytes())
    with pytest.raises(Refused, match=r"model\.onnx differs from the network on validation images: probabilities by"):
        exports.export(trained, folder, ["onnx"], [shards.split("val").read(0)], 40, 10**6)


@pytest.mark.faults
@pytest.mark.parametrize(("configuration", "batch_norm"), [("A", True), ("A-LRN", False), ("C", False), ("E", False)])
def test_graphs_work_without_this_project(
    configuration: str, batch_norm: bool, shards: ShardSet, tmp_path: Path
) -> None:
    trained, folder = export(shards, tmp_path, configuration=configuration, batch_norm=batch_norm)
    elsewhere = folder.rename(tmp_path / "elsewhere")
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.save(elsewhere / "images.npy", images)
    done = subprocess.run(
        [sys.executable, "-P", "-c", USER], cwd=elsewhere, capture_output=True, text=True, timeout=120,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = np.load(elsewhere / "found.npz")
    with torch.no_grad():
        network = trained.network()
        x = exports.Prepare(**trained.manifest["pixels"])(torch.from_numpy(images))
        np.testing.assert_allclose(found["arr_0"], network(x).softmax(1).numpy(), atol=1e-4)
        fc7 = network.classifier[:5](network.features(x).flatten(1))
        np.testing.assert_allclose(found["arr_1"], fc7.numpy(), atol=1e-3)


def test_a_graph_that_differs_is_refused() -> None:
    probabilities, embedding = np.full((2, 3), 1 / 3, np.float32), np.full((2, 16), 5, np.float32)
    exports.compare("model.onnx", [probabilities + 5e-5, embedding + 1e-3], [probabilities, embedding])
    for found in (
        [probabilities + 2e-4, embedding],
        [probabilities, embedding + 1e-2],
        [probabilities * np.nan, embedding],
        [probabilities[:1], embedding],
    ):
        with pytest.raises(Refused, match=r"model\.onnx differs from the network"):
            exports.compare("model.onnx", found, [probabilities, embedding])
