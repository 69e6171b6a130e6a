"""Stage 4 as Kubeflow components: the gate, and the program with the same flags."""

from typing import Any

from kfp import dsl

from components.images import reference


@dsl.component(base_image=reference("register"), install_kfp_package=False)
def gate(params: dict, shards: str, predictions: str, evaluation: dsl.Input[dsl.Metrics]) -> bool:  # type: ignore[type-arg]
    """Whether the model may be registered.

    A Python component, because kfp.local evaluates a condition on a container component's output to false.
    """
    from components.register.gate import gate_passes

    return gate_passes(params, shards, predictions, evaluation.path)


def _program(
    params: Any, shards: str, checkpoint: str, predictions: str, evaluation: Any, more: list[str], image: str,
    metrics: Any,
) -> dsl.ContainerSpec:  # fmt: skip
    return dsl.ContainerSpec(
        image=reference("register"),
        command=["python", "-m", "components.step", "--image", image, "components.register"],
        args=[
            *("--params", params),
            *("--shards", shards),
            *("--checkpoint", checkpoint),
            *("--predictions", predictions),
            *("--evaluation", evaluation.path),
            *more,
            *("--metrics", metrics.path),
            *("--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER),
        ],
    )


@dsl.container_component
def register(
    params: dict[str, Any],
    shards: str,
    checkpoint: str,
    predictions: str,
    evaluation: dsl.Input[dsl.Metrics],
    image: str,
    model: dsl.OutputPath(str),  # type: ignore[valid-type]
    metrics: dsl.Output[dsl.Metrics],
) -> dsl.ContainerSpec:
    return _program(params, shards, checkpoint, predictions, evaluation, [], image, metrics)


def with_localiser() -> Any:
    """The same component, of the same name, with the outputs of the stage localise: kfp knows no optional flags."""

    @dsl.container_component
    def register(
        params: dict[str, Any],
        shards: str,
        checkpoint: str,
        predictions: str,
        evaluation: dsl.Input[dsl.Metrics],
        localiser: str,
        localisations: str,
        image: str,
        model: dsl.OutputPath(str),  # type: ignore[valid-type]
        metrics: dsl.Output[dsl.Metrics],
    ) -> dsl.ContainerSpec:
        boxes = ["--localiser", localiser, "--localisations", localisations]
        return _program(params, shards, checkpoint, predictions, evaluation, boxes, image, metrics)

    return register
