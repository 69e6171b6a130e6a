"""Stage 2 as a Kubeflow component: the same program with the same flags, one process a GPU."""

from typing import Any

from kfp import dsl

from components.images import reference


@dsl.container_component
def train(
    params: dict[str, Any],
    shards: str,
    initial: str,
    gpus: int,
    checkpoint: dsl.OutputPath(str),  # type: ignore[valid-type]
    curves: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(
        image=reference("train"),
        command=["python", "-m", "components.launch", gpus, "components.train"],
        args=[
            *("--params", params),
            *("--shards", shards),
            *("--initial", initial),
            *("--checkpoint", "store:checkpoints/{key}"),
            *("--curves", curves.path),
            *("--metrics", metrics.path),
            *("--executor-output", dsl.PIPELINE_TASK_EXECUTOR_OUTPUT_PATH_PLACEHOLDER),
        ],
    )
