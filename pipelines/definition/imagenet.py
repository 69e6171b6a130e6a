"""shard → train → evaluate → gate → register on Kubeflow Pipelines, then a report, also after a failure.

With the section localise of params.yaml also the step localise, after train and beside evaluate; register waits for it.
The sections of params.yaml are run arguments without defaults, so the compiled package contains no hyperparameter.
Large data is never passed as an artifact: shards and checkpoints stay in the store (VGG_STORE), and steps pass on their
address with a digest of the content, so Kubeflow's cache depends on the content.
"""

import functools
from typing import Any

from kfp import dsl

from components import given
from components.evaluate.component import evaluate as evaluate_step
from components.images import reference
from components.localise.component import localise as localise_step
from components.register.component import gate as gate_step
from components.register.component import register as register_step
from components.report.component import report as report_step
from components.shard.component import shard as shard_step
from components.train.component import train as train_step
from pipelines.definition.harden import HOUR, Needs, harden
from pipelines.definition.inputs import DEFAULTS, LOCALISE, documented

DAY = 24 * HOUR


@functools.cache
def pipeline(localised: bool = False) -> Any:
    """The pipeline, with or without the step localise and its run arguments."""
    decorate = dsl.pipeline(
        name="vgg-imagenet",
        description="VGG (arXiv 1409.1556): shards, training, evaluation, gated registration",
        pipeline_config=dsl.PipelineConfig(ttl_seconds_after_finished=30 * DAY, active_deadline_seconds=21 * DAY),
    )
    return decorate(documented(steps if localised else given.without(LOCALISE, steps)))


