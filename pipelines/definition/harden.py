"""The settings that every task of the pipeline gets: image, resources, user, volumes, environment, timeout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kfp import kubernetes
from kfp.dsl import PipelineTask
from kfp.dsl.pipeline_channel import PipelineParameterChannel

from components.given import ADDRESSES, CLUSTER, FIXED, STORE_SECRET, TRACKING_SECRET

USER = 65532  # numeric and not root, as Pod Security "restricted" requires
HOUR = 3600


@dataclass(frozen=True)
class Needs:
    """Image, resources and timeout of a step; values or run arguments.

    cpu, memory: limits.  shared_memory: size of /dev/shm, which counts as memory; decoding processes pass batches
    through it.  cpu_request, memory_request: what the node must have free; None: the same as the limits, so that other
    pods cannot take it.
    """

    image: Any
    cpu: Any
    memory: Any
    shared_memory: str
    timeout_seconds: int
    gpu_type: Any = None
    gpus: Any = None
    cpu_request: Any = None
    memory_request: Any = None


def harden(task: PipelineTask, name: str, needs: Needs, cluster: Mapping[str, Any]) -> PipelineTask:
    """Apply all settings to a task.  cluster: the cluster values of the run, by name.

    No retries: Kubeflow's ignore the exit code; components.step retries by it.  A pod that is lost is started again by
    the cluster's default (Kubeflow 2.17), and every program continues where it was.
    """
    # the compiler does not pass an argument into an exit handler or a condition if only settings use it
    used = (*vars(needs).values(), *(cluster[value.name] for value in CLUSTER.values() if value.every_step))
    task.channel_inputs.extend(value for value in used if isinstance(value, PipelineParameterChannel))
    task.set_container_image(needs.image)
    task.set_cpu_request(needs.cpu_request or needs.cpu).set_cpu_limit(needs.cpu)
    task.set_memory_request(needs.memory_request or needs.memory).set_memory_limit(needs.memory)
    if needs.gpus is not None:
        task.set_accelerator_type(needs.gpu_type).set_accelerator_limit(needs.gpus)
        kubernetes.add_node_selector_json(task, cluster["node_selector"])
        kubernetes.add_toleration_json(task, cluster["tolerations"])
    for variable, value in FIXED.items():
        task.set_env_variable(variable, value)
    # shared by the stages of a run: identifies the parent run in MLflow and goes into the provenance record
    kubernetes.use_field_path_as_env(task, "VGG_PIPELINE_RUN", "metadata.labels['pipeline/runid']")
    kubernetes.mount_pvc(task, pvc_name=cluster["claim"], mount_path="/store")
    for key, optional in ADDRESSES.items():
        kubernetes.use_config_map_as_env(task, cluster["addresses"], {key: key}, optional=optional)
    for secret, keys in (("store_secret", STORE_SECRET), ("tracking_secret", TRACKING_SECRET)):
        kubernetes.use_secret_as_env(task, cluster[secret], {key: key for key in keys}, optional=True)
    kubernetes.empty_dir_mount(
        task, "shared-memory", "/dev/shm", medium="Memory", size_limit=needs.shared_memory  # noqa: S108
    )  # fmt: skip
    kubernetes.empty_dir_mount(task, "scratch", "/tmp")  # noqa: S108  # of the container
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.set_timeout(task, needs.timeout_seconds)
    kubernetes.set_image_pull_policy(task, "IfNotPresent")
    kubernetes.add_pod_label(task, "vgg.stage", name)
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "vgg-imagenet")
    return task
