"""Stage 1 as a Kubeflow component: the same program and flags."""

from typing import Any

from kfp import dsl

from components.images import reference


@dsl.container_component
def shard(
    params: dict[str, Any],
    images: str,
    images_version: str,
    image: str,
    claim: str,
    addresses: str,
    shards: dsl.OutputPath(str),  # type: ignore[valid-type]
    metrics: dsl.Output[dsl.Metrics],
) -> dsl.ContainerSpec:
    """images_version, claim, addresses: only for the cache key.

    The first represents the content of the images folder, the others the store, in which a result of the cache is.
    """
    return dsl.ContainerSpec(
        image=reference("shard"),
        command=["python", "-m", "components.step", "--image", image, "components.shard"],
        args=[
            *("--params", params),
            *("--images", images),
            *("--shards", "store:shards/{key}"),
            *("--metrics", metrics.path),
            *("--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER),
        ],
    )
