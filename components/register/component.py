"""Stage 4 as Kubeflow components: the gate, and the program with the same flags."""

from typing import Any

from kfp import dsl

from components.given import without
from components.images import reference


@dsl.component(base_image=reference("register"), install_kfp_package=False)
def gate(params: dict, shards: str, predictions: str, evaluation: dsl.Input[dsl.Metrics]) -> bool:  # type: ignore[type-arg]
    """Whether the model may be registered.

    A Python component, because kfp.local evaluates a condition on a container component's output to false.
    """
    from components.register.gate import gate_passes

    return gate_passes(params, shards, predictions, evaluation.path)


BOXES = ("localiser", "localisations")  # outputs of the stage localise


def _register(
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
    boxes = ["--localiser", localiser, "--localisations", localisations] if localiser is not None else []
    return dsl.ContainerSpec(
        image=reference("register"),
        command=["python", "-m", "components.step", "--image", image, "components.register"],
        args=[
            *("--params", params),
            *("--shards", shards),
            *("--checkpoint", checkpoint),
            *("--predictions", predictions),
            *("--evaluation", evaluation.path),
            *boxes,
            *("--metrics", metrics.path),
            *("--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER),
        ],
    )


_register.__name__ = "register"  # kfp's name of the component


def register(localised: bool) -> Any:
    """The component.  localised: with the outputs of the stage localise."""
    return dsl.container_component(_register if localised else without(BOXES, _register))
