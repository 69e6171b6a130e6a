"""Checks of whole runs: the digits end to end, the same again, and one changed parameter."""

from __future__ import annotations

import json
import re
import time
from typing import Any

from pipelines.arguments import sections
from pipelines.prove import pods
from pipelines.prove.bench import LOOSE, SMALL, STEPS, Bench, Different, NotTried, committed

CHANGED = "evaluate.test_scales=[33, 34]"


def digits(bench: Bench) -> str:
    began = time.monotonic()
    run_id = bench.facts["digits"] = bench.start("digits")
    bench.ended(run_id)
    ran = bench.executed(run_id)
    if missing := [step for step in STEPS if step not in ran]:
        raise Different(f"SUCCEEDED, but without a pod of {', '.join(missing)}; the gate may be closed")
    return f"SUCCEEDED in {time.monotonic() - began:.0f} s: {', '.join(ran)}"


def metrics(bench: Bench) -> str:
    """Of the digits' evaluation, from its verified manifest in the store."""
    wanted = json.loads(committed("metrics/evaluate.json"))
    found = evaluation(bench, [])
    seen, (low, high) = found["metrics"], wanted["top1_interval"]
    if found["inputs"]["shards"] != wanted["data_digest"]:
        raise Different(f"other shards: {found['inputs']['shards']} instead of {wanted['data_digest']}")
    same = all(seen.get(name) == value for name, value in wanted.items() if name in seen)
    said = f"{seen['num_images']} images, top-1 error {seen['top1_error']:.2%} (committed {wanted['top1_error']:.2%})"
    if seen["num_images"] != wanted["num_images"] or not low <= seen["top1_error"] <= high:
        raise Different(said)
    return f"{said}, the same shards" + (", the same metrics to the last bit" if same else "")


def again(bench: Bench) -> str:
    """Kubeflow's cache does not know this training, whose CPUs are written in another way, but the store does."""
    given = dict(one.split("=", 1) for one in (*SMALL, *bench.args.settings) if "=" in one)
    run_id = bench.start("again", settings=(f"train_cpu={_another_text(given['train_cpu'])}",))
    bench.ended(run_id)
    ran = bench.executed(run_id)
    if wrong := [step for step in ("shard", "evaluate") if step in ran]:
        raise Different(f"{' and '.join(wrong)} ran again")
    if not (trainings := bench.step_pods(run_id, "train")):
        raise Different("train did not run: the cache takes 1 and 1000m CPUs for the same")
    log = bench.log_of(trainings[-1])
    if "epoch 1, step" in log or not (finished := re.search(r"step (\d+), weights", log)):
        raise Different("the training step did not find the finished training")
    return f"shard and evaluate from Kubeflow's cache; train found the finished training of {finished[1]} steps"


def changed(bench: Bench) -> str:
    before = evaluation(bench, [])
    run_id = bench.start("evaluate", overrides=(CHANGED, *LOOSE))
    bench.ended(run_id)
    ran = bench.executed(run_id)
    if wrong := [step for step in ("shard", "train") if step in ran]:
        raise Different(f"{' and '.join(wrong)} ran again")
    if "evaluate" not in ran:
        raise Different("evaluate did not run")
    found = evaluation(bench, [CHANGED])
    if found["inputs"]["weights_sha256"] != before["inputs"]["weights_sha256"]:
        raise Different("other weights were evaluated")
    return f"only {', '.join(ran)} ran; the same weights, {found['metrics']['headline']}"


def evaluation(bench: Bench, overrides: list[str]) -> dict[str, Any]:
    """The finished evaluation of the digits with these parameters."""
    wanted = sections(bench.params, overrides)["evaluate"]
    found = [one for one in pods.inside(bench, "stored") if one["evaluate"] == wanted]
    if len(found) != 1:
        raise Different(f"{len(found)} evaluations with these parameters are in the store, instead of 1")
    return dict(found[0])


def _another_text(cpus: str) -> str:
    """The same number of CPUs, written in another way."""
    if cpus.endswith("m"):
        return f"{int(cpus[:-1]) / 1000:g}"
    try:
        return f"{float(cpus) * 1000:g}m"
    except ValueError:
        raise NotTried(f"train_cpu={cpus} cannot be written in another way") from None