def steps(
    shard: dict,
    train: dict,
    evaluate: dict,
    register: dict,
    localise: dict,
    images: str = DEFAULTS["images"],
    images_version: str = DEFAULTS["images_version"],
    initial: str = DEFAULTS["initial"],
    shard_image: str = reference("shard"),
    train_image: str = reference("train"),
    evaluate_image: str = reference("evaluate"),
    register_image: str = reference("register"),
    localise_image: str = reference("localise"),
    nodes: int = DEFAULTS["nodes"],
    gpus: int = DEFAULTS["gpus"],
    gpu_type: str = DEFAULTS["gpu_type"],
    shard_cpu: str = DEFAULTS["shard_cpu"],
    shard_memory: str = DEFAULTS["shard_memory"],
    train_cpu: str = DEFAULTS["train_cpu"],
    train_memory: str = DEFAULTS["train_memory"],
    evaluate_cpu: str = DEFAULTS["evaluate_cpu"],
    evaluate_memory: str = DEFAULTS["evaluate_memory"],
    evaluate_gpus: str = DEFAULTS["evaluate_gpus"],
    localise_cpu: str = DEFAULTS["localise_cpu"],
    localise_memory: str = DEFAULTS["localise_memory"],
    localise_gpus: str = DEFAULTS["localise_gpus"],
    step_gpus: str = DEFAULTS["step_gpus"],
    step_cpu: str = DEFAULTS["step_cpu"],
    step_memory: str = DEFAULTS["step_memory"],
    step_cpu_request: str = DEFAULTS["step_cpu_request"],
    step_memory_request: str = DEFAULTS["step_memory_request"],
    gate_cpu: str = DEFAULTS["gate_cpu"],
    gate_memory: str = DEFAULTS["gate_memory"],
    gate_cpu_request: str = DEFAULTS["gate_cpu_request"],
    gate_memory_request: str = DEFAULTS["gate_memory_request"],
    register_cpu: str = DEFAULTS["register_cpu"],
    register_memory: str = DEFAULTS["register_memory"],
    register_cpu_request: str = DEFAULTS["register_cpu_request"],
    register_memory_request: str = DEFAULTS["register_memory_request"],
    report_cpu: str = DEFAULTS["report_cpu"],
    report_memory: str = DEFAULTS["report_memory"],
    report_cpu_request: str = DEFAULTS["report_cpu_request"],
    report_memory_request: str = DEFAULTS["report_memory_request"],
    node_selector: dict = DEFAULTS["node_selector"],
    tolerations: list = DEFAULTS["tolerations"],
    claim: str = DEFAULTS["claim"],
    addresses: str = DEFAULTS["addresses"],
    store_secret: str = DEFAULTS["store_secret"],
    tracking_secret: str = DEFAULTS["tracking_secret"],
    runtime: str = DEFAULTS["runtime"],
):
    """A params file's sections as run arguments, and what they need of a cluster; see pipelines.definition.inputs.

    *_gpus are strings: from a number Kubeflow's driver (2.17) silently makes no GPU request.  step_* is separate from
    train_*, because the step's own pod either trains or supervises a TrainJob.
    """
    cluster = given.from_run_arguments(locals())

    def small(cpu: str, memory: str, cpu_request: str, memory_request: str) -> Needs:
        return Needs(
            register_image, cpu, memory, "1Gi", HOUR, cpu_request=cpu_request, memory_request=memory_request
        )  # fmt: skip

    reported = report_step(image=register_image)
    needs = small(report_cpu, report_memory, report_cpu_request, report_memory_request)
    harden(reported, "report", needs, cluster).set_caching_options(False)
    with dsl.ExitHandler(reported, name="run"):
        store = {"claim": claim, "addresses": addresses}
        shards = shard_step(params=shard, images=images, images_version=images_version, image=shard_image, **store)
        harden(shards, "shard", Needs(shard_image, shard_cpu, shard_memory, "1Gi", 12 * HOUR), cluster)

        trained = train_step(
            params=train,
            shards=shards.outputs["shards"],
            initial=initial,
            **cluster,
        )
        needs = Needs(
            train_image, step_cpu, step_memory, "16Gi", 14 * DAY, gpu_type, step_gpus,
            cpu_request=step_cpu_request, memory_request=step_memory_request,
        )  # fmt: skip
        harden(trained, "train", needs, cluster)

        evaluated = evaluate_step(
            params=evaluate,
            shards=shards.outputs["shards"],
            checkpoint=trained.outputs["checkpoint"],
            image=evaluate_image,
            **store,
        )
        needs = Needs(evaluate_image, evaluate_cpu, evaluate_memory, "8Gi", 12 * HOUR, gpu_type, evaluate_gpus)
        harden(evaluated, "evaluate", needs, cluster)

        boxes = {}
        if localise is not None:
            localised = localise_step(
                params=localise,
                images=images,
                images_version=images_version,
                shards=shards.outputs["shards"],
                checkpoint=trained.outputs["checkpoint"],
                image=localise_image,
                gpus=localise_gpus,
                cpu=localise_cpu,
                memory=localise_memory,
                **store,
            )
            needs = Needs(localise_image, localise_cpu, localise_memory, "16Gi", 14 * DAY, gpu_type, localise_gpus)
            harden(localised, "localise", needs, cluster)
            boxes = {name: localised.outputs[name] for name in ("localiser", "localisations")}

        opened = gate_step(
            params=register,
            shards=shards.outputs["shards"],
            predictions=evaluated.outputs["predictions"],
            evaluation=evaluated.outputs["metrics"],
        )
        needs = small(gate_cpu, gate_memory, gate_cpu_request, gate_memory_request)
        harden(opened, "gate", needs, cluster).set_caching_options(False)  # the champion may have changed

        with dsl.If(opened.output == True, name="gate-is-open"):  # noqa: E712  # compiled into a condition
            registered = register_step(bool(boxes))(
                params=register,
                shards=shards.outputs["shards"],
                checkpoint=trained.outputs["checkpoint"],
                predictions=evaluated.outputs["predictions"],
                evaluation=evaluated.outputs["metrics"],
                image=register_image,
                **boxes,
            )
            needs = small(register_cpu, register_memory, register_cpu_request, register_memory_request)
            harden(registered, "register", needs, cluster).set_caching_options(False)
