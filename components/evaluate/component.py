"""Stage 3 as a Kubeflow component: the same program and flags."""

from typing import Any

from kfp import dsl

from components.images import reference


@dsl.container_component
def evaluate(
    params: dict[str, Any],
    shards: str,
    checkpoint: str,
    image: str,
    claim: str,
    addresses: str,
    predictions: dsl.OutputPath(str),  # type: ignore[valid-type]
    confusion: dsl.Output[dsl.ClassificationMetrics],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> dsl.ContainerSpec:
    """claim, addresses: only for the cache key, as for shard."""
    return dsl.ContainerSpec(
        image=reference("evaluate"),
        command=["python", "-m", "components.step", "--image", image, "components.evaluate"],
        args=[
            *("--params", params),
            *("--shards", shards),
            *("--checkpoint", checkpoint),
            *("--predictions", "store:predictions/{key}"),
            *("--confusion", confusion.path),
            *("--report", report.path),
            *("--metrics", metrics.path),
            *("--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER),
        ],
    )
