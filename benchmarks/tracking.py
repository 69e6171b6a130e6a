"""What tracking costs a training step, with MLflow there, absent and silent: python -m benchmarks.tracking [--json]

A stand-in for training computes steps of a fixed length, and reports a point every 20 steps as training does.  Measures
the time that a step waits in the tracker, and the mean length of a step beside one without a tracker; conditions
alternate, each as often first, so that other load on the machine meets all of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import socket
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from components.tracking.tracker import Tracker
from vgg.training.reporting import LOG_STEPS

TARGET = 0.01  # of a step
BEFORE = 100  # steps that are not measured: MLflow is opened, once a run
POINT = {
    "loss/train": 1.0,
    "error_percent/train_top1": 50.0,
    "schedule/learning_rate": 0.01,
    "speed/images_per_second": 1.0,
}


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.tracking", description=__doc__)
    flags.add_argument("--json", action="store_true", help="print the figures as JSON")
    flags.add_argument("--rounds", type=int, default=6, help="of every condition (default 6)")
    flags.add_argument("--steps", type=int, default=400, help="of a round (default 400)")
    args = flags.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        figures = measure(Path(folder), args.rounds, args.steps)
    figures["machine"] = machine.describe()
    print(json.dumps(figures) if args.json else report(figures))


def measure(folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Share of a step that it waits for the tracker (waits), and length of a step in ms, by condition: medians."""
    importlib.import_module("mlflow")  # seconds of a thread, once a process
    os.environ["VGG_JOURNAL"] = str(folder / "journal")
    found: dict[str, list[tuple[float, float]]] = {}
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, never answers
        addresses = {
            "no tracker": "",
            "a database": f"sqlite:///{folder}/mlflow.db",
            "server absent": "http://127.0.0.1:9",
            "server silent": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        for number in range(rounds):
            for position in range(len(addresses)):
                condition, address = list(addresses.items())[(number + position) % len(addresses)]
                found.setdefault(condition, []).append(train(f"{condition}-{number}", address, steps))
    return {
        "conditions": {
            name: {
                "waits": statistics.median(waits for waits, _ in all_),
                "ms": statistics.median(ms for _, ms in all_),
            }
            for name, all_ in ((name, found[name]) for name in addresses)
        }
    }


def train(name: str, address: str, steps: int) -> tuple[float, float]:
    """(share of the time that steps wait for the tracker, mean length of a step in ms)."""
    matrix, lengths, waited = np.ones((1024, 1024), np.float32), [], 0.0
    with ExitStack() as open_:
        tracker = None
        if address:
            os.environ["MLFLOW_TRACKING_URI"] = address
            tracker = Tracker("train", name, name)
            tracker._sender.start()  # without its end: a flush is no part of a step
            open_.callback(tracker._closing.set)
        for step in range(1 - BEFORE, steps + 1):
            began, waiting = time.perf_counter(), 0.0
            matrix = np.tanh(matrix @ matrix)
            if tracker and step % LOG_STEPS == 0:
                before = time.perf_counter()
                tracker.point(step + BEFORE, POINT)
                waiting = time.perf_counter() - before
            if step > 0:
                waited += waiting
                lengths.append(time.perf_counter() - began)
    return waited / sum(lengths), 1000 * statistics.mean(lengths)


def report(figures: dict[str, Any]) -> str:
    lines = [figures["machine"] if isinstance(figures["machine"], str) else json.dumps(figures["machine"]), ""]
    lines.append(f"{'MLflow':15} {'step ms':>8} {'longer %':>9} {'waits %':>8}")
    for name, row in figures["conditions"].items():
        longer = row["ms"] / figures["conditions"]["no tracker"]["ms"] - 1
        mark = "" if max(row["waits"], longer) <= TARGET else "  above 1 %"
        lines.append(f"{name:15} {row['ms']:8.2f} {100 * longer:9.2f} {100 * row['waits']:8.3f}{mark}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
