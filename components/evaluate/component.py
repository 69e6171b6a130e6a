"""Stage 3 as a Kubeflow component: the same program with the same flags."""

from typing import Any

from kfp import dsl

from components.images import reference


@dsl.container_component
def evaluate(
    params: dict[str, Any],
    shards: str,
    checkpoint: str,
    predictions: dsl.OutputPath(str),  # type: ignore[valid-type]
    metrics: dsl.Output[dsl.Metrics],
) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(
        image=reference("evaluate"),
        command=["python", "-m", "components.evaluate"],
        args=[
            *("--params", params),
            *("--shards", shards),
            *("--checkpoint", checkpoint),
            *("--predictions", "store:predictions/{key}"),
            *("--metrics", metrics.path),
            *("--executor-output", dsl.PIPELINE_TASK_EXECUTOR_OUTPUT_PATH_PLACEHOLDER),
        ],
    )
