"""Golden numbers: results do not change, in particular not by changes outside the identity of a stage.

Sharding must give recorded images, a small training in fp32 with one thread recorded weights, and evaluation recorded
errors.  After an intended change of results, `python tests/vgg/test_golden.py` records golden.json again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    tests = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(tests.parent), str(tests), str(tests / "fakes")]

import numpy as np
import torch
from conftest import ALONE, EVALUATE, NARROW, ROOT, SHARD, draw_images, environment, train_params
from trainings import Points

from runtime import manifest
from runtime.shards.shardset import ShardSet
from runtime.stopping import Never
from runtime.targets import Directory
from vgg import draws
from vgg.evaluation.evaluate import evaluate
from vgg.network.model import CONFIGURATIONS
from vgg.params.evaluate import EvaluateParams
from vgg.params.shard import ShardParams
from vgg.sharding.pack import pack
from vgg.sharding.sources import Folder
from vgg.training.loop import train
from vgg.training.task import Task

GOLDEN = Path(__file__).with_name("golden.json")
# 8 steps with momentum, decay, warm-up, dropout, colour shift, scales and micro-batches; without batch norm, which
# amplifies rounding a thousand times
PARAMS = {
    "learning_rate": 0.02, "weight_decay": 0.01, "micro_batch_size": 4,
    "schedule": {"rule": "steps", "warmup_epochs": 0.5, "drop_factor": 4, "drop_epochs": [1]},
}  # fmt: skip
# of the values of a tensor, relative to its norm.  Another instruction set: 4e-7; the smallest of CHANGES: 3e-4.
TOLERANCE = 1e-5

CHANGES = {  # changes of an operator or a constant: name and code
    "momentum": "import vgg.training.sgd as m; f = m.sgd; m.sgd = "
    "lambda *a, momentum, **o: f(*a, momentum=0.98 * momentum, **o)",
    "decay": "import vgg.training.sgd as m; f = m.sgd; m.sgd = "
    "lambda *a, weight_decay, **o: f(*a, weight_decay=0.9 * weight_decay, **o)",
    "nesterov": "import vgg.training.sgd as m; f = m.sgd; m.sgd = lambda *a, **o: f(*a, **o | {'nesterov': True})",
    "average pooling": "import vgg.network.model as m; m.nn.MaxPool2d = torch.nn.AvgPool2d",
    "leaky": "import vgg.network.model as m; m.nn.ReLU = lambda inplace: torch.nn.LeakyReLU(0.01)",
    "colours": "import vgg.data.augment as m; m.EIGENVALUES = (55.46, 4.794, 2.148)",
    "crops": "import vgg.data.stream as m; f = m.crop_window; m.crop_window = "
    "lambda w, h, s, size, x, y: f(w, h, s, size, y, x)",
    "dropout": "import vgg.draws as m; m.GOLDEN_INVERSE += 2",
    "an image out of place": "import vgg.data.stream as m; f = m.Order.epoch; m.Order.epoch = "
    "lambda self, e: torch.from_numpy(f(self, e)).roll(1).numpy()",
    "one step's rate": "import vgg.training.schedule as m; f = m.Schedule.rate; m.Schedule.rate = "
    "lambda self, step: f(self, step) * (1.1 if step == 3 else 1)",
}


def measured(folder: Path) -> dict[str, Any]:
    """Shard, train, evaluate.  Tensors are given by their norm and their projections on four random unit vectors."""
    torch.set_num_threads(1)
    CONFIGURATIONS["A"] = NARROW["A"]
    draw_images(folder / "images")
    pack(ShardParams(**SHARD), Folder(folder / "images"), Directory(folder / "shards"), "golden", num_workers=1)
    shards = ShardSet(folder / "shards")
    task = Task(params=train_params(**PARAMS), shards=shards, directory=folder / "model", code={})
    trained = train(task, ALONE, Points(), Never())
    assert trained is not None
    evaluated = evaluate(EvaluateParams(**EVALUATE), trained, shards, ALONE, lambda *_: None)
    assert evaluated
    tensors = {}
    for name, tensor in trained.step.weights().items():
        values = tensor.double().numpy().ravel()
        vectors = [draws.normal(name, n, np.arange(values.size)) for n in range(4)]
        tensors[name] = [float(np.linalg.norm(values)), *(float(values @ v / np.linalg.norm(v)) for v in vectors)]
    images = {split: [int(row["crc32c"]) for row in shards.split(split).rows] for split in ("train", "val")}
    return {
        "images": images,
        "mean": shards.mean,
        "samples": trained.step.state["samples"],
        "weights_sha256": trained.weights_sha256,
        "tensors": tensors,
        "predictions": {mode: found["loss"] for mode, found in evaluated.metrics["modes"].items()},
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def difference(found: dict[str, Any], golden: dict[str, Any]) -> float:
    """The largest difference of the values of a tensor, relative to its norm."""
    assert found["tensors"].keys() == golden["tensors"].keys()
    return max(
        max(abs(a - b) for a, b in zip(found["tensors"][name], golden["tensors"][name], strict=True))
        / golden["tensors"][name][0]
        for name in golden["tensors"]
    )


def run_alone(tmp_path: Path, change: str = "", **env: str) -> dict[str, Any]:
    """measured() in a separate process.  change: Python code that runs before it."""
    script = (
        "import json, sys, torch; from pathlib import Path; import test_golden\n"
        f"{change}\nprint(json.dumps(test_golden.measured(Path(sys.argv[1]))))"
    )
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/fakes", ROOT / "tests/vgg")))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment(PYTHONPATH=path, **env),
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_shards_training_and_evaluation_give_the_golden_numbers(tmp_path: Path) -> None:
    golden, found = json.loads(GOLDEN.read_text()), run_alone(tmp_path)
    assert found["images"] == golden["images"]
    assert found["mean"] == golden["mean"]
    assert found["samples"] == golden["samples"]
    if found["cpu"] == golden["cpu"] and found["weights_sha256"] != golden["weights_sha256"]:
        print(f"other bits on the same instruction set ({found['cpu']}): another CPU, or a change")
    assert difference(found, golden) < TOLERANCE
    assert found["predictions"] == pytest.approx(golden["predictions"], rel=1e-3)


@pytest.mark.faults
@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_another_instruction_set_is_within_the_tolerance(isa: str, tmp_path: Path) -> None:
    onednn = {"default": "SSE41", "avx2": "AVX2"}[isa]
    found = run_alone(tmp_path, ATEN_CPU_CAPABILITY=isa, ONEDNN_MAX_CPU_ISA=onednn)
    golden = json.loads(GOLDEN.read_text())
    assert found["weights_sha256"] != golden["weights_sha256"]
    assert difference(found, golden) < TOLERANCE / 5


@pytest.mark.faults
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_operator_is_far_outside_the_tolerance(change: str, tmp_path: Path) -> None:
    assert difference(run_alone(tmp_path, CHANGES[change]), json.loads(GOLDEN.read_text())) > 5 * TOLERANCE


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        manifest.write_json(GOLDEN, measured(Path(scratch)))
