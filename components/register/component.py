"""Stage 4 as a Kubeflow component: the same program with the same flags."""

from typing import Any

from kfp import dsl

from components.images import reference


@dsl.container_component
def register(
    params: dict[str, Any],
    shards: str,
    checkpoint: str,
    predictions: str,
    evaluation: dsl.Input[dsl.Metrics],
    model: dsl.OutputPath(str),  # type: ignore[valid-type]
    metrics: dsl.Output[dsl.Metrics],
) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(
        image=reference("register"),
        command=["python", "-m", "components.register"],
        args=[
            *("--params", params),
            *("--shards", shards),
            *("--checkpoint", checkpoint),
            *("--predictions", predictions),
            *("--evaluation", evaluation.path),
            *("--metrics", metrics.path),
            *("--executor-output", dsl.PIPELINE_TASK_EXECUTOR_OUTPUT_PATH_PLACEHOLDER),
        ],
    )
