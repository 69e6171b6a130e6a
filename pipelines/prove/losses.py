"""Checks that lose something on purpose: a training pod, a run, the pod of a node."""

from __future__ import annotations

import time
from typing import Any

from pipelines.kfp.runs import ENDED
from pipelines.preflight.checks import MISSING, TRAINER
from pipelines.prove.bench import SHORT, STEPS, Bench, Different, NotTried
from pipelines.prove.first import checked
from pipelines.prove.objects import Object

NODES = 2
INDEX = "batch.kubernetes.io/job-completion-index"  # label of a node's pod


def pod_deleted(bench: Bench) -> str:
    bench.expect_allowed(("delete", "pods"))
    run_id = bench.start("pod", overrides=("train.seed=2", *SHORT))
    lost = bench.training_under_way(run_id)["metadata"]
    bench.cluster.delete("pods", lost["name"])
    deleted = time.monotonic()

    def look() -> Object | None:
        bench.expect_active(run_id)
        anew = [p for p in bench.step_pods(run_id, "train") if p["metadata"]["uid"] != lost["uid"]]
        return anew[-1] if anew and anew[-1]["status"].get("phase") == "Running" else None

    pod = bench.until(look, "a new training pod", run_id)
    seconds = time.monotonic() - deleted
    bench.ended(run_id)
    return f"made anew in {seconds:.0f} s, continued at step {bench.continued_at(pod)}, SUCCEEDED"


def canceled(bench: Bench) -> str:
    run_id = bench.start("cancel", overrides=("train.seed=3", *SHORT))
    bench.training_under_way(run_id)
    bench.pipelines.cancel(run_id)
    asked = time.monotonic()

    def look() -> str | None:
        state = str(bench.pipelines.get(run_id).state)
        busy = [pod for pod in bench.step_pods(run_id, "train") if pod["status"].get("phase") == "Running"]
        return state if state in ENDED and not busy else None

    state = bench.until(look, "the end of the canceled run and of its training pod", run_id)
    if state == "SUCCEEDED":
        raise Different("the run was canceled, and SUCCEEDED")
    seconds = time.monotonic() - asked
    bench.pipelines.resume(run_id)
    bench.ended(run_id)
    ran = bench.executed(run_id)
    if ran.count("shard") > 1 or [step for step in STEPS if step not in ("shard", *ran)]:  # shard: from the cache
        raise Different(f"resumed and SUCCEEDED, but the pods are of {', '.join(ran)}")
    step = bench.continued_at(bench.step_pods(run_id, "train")[-1])
    return f"{state} after {seconds:.0f} s; resumed, continued at step {step}, SUCCEEDED; shard not repeated"


def nodes(bench: Bench) -> str:
    """On CPUs; the run goes on, for the next check."""
    if not bench.cluster.serves(*TRAINER, "trainjobs"):
        raise NotTried(f"the cluster serves no TrainJobs ({'/'.join(TRAINER)})")
    settings = (f"nodes={NODES}",)
    checks = checked(bench, "-C", settings[0])
    if missing := [str(finding) for finding in checks.findings if finding.state == MISSING]:
        raise NotTried("\n".join(missing))
    run_id = bench.start("nodes", overrides=("train.seed=4", *SHORT), settings=settings)
    pods = bench.until(lambda: _running(bench, run_id), f"{NODES} running pods of a TrainJob", run_id)
    bench.training_under_way(run_id)
    bench.facts["nodes"] = run_id
    return f"{', '.join(sorted(pod['metadata']['name'] for pod in pods))} train together"


def node_deleted(bench: Bench) -> str:
    bench.expect_allowed(("delete", "pods"))
    run_id = bench.facts["nodes"]
    before = bench.until(lambda: _running(bench, run_id), f"{NODES} running pods of a TrainJob", run_id)
    known = {pod["metadata"]["uid"] for pod in before}
    bench.cluster.delete("pods", before[-1]["metadata"]["name"])
    deleted = time.monotonic()

    def look() -> list[Object] | None:
        bench.expect_active(run_id)
        now = _running(bench, run_id)
        return now if now and not known & {pod["metadata"]["uid"] for pod in now} else None

    bench.until(look, "new pods of all nodes", run_id)
    seconds = time.monotonic() - deleted
    bench.ended(run_id)
    step = bench.continued_at(bench.step_pods(run_id, "train")[-1])  # its log has those of the nodes
    return f"all nodes made anew in {seconds:.0f} s, continued at step {step}, SUCCEEDED"


def _running(bench: Bench, run_id: str) -> list[Object] | None:
    """One running pod of every node, in the order of the nodes; None before all run."""
    bench.expect_active(run_id)
    found: dict[str, Any] = {}
    for pod in bench.cluster.training_pods(run_id):
        if pod["status"].get("phase") == "Running" and not pod["metadata"].get("deletionTimestamp"):
            found[pod["metadata"]["labels"].get(INDEX, pod["metadata"]["name"])] = pod
    return [found[index] for index in sorted(found)] if len(found) == NODES else None
