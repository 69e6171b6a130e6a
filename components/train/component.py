"""Stage 2 as a Kubeflow component: the same program with the same flags, one process a GPU, on one node or several."""

from typing import Any

from kfp import dsl

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
    """nodes, gpus (of a node) … runtime: what components.train.job needs to make a TrainJob of several nodes."""
    return dsl.ContainerSpec(
        image=reference("train"),
        command=[
            *("python", "-m", "components.step", "--image", image, "components.train.job"),
            *("--nodes", nodes, "--gpus", gpus, "--gpu-type", gpu_type, "--cpu", cpu, "--memory", memory),
            *("--node-selector", node_selector, "--tolerations", tolerations, "--claim", claim),
            *("--addresses", addresses, "--store-secret", store_secret, "--tracking-secret", tracking_secret),
            *("--runtime", runtime, "--image", image, "components.train"),
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
