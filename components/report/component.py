"""The report at the end of a run, also of a failed one, as a Kubeflow component."""

from kfp import dsl

from components.images import reference


@dsl.container_component
def report(
    status: dsl.PipelineTaskFinalStatus,
    image: str,
    summary: dsl.Output[dsl.Markdown],
) -> dsl.ContainerSpec:
    return dsl.ContainerSpec(
        image=reference("register"),
        command=["python", "-m", "components.step", "--image", image, "components.report"],
        args=[
            *("--status", status),
            *("--summary", summary.path),
            *("--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER),
        ],
    )
