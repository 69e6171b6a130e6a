"""Processes that register light models at the same time, as the register stage does: python promoters.py < JSON.

Input: {"name", "rounds": [[[weights, number of wrong images], … one a process] …], "expiry"}; {} in the name is the
number of the round; the address of MLflow is MLFLOW_TRACKING_URI.  In every round all processes begin
together.  A process whose request fails runs again, as an orchestrator does after 69 and 75.

Output: a line of JSON per registration: round, weights, version, role, tries.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from components.evaluate import hits
from components.register import champion, promotion
from components.register.compare import rolled_back, stored_hits
from components.register.registry import Registry, State, Upload
from components.tracking.problems import translated
from runtime.errors import Preempted, Unreachable
from vgg.evaluation.gate import Contender, Hits, Verdict, judge
from vgg.params.register import Gate

NUM_IMAGES, DIGEST = 100, "0" * 32 + ".dir"
GATE = Gate(max_top1_error=0.9, max_top5_error=1.0, max_regression=0.2, confidence=0.95, incomparable_champion="refuse")


class Light:
    """A candidate of one small file.  wrong: how many of the images it misclassifies, the first ones."""

    def __init__(self, models: Registry, weights: int, wrong: int) -> None:
        self.models, self.weights_sha256 = models, f"{weights:064x}"
        top1 = np.arange(NUM_IMAGES) >= wrong
        self.hits = Hits(DIGEST, top1, np.ones(NUM_IMAGES, bool))
        self.errors = {"top1_error": wrong / NUM_IMAGES, "top5_error": 0.0, "num_images": NUM_IMAGES}
        self.errors["data_digest"] = DIGEST

    localiser_sha256 = ""

    def is_quick(self, state: State) -> bool:
        return True

    def __call__(self, state: State) -> Verdict:
        contenders = [Contender("this", self.weights_sha256, self.errors, self.hits)]
        if found := state.champion:
            contenders.append(Contender(found.version, found.weights_sha256, found.evaluation, self.of(found)))
        back = rolled_back(state, self.weights_sha256) if state.champion else ""
        return judge(GATE, contenders[0], contenders[1] if state.champion else None, NUM_IMAGES, DIGEST, back)

    def of(self, found: champion.Champion) -> Hits | None:
        return None if found.weights_sha256 == self.weights_sha256 else stored_hits(self.models.name, found)

    def upload(self) -> Upload:
        client = self.models.client
        logged = client.create_logged_model("0", self.models.name)
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "artifacts").mkdir()
            (Path(scratch) / "artifacts" / hits.FILE).write_bytes(hits.write(self.hits, "0" * 64))
            client.log_model_artifacts(logged.model_id, scratch)
        tags = {"weights_sha256": self.weights_sha256, "evaluation": json.dumps(self.errors)}
        return Upload(f"models:/{logged.model_id}", None, tags, "light", logged.model_id)

    def discard(self, upload: Upload) -> None:
        self.models.client.delete_logged_model(upload.model_id)

    def verify(self, version: Any) -> str:
        assert version.tags["weights_sha256"] == self.weights_sha256
        return ""


def promoter(number: int, given: dict[str, Any], barrier: Any, lines: Any) -> None:
    try:
        for n, round_ in enumerate(given["rounds"]):
            barrier.wait(given.get("patience", 120))
            name = given["name"].format(n)
            weights, wrong = round_[number]
            tries = 0
            while True:
                tries += 1
                try:
                    with translated():
                        models = Registry(name)
                        light = Light(models, weights, wrong)
                        outcome = promotion.register(models, light, light, expiry=given["expiry"])
                    break
                except (Unreachable, Preempted):
                    continue
            lines.put(
                {"round": n, "weights": weights, "version": outcome.version, "role": outcome.role, "tries": tries}
            )
    except BaseException:
        lines.put({"failed": traceback.format_exc()})
        barrier.abort()


def main() -> None:
    import mlflow.store.artifact.mlflow_artifacts_repo  # noqa: F401  # imported once, before the fork
    import sqlalchemy  # noqa: F401

    given = json.load(sys.stdin)
    count = len(given["rounds"][0])
    fork = multiprocessing.get_context("fork")
    barrier, lines = fork.Barrier(count), fork.SimpleQueue()
    processes = [fork.Process(target=promoter, args=(n, given, barrier, lines)) for n in range(count)]
    for process in processes:
        process.start()
    expected, failed = count * len(given["rounds"]), False
    for _ in range(expected):
        line = lines.get()
        print(json.dumps(line), flush=True)
        if "failed" in line:
            failed = True
            break
    for process in processes:
        process.join(20)
        if process.is_alive():
            process.kill()
    sys.stdout.flush()
    os._exit(1 if failed else 0)


if __name__ == "__main__":
    main()
