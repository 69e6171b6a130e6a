"""The optional stage as a Kubeflow component: the same program and flags, one process per GPU, on one node."""

from typing import Any

from kfp import dsl

from components.images import reference


@dsl.container_component
def localise(
    params: dict[str, Any],
    images: str,
    images_version: str,
    shards: str,
    checkpoint: str,
    image: str,
    gpus: str,
    cpu: str,
    memory: str,
    claim: str,
    addresses: str,
    localiser: dsl.OutputPath(str),  # type: ignore[valid-type]
    localisations: dsl.OutputPath(str),  # type: ignore[valid-type]
    curves: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> dsl.ContainerSpec:
    """images: where the annotations are, as for shard.

    images_version, claim, addresses: only for the cache key, as there.
    gpus, cpu, memory: of the step.
    """
    return dsl.ContainerSpec(
        image=reference("localise"),
        command=[
            *("python", "-m", "components.step", "--image", image, "components.trainjob"),
            *("--nodes", "1", "--gpus", gpus, "--cpu", cpu, "--memory", memory, "components.localise"),
        ],
        args=[
            *("--params", params),
            *("--images", images),
            *("--shards", shards),
            *("--checkpoint", checkpoint),
            *("--boxes", "store:boxes/{key}"),
            *("--localiser", "store:localisers/{key}"),
            *("--localisations", "store:localisations/{key}"),
            *("--curves", curves.path),
            *("--report", report.path),
            *("--metrics", metrics.path),
            *("--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER),
        ],
    )
