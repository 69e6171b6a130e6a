"""What every task of the pipeline gets, in one table and one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kfp import kubernetes
from kfp.dsl import PipelineTask

from components.images import reference

USER = 65532  # numeric and not root: Pod Security "restricted"
HOUR = 3600


@dataclass(frozen=True)
class Needs:
    """cpu, memory: requested and limited.  shared_memory: size of /dev/shm, for the decoding workers."""

    cpu: str
    memory: str
    shared_memory: str
    timeout_seconds: int


NEEDS = {
    "shard": Needs("16", "32Gi", "1Gi", 12 * HOUR),
    "train": Needs("16", "64Gi", "16Gi", 14 * 24 * HOUR),
    "evaluate": Needs("8", "32Gi", "8Gi", 12 * HOUR),
    "register": Needs("2", "8Gi", "1Gi", 1 * HOUR),
}


def harden(task: PipelineTask, stage: str, store_claim: Any, addresses: Any) -> PipelineTask:
    """Limits, user, store, addresses by name, retries, timeout.  Every program may run again: it finishes its work."""
    needs = NEEDS[stage]
    task.set_cpu_request(needs.cpu).set_cpu_limit(needs.cpu)
    task.set_memory_request(needs.memory).set_memory_limit(needs.memory)
    task.set_retry(num_retries=3, backoff_duration="60s", backoff_factor=2, backoff_max_duration="1800s")
    task.set_env_variable("VGG_STORE", "/store").set_env_variable("HOME", "/tmp").set_env_variable(
        "VGG_JOURNAL", "/tmp"
    )
    # what the stages of a run share, and what they ran in: for the parent run and the provenance record
    kubernetes.use_field_path_as_env(task, "VGG_PIPELINE_RUN", "metadata.labels['pipeline/runid']")
    task.set_env_variable("VGG_IMAGE", reference(stage))
    kubernetes.mount_pvc(task, pvc_name=store_claim, mount_path="/store")
    kubernetes.use_config_map_as_env(task, addresses, {"MLFLOW_TRACKING_URI": "MLFLOW_TRACKING_URI"})
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=needs.shared_memory)
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.set_timeout(task, needs.timeout_seconds)
    kubernetes.set_image_pull_policy(task, "IfNotPresent")
    kubernetes.add_pod_label(task, "vgg.stage", stage)
    return task
