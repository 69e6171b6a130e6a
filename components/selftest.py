"""Check that an image contains what its steps need: python -m components.selftest {data,train,serve}

Runs the programs of a target on the embedded digits in a temporary folder, without a network, and prints the results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from components import program
from components.closure import ROOT
from runtime.errors import Refused

TIMEOUT_SECONDS = 600
SECTIONS: dict[str, dict[str, Any]] = {  # the smallest run of all stages
    "shard": {
        "source": "digits", "check_md5": True, "seed": 1, "samples_per_shard": 512, "max_pixels": 4096,
        "on_bad_image": "fail", "max_quarantined": 0,
    },
    "train": {
        "configuration": "A", "batch_norm": False, "classifier_width": 16, "input_size": 32, "init": "kaiming",
        "crop": "scale", "train_scale": 32, "decoder": "cpu", "flip": False, "colour_shift": 0.0, "standardise": True,
        "dropout": 0.0, "epochs": 1, "batch_size": 32, "micro_batch_size": "auto", "gradient_compression": "none",
        "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0,
        "schedule": {"rule": "steps", "warmup_epochs": 0, "drop_factor": 10, "drop_epochs": []},
        "precision": "auto", "deterministic": False, "seed": 1, "checkpoint_steps": 100, "keep_checkpoints": 2,
    },
    "evaluate": {
        "weights": "last", "methods": ["dense"], "test_scales": [32], "flip": False, "average": "posteriors",
        "softmax": "after_mean", "filter": "bilinear", "ceil_pooling": False, "fuse": [], "precision": "auto",
        "batch_pixels": 400000,
    },
    "register": {
        "model_name": "selftest", "exports": ["pt2", "onnx"],
        "gate": {
            "max_top1_error": 1.0, "max_top5_error": 1.0, "max_regression": 1.0, "confidence": 0.95,
            "incomparable_champion": "refuse",
        },
    },
}  # fmt: skip
SHARDS, OUT = ("--shards", "shards"), ("--metrics", "metrics.json")
FLAGS = {
    "shard": ("--images", "", *SHARDS, *OUT),
    "train": (*SHARDS, "--initial", "", "--checkpoint", "model", "--curves", "curves.csv", *OUT),
    "evaluate": (
        *(*SHARDS, "--checkpoint", "model", "--predictions", "predictions"),
        *("--confusion", "confusion.csv", "--report", "report.html", "--metrics", "evaluation.json"),
    ),
    "register": (
        *(*SHARDS, "--checkpoint", "model", "--predictions", "predictions", "--evaluation", "evaluation.json", *OUT),
    ),
}
STAGES = {
    "data": ("shard",),
    "train": ("shard", "train", "evaluate"),
    "serve": ("shard", "train", "evaluate", "register"),
}


def main() -> None:
    flags = program.Parser("components.selftest", __doc__)
    flags.add_argument("target", choices=STAGES)
    target = flags.parse_args().target
    print(f"user {os.getuid()}:{os.getgid()}, root file system {'read-only' if read_only(str(ROOT)) else 'WRITABLE'}")
    if target != "data":
        print(compiler())
        print(gpus())
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES[target]:
            started = time.monotonic()
            run(stage, Path(folder))
            print(f"{stage}: {time.monotonic() - started:.1f} s", flush=True)
    print("good")


def run(stage: str, folder: Path) -> None:
    """Run one stage in a folder.  Raises Refused with its whole output."""
    offline = {
        "PYTHONPATH": str(ROOT),
        "VGG_JOURNAL": str(folder / "tracking"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }
    done = subprocess.run(
        [sys.executable, "-m", f"components.{stage}", "--params", json.dumps(SECTIONS[stage]), *FLAGS[stage]],
        cwd=folder, env={**os.environ, **offline}, capture_output=True, timeout=TIMEOUT_SECONDS,
        encoding="utf-8", errors="backslashreplace",
    )  # fmt: skip
    if done.returncode:
        raise Refused(f"{stage}: exit code {done.returncode}:\n{done.stdout}{done.stderr}")


def read_only(path: str) -> bool:
    return not os.access(path, os.W_OK)


def compiler() -> str:
    """Check gcc, with which Triton builds its driver on the first use of a GPU.  Raises Refused if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "module.c"
        source.write_text("#include <Python.h>\nint answer(void) { return PY_MAJOR_VERSION; }\n", encoding="utf-8")
        include = sysconfig.get_paths("posix_prefix")["include"]
        command = ["gcc", str(source), "-shared", "-fPIC", f"-I{include}", "-o", f"{folder}/module.so"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=60, encoding="utf-8", errors="backslashreplace")
        except FileNotFoundError:
            raise Refused("gcc is missing: the network cannot be compiled for a GPU") from None
    if done.returncode:
        raise Refused(f"gcc cannot build a Python module:\n{done.stderr}")
    return "gcc builds Python modules"


def gpus() -> str:
    import torch

    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return f"torch {torch.__version__}, GPUs: {', '.join(names) or 'none'}"


if __name__ == "__main__":
    program.run(main)
