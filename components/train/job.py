"""Stage 2 as a step of the pipeline: on one node training itself, on several a TrainJob that is followed.

    python -m components.train.job --nodes N --gpus G … components.train ARGUMENTS…

One node: becomes components.launch.  Several: makes a TrainJob (Kubeflow Trainer 2.2 or later), shows what its pods
wait for and what node 0 says, and when it is complete verifies the checkpoint and writes the step's outputs.  Run again
it finds the same TrainJob and follows that; one that has failed is made anew and goes on from the last checkpoint.
Stopped (SIGTERM), it takes the TrainJob with it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from components import program, signals
from components.train import trainjob
from vgg.errors import Preempted, Problem, Refused

if TYPE_CHECKING:
    from components.train.cluster import Cluster

log = logging.getLogger("vgg.cluster")

STOP_SECONDS = 20.0  # for the pods to save and end, once told to; whoever stops this step waits 30
DELETE_SECONDS = 900.0  # for a failed TrainJob to be gone: its pods may have minutes to end
LOOK_SECONDS = 2.0


def parser() -> argparse.ArgumentParser:
    flags = program.Parser("components.train.job", __doc__)
    flags.add_argument("--nodes", type=int, required=True, metavar="N", help="machines")
    flags.add_argument("--gpus", type=int, required=True, metavar="G", help="a machine; 0: one process on its CPU")
    flags.add_argument("--gpu-type", default="nvidia.com/gpu", help="the resource's name")
    flags.add_argument("--cpu", required=True, help="a machine, as Kubernetes writes it")
    flags.add_argument("--memory", required=True, help="a machine, as Kubernetes writes it")
    flags.add_argument("--node-selector", default="{}", metavar="JSON", help="of the pods")
    flags.add_argument("--tolerations", default="[]", metavar="JSON", help="of the pods")
    flags.add_argument("--claim", default="", help="PersistentVolumeClaim mounted as /store")
    flags.add_argument("--addresses", default="", help="ConfigMap with addresses")
    flags.add_argument("--store-secret", default="", help="Secret with the store's credentials")
    flags.add_argument("--tracking-secret", default="", help="Secret with the tracking server's credentials")
    flags.add_argument("--runtime", default="vgg-train", help="TrainingRuntime")
    flags.add_argument("--image", default="", help="of the pods")
    flags.add_argument("module", help="whose program runs: components.train")
    flags.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.nodes < 1 or args.gpus < 0:
        parser().error("--nodes must be 1 or more, --gpus 0 or more")
    if args.nodes == 1:
        become("components.launch", str(trainjob.processes(args.gpus)), args.module, *args.arguments)
    if not args.image:
        parser().error("--image is needed for the pods of a TrainJob")
    signals.on_asked(interrupt)
    if code := train(trainjob.body(args)):
        sys.exit(code)
    signals.on_asked(signals.interrupt)
    become(args.module, "--finished", *args.arguments)


def interrupt(_number: int, _frame: object) -> NoReturn:
    """Once: Argo signals all processes of a step, and components.step passes it on; a second must not stop the end."""
    signals.ignore_asked()
    raise signals.Asked


def become(module: str, *arguments: str) -> None:
    """Run another program in this process's place: it gets the signals, and its exit code is ours."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606


def train(body: dict[str, Any]) -> int:
    """Have a TrainJob run to its end; returns 0 or the exit code its failure stands for.

    Raises Preempted when told to stop, after the TrainJob has been deleted; Unreachable and Refused.
    """
    name, cluster = body["metadata"]["name"], None
    try:
        from components.train.cluster import connect
        from components.train.follow import Follower

        cluster = connect()
        follower = Follower(cluster, name)
        follower.begin()
        body["metadata"] |= owned(cluster)
        return follower.to_the_end(made(cluster, body))
    except KeyboardInterrupt:
        raise stopped(cluster, name) from None


def made(cluster: Cluster, body: dict[str, Any]) -> dict[str, Any]:
    """The TrainJob as it is now: a new one, or one that an earlier attempt of this step has made.

    Raises Refused when the cluster's Trainer is too old.
    """
    name, began = body["metadata"]["name"], time.monotonic()
    while True:
        if new := cluster.create(body):
            expect_patches(cluster, new)
            log.info("made TrainJob %s: %d nodes", name, body["spec"]["trainer"]["numNodes"])
            return new
        found = cluster.trainjob(name)
        going = bool(found and found["metadata"].get("deletionTimestamp"))
        if found and not going and not has_failed(found):
            log.info("TrainJob %s is there already: following it", name)
            return found
        if found and not going:
            log.info("TrainJob %s has failed before: it is deleted and made anew", name)
            cluster.delete(name)
        if time.monotonic() - began > DELETE_SECONDS:
            raise Preempted(f"TrainJob {name} is still being deleted after {DELETE_SECONDS:.0f} s; run again")
        time.sleep(LOOK_SECONDS)


def expect_patches(cluster: Cluster, new: dict[str, Any]) -> None:
    """An API server that does not know strict validation leaves unknown fields out without a word."""
    if "runtimePatches" not in new["spec"]:
        cluster.delete(new["metadata"]["name"])
        raise Refused(
            "the cluster's TrainJobs know no spec.runtimePatches: this needs Kubeflow Trainer 2.2 or later. The "
            "TrainJob has been deleted again."
        )


def has_failed(found: dict[str, Any]) -> bool:
    conditions = found.get("status", {}).get("conditions") or []
    return any(condition["type"] == "Failed" and condition["status"] == "True" for condition in conditions)


def owned(cluster: Cluster) -> dict[str, Any]:
    """The owner of this step's pod, the Workflow of the run, as the TrainJob's: they are deleted together."""
    pod_name = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
    try:
        owners = cluster.pod_owners(pod_name) if pod_name else []
    except Problem as problem:
        log.warning("%s", problem)
        owners = []
    owner = next((owner for owner in owners if owner.get("controller")), None)
    if owner is None:
        log.warning(
            "the run of this step cannot be told from its pod %r: when the run is deleted, its TrainJob stays", pod_name
        )
        return {}
    # not as its controller, and not to hold its deletion up: that would take rights on Workflows
    return {"ownerReferences": [{key: owner[key] for key in ("apiVersion", "kind", "name", "uid")}]}


def stopped(cluster: Cluster | None, name: str) -> Preempted:
    """Delete the TrainJob, first of all: who stops a step may not wait.  Then give its pods some time to save.

    cluster: none yet if it came early; an earlier attempt may have made the TrainJob even so.
    """
    from components.train.cluster import connect

    began = time.monotonic()
    try:
        cluster = cluster or connect()
        cluster.patience = STOP_SECONDS
        cluster.delete(name)
        log.info("told to stop: TrainJob %s is being deleted, its pods save", name)
        while cluster.trainjob(name) and time.monotonic() - began < STOP_SECONDS:
            time.sleep(LOOK_SECONDS)
    except Problem as problem:
        return Preempted(f"stopped, but TrainJob {name} could not be deleted: {problem}")
    return Preempted(f"stopped, and TrainJob {name} with it; run again to go on from the last checkpoint")


if __name__ == "__main__":
    program.run(main)
