"""Stage 2 as a Kubeflow component: the same program and flags, one process per GPU, on one or several nodes."""

from typing import Any

from kfp import dsl

from components import given
from components.images import reference


@dsl.container_component
def train(
    params: dict[str, Any],
    shards: str,
    initial: str,
    image: str,
    nodes: int,
    gpus: int,
    gpu_type: str,
    cpu: str,
    memory: str,
    node_selector: dict[str, str],
    tolerations: list[dict[str, Any]],
    claim: str,
    addresses: str,
    store_secret: str,
    tracking_secret: str,
    runtime: str,
    checkpoint: dsl.OutputPath(str),  # type: ignore[valid-type]
    curves: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> dsl.ContainerSpec:
    """image, nodes … runtime: the cluster values (components.given.CLUSTER)."""
    cluster_flags = given.command(locals())
    return dsl.ContainerSpec(
        image=reference("train"),
        command=[
            *("python", "-m", "components.step", "--image", image, "components.trainjob"),
            *cluster_flags,
            "components.train",
        ],
        args=[
            *("--params", params),
            *("--shards", shards),
            *("--initial", initial),
            *("--checkpoint", "store:checkpoints/{key}"),
            *("--curves", curves.path),
            *("--metrics", metrics.path),
            *("--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER),
        ],
    )
