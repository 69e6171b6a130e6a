"""Stage 2 as a step of the pipeline: trains in this pod on one node, or supervises a TrainJob on several.

    python -m components.trainjob --nodes N --gpus G … components.train ARGUMENTS…

With one node it is replaced by components.launch.  With several it creates a TrainJob (Kubeflow Trainer 2.2 or later),
shows why pods wait and the log of node 0, and after completion verifies the checkpoint and writes the step's outputs.
If it runs again, it finds the same TrainJob and follows it; a failed one is deleted and created again, and continues
from the last checkpoint.  On SIGTERM it deletes the TrainJob, unless only its own pod is moved to another node.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from components import given, program
from components.trainjob.body import body, processes
from runtime import environment, stopping
from runtime.errors import Preempted, Problem, Refused, WrongParameters

if TYPE_CHECKING:
    from components.trainjob.cluster import Cluster

log = logging.getLogger("vgg.cluster")

STOP_SECONDS = 20.0  # for the pods to save and end after a stop signal; Kubernetes waits 30 s for this step
MOVED_SECONDS = 3.0  # of these, to find out what the signal means
DELETE_SECONDS = 900.0  # for the deletion of a failed TrainJob: its pods may have minutes to end
POLL_SECONDS = 2.0


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.trainjob", __doc__)
    given.add_flags(flags)
    flags.add_argument("module", help="the program: components.train")
    flags.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if low := given.below_minimum(vars(args)):
        parser().error(", ".join(f"{value.flag} must be {value.minimum} or more" for value in low))
    if args.nodes == 1:
        expect_gpus(args.gpus)
        become("components.launch", str(processes(args.gpus)), args.module, *args.arguments)
    if not args.image:
        parser().error("--image is needed for the pods of a TrainJob")
    stopping.on_stop_signal(interrupt)
    if code := train(body(args)):
        sys.exit(code)
    stopping.on_stop_signal(stopping.raise_stop_requested)
    become(args.module, "--finished", *args.arguments)


def expect_gpus(wanted: int) -> None:
    """Raise WrongParameters if this step's pod has fewer GPUs: training would end in the middle, or use the CPU.

    On Kubeflow's page gpus and the pod's step_gpus are two fields; pipelines.submit keeps them equal.
    """
    if not wanted or not environment.POD_NAME.is_set():
        return
    import torch

    there = torch.cuda.device_count()
    if there < wanted:
        raise WrongParameters(
            f"gpus is {wanted}, but this step's pod has {there}. Set the run argument step_gpus to {wanted}, as gpus "
            f"(pipelines.submit -C gpus={wanted} sets both), or gpus to {there}."
        )


def interrupt(_number: int, _frame: object) -> NoReturn:
    """Only once: Argo signals all processes of a step and components.step forwards it; a second signal must not
    interrupt the shutdown."""
    stopping.ignore_stop_signals()
    raise stopping.StopRequested


def become(module: str, *arguments: str) -> None:
    """Replace this process by another program, which gets its signals and sets its exit code."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606


def train(job: dict[str, Any]) -> int:
    """Run a TrainJob to its end; returns 0, or the exit code for its failure.

    Raises Preempted after a stop signal, when the TrainJob is deleted; Unreachable and Refused.
    """
    name, cluster = job["metadata"]["name"], None
    try:
        from components.trainjob import ownpod
        from components.trainjob.cluster import connect
        from components.trainjob.follow import Follower

        cluster = connect()
        follower = Follower(cluster, name)
        follower.begin()
        job["metadata"] |= ownpod.owner_metadata(cluster)
        return follower.to_the_end(find_or_create(cluster, job))
    except KeyboardInterrupt:
        raise stop(cluster, name) from None


def find_or_create(cluster: Cluster, job: dict[str, Any]) -> dict[str, Any]:
    """The current TrainJob: a new one, or one that an earlier attempt of this step created.

    Raises Refused if the cluster's Trainer is too old.
    """
    name, started, waiting_for = job["metadata"]["name"], time.monotonic(), list[str]()
    while True:
        found = cluster.trainjob(name)
        if found and not found["metadata"].get("deletionTimestamp"):
            if not has_failed(found):
                log.info("TrainJob %s exists: following it", name)
                return found
            log.info("TrainJob %s has failed: deleting it and creating it again", name)
        if found:
            cluster.delete(name)
        # pods of both would write the same checkpoints
        if not (left := cluster.remains(name)) and (new := cluster.create(job)):
            require_patches(cluster, new)
            log.info("created TrainJob %s: %d nodes", name, job["spec"]["trainer"]["numNodes"])
            return new
        if left != waiting_for:
            log.info("waiting for the end of what an earlier attempt made: %s", ", ".join(left))
            waiting_for = left
        if time.monotonic() - started > DELETE_SECONDS:
            raise Preempted(f"not gone after {DELETE_SECONDS:.0f} s: {', '.join(left)}; run again")
        time.sleep(POLL_SECONDS)


def require_patches(cluster: Cluster, new: dict[str, Any]) -> None:
    """An API server without strict validation silently drops unknown fields."""
    if "runtimePatches" not in new["spec"]:
        cluster.delete(new["metadata"]["name"])
        raise Refused(
            "the cluster's TrainJobs do not support spec.runtimePatches: this needs Kubeflow Trainer 2.2 or later. "
            "The TrainJob was deleted."
        )


def has_failed(found: dict[str, Any]) -> bool:
    conditions = found.get("status", {}).get("conditions") or []
    return any(condition["type"] == "Failed" and condition["status"] == "True" for condition in conditions)


def stop(cluster: Cluster | None, name: str) -> Preempted:
    """Delete the TrainJob at once, because there may be little time.  Then wait a while for its pods to save.

    If only this step's pod is moved, it leaves the TrainJob to its successor: the nodes go on, and no queue gives them
    to somebody else.
    cluster: None if the signal came before the connection; an earlier attempt may still have created the TrainJob.
    """
    from components.trainjob.cluster import connect

    until = time.monotonic() + STOP_SECONDS
    try:
        cluster = cluster or connect()
        if is_moved(cluster):
            return Preempted(f"this step's pod is moved: TrainJob {name} goes on, and the step's next pod follows it")
        cluster.patience = STOP_SECONDS
        cluster.delete(name)
    except Problem as problem:
        return Preempted(f"stopped, but TrainJob {name} could not be deleted: {problem}")
    log.info("stop signal: TrainJob %s is deleted, its pods save a checkpoint", name)
    try:
        while (left := cluster.remains(name)) and time.monotonic() < until:
            cluster.delete(name)  # in case that the signal came while it was being created
            time.sleep(POLL_SECONDS)
    except Problem as problem:
        return Preempted(f"stopped, and TrainJob {name} was deleted; whether its pods have ended is unknown: {problem}")
    if left:
        return Preempted(
            f"stopped, and TrainJob {name} was deleted; not gone after {STOP_SECONDS:.0f} s: {', '.join(left)}. Look "
            "whether they end; run again to continue from the last checkpoint"
        )
    return Preempted(f"stopped, and TrainJob {name} is gone with its pods; run again to continue")


def is_moved(cluster: Cluster) -> bool:
    """False if it cannot be found out: then a run that was stopped gives its nodes back in any case."""
    from components.trainjob import ownpod

    cluster.patience = MOVED_SECONDS
    try:
        return ownpod.is_moved(cluster)
    except Problem as problem:
        log.warning("whether this step's pod is moved is unknown: %s", problem)
        return False


if __name__ == "__main__":
    program.run(main)
