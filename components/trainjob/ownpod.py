"""The pod that this step runs in: its run, and whether it is being moved to another node."""

from __future__ import annotations

import logging

from components.trainjob.cluster import Cluster, Object
from components.trainjob.ended import disruption
from runtime import environment
from runtime.errors import Problem

log = logging.getLogger("vgg.cluster")


def name() -> str:
    """'' outside of Kubernetes."""
    return environment.POD_NAME.get() or environment.HOST_NAME.get()


def owner_metadata(cluster: Cluster) -> Object:
    """Metadata that makes the run's Workflow, the owner of this step's pod, own the TrainJob: deleted together."""
    try:
        owner = controller(cluster.pod(name()) or {}) if name() else None
    except Problem as problem:
        log.warning("%s", problem)
        owner = None
    if owner is None:
        log.warning(
            "pod %r has no owner, so the run of this step is unknown: deleting the run keeps its TrainJob", name()
        )
        return {}
    # neither controller nor blockOwnerDeletion: these need permissions on Workflows
    return {"ownerReferences": [{key: owner[key] for key in ("apiVersion", "kind", "name", "uid")}]}


def is_moved(cluster: Cluster) -> bool:
    """Whether this pod is deleted or disrupted (drained, preempted, evicted), so that its run makes it anew elsewhere.

    A run that is terminated only sends a signal to its pods.  If the run itself is deleted, so is the TrainJob, which
    it owns.  False without a run, which alone would make the pod anew.
    """
    pod = cluster.pod(name()) if name() else None
    if pod is None or controller(pod) is None:
        return False
    return bool(pod["metadata"].get("deletionTimestamp") or disruption(pod))


def controller(pod: Object) -> Object | None:
    owners: list[Object] = pod.get("metadata", {}).get("ownerReferences") or []
    return next((owner for owner in owners if owner.get("controller")), None)
