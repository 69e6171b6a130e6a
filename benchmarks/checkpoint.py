"""What a checkpoint of VGG-16 with its momentum (1.1 GB) costs training: python -m benchmarks.checkpoint [--json]

Saves some checkpoints in the background while a stand-in for training computes.  Measures how long each one blocks
training, how much slower training is while one is written, and how fast a checkpoint is verified before loading.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from runtime import checkpoint, manifest
from runtime.saver import Saver
from vgg.network.model import Architecture, blank

NETWORK = Architecture("D", False, 4096, 1000, 224)
INTERVAL_STEPS, BATCH, IMAGES_PER_SECOND = 2000, 256, 4500  # recipes/imagenet-d-*.yaml; the goal of one H200
TARGETS = {"blocked_share": 0.01, "verify_gb_per_s": 1.0}


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.checkpoint", description=__doc__)
    flags.add_argument("--json", action="store_true", help="print the figures as JSON")
    flags.add_argument("--directory", type=Path, help="where to save (default: the folder for temporary files)")
    flags.add_argument("--saves", type=int, default=4, help="how many (default 4); the first one allocates memory")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        figures = measure(Path(folder), args.saves)
    figures["machine"] = machine.describe()
    print(json.dumps(figures) if args.json else report(figures))


def measure(folder: Path, saves: int) -> dict[str, Any]:
    """Save one checkpoint after the other while the stand-in computes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # one core computes, another one writes: with a GPU, computing takes no core either
    model = blank(NETWORK)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = dict(model.state_dict())
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    metadata = {"network": NETWORK.as_dict(), "run": {}, "versions": {}}
    saver = Saver(folder, metadata, keep=2, saved=lambda: None)
    alone = steps_per_second(device, lambda: False, 3.0)
    blocked, written, while_writing = [], [], []
    for number in range(1, saves + 1):
        before, start = saver.blocked_seconds, time.monotonic()
        saver.save(weights, momentum, {"step": number, "best_step": 0})
        if device.type == "cuda":
            torch.cuda.synchronize()
        blocked.append(time.monotonic() - start if device.type == "cuda" else saver.blocked_seconds - before)
        while_writing.append(steps_per_second(device, saver.idle, 300.0))
        written.append(time.monotonic() - start)
        saver.settle()
    saver.close()
    last = folder / checkpoint.step_name(saves)
    size = sum(path.stat().st_size for path in last.iterdir())
    start = time.process_time()
    for entry in manifest.read(last, checkpoint.STEP_SCHEMA)["files"]:
        manifest.verify_file(last, entry)
    verified = size / 1e9 / (time.process_time() - start)
    interval = INTERVAL_STEPS * BATCH / IMAGES_PER_SECOND
    later = blocked[1:] or blocked
    slower = [max(0.0, 1 - rate / alone) * seconds for rate, seconds in zip(while_writing, written, strict=True)]
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "bytes": size,
        "blocked_seconds": round(max(later), 3),
        "blocked_seconds_first": round(blocked[0], 3),
        "blocked_share": round(max(later) / interval, 5),
        "slower_share": round(max(slower[1:], default=0.0) / interval, 5),
        "written_seconds": round(max(written), 2),
        "verify_gb_per_s": round(verified, 2),
        "interval_seconds": round(interval, 1),
    }


def steps_per_second(device: torch.device, ended: Callable[[], bool], max_seconds: float) -> float:
    """The stand-in for training: products of matrices, until `ended` or for max_seconds."""
    matrix = torch.randn(512, 512, device=device)
    start, count = time.monotonic(), 0
    while not ended() and time.monotonic() - start < max_seconds:
        for _ in range(10):
            matrix = torch.nn.functional.normalize(matrix @ matrix)
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 10
    return count / (time.monotonic() - start)


def report(figures: dict[str, Any]) -> str:
    blocked, slower = 100 * figures["blocked_share"], 100 * figures["slower_share"]
    lines = [
        f"{figures['machine']}; {figures['device']}",
        f"a checkpoint of {figures['bytes'] / 1e9:.2f} GB, written in {figures['written_seconds']} s",
        f"training is blocked for {figures['blocked_seconds']} s, {figures['blocked_seconds_first']} s the first time: "
        f"{blocked:.2f} % of {INTERVAL_STEPS:,} steps at {IMAGES_PER_SECOND:,} images/s, "
        f"{figures['interval_seconds']} s (goal: under {100 * TARGETS['blocked_share']:g} %)",
        f"while it is written, a computing core loses up to {slower:.2f} % of that time",
        f"verified at {figures['verify_gb_per_s']} GB a CPU-second (goal: {TARGETS['verify_gb_per_s']:g})",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
