"""shard → train → evaluate → gate → register on Kubeflow Pipelines, then a report, also after a failure.

The sections of params.yaml are run arguments without defaults, so the compiled package contains no hyperparameter.
Large data is never passed as an artifact: shards and checkpoints stay in the store (VGG_STORE), and steps pass on their
address with a digest of the content, so Kubeflow's cache depends on the content.
"""

from kfp import dsl

from components import given
from components.evaluate.component import evaluate as evaluate_step
from components.images import reference
from components.register.component import gate as gate_step
from components.register.component import register as register_step
from components.report.component import report as report_step
from components.shard.component import shard as shard_step
from components.train.component import train as train_step
from pipelines.definition.harden import HOUR, Needs, harden

DAY = 24 * HOUR


@dsl.pipeline(
    name="vgg-imagenet",
    description="VGG (arXiv 1409.1556): shards, training, evaluation, gated registration",
    pipeline_config=dsl.PipelineConfig(ttl_seconds_after_finished=30 * DAY, active_deadline_seconds=21 * DAY),
)
def vgg_imagenet(
    shard: dict,
    train: dict,
    evaluate: dict,
    register: dict,
    images: str = "",
    images_version: str = "",
    initial: str = "",
    shard_image: str = reference("shard"),
    train_image: str = reference("train"),
    evaluate_image: str = reference("evaluate"),
    register_image: str = reference("register"),
    nodes: int = given.DEFAULTS["nodes"],
    gpus: int = given.DEFAULTS["gpus"],
    gpu_type: str = given.DEFAULTS["gpu_type"],
    shard_cpu: str = "16",
    shard_memory: str = "32Gi",
    train_cpu: str = given.DEFAULTS["cpu"],
    train_memory: str = given.DEFAULTS["memory"],
    evaluate_cpu: str = "8",
    evaluate_memory: str = "32Gi",
    evaluate_gpus: str = "1",
    step_gpus: str = "1",
    step_cpu: str = "16",
    step_memory: str = "64Gi",
    step_cpu_request: str = "16",
    step_memory_request: str = "64Gi",
    gate_cpu: str = "2",
    gate_memory: str = "4Gi",
    gate_cpu_request: str = "100m",
    gate_memory_request: str = "1Gi",
    register_cpu: str = "2",
    register_memory: str = "8Gi",
    register_cpu_request: str = "100m",
    register_memory_request: str = "2Gi",
    report_cpu: str = "2",
    report_memory: str = "4Gi",
    report_cpu_request: str = "100m",
    report_memory_request: str = "512Mi",
    node_selector: dict = given.DEFAULTS["node_selector"],
    tolerations: list = given.DEFAULTS["tolerations"],
    claim: str = given.DEFAULTS["claim"],
    addresses: str = given.DEFAULTS["addresses"],
    store_secret: str = given.DEFAULTS["store_secret"],
    tracking_secret: str = given.DEFAULTS["tracking_secret"],
    runtime: str = given.DEFAULTS["runtime"],
):
    """shard, train, evaluate, register: the sections of params.yaml.

    Cluster values (nodes … runtime, train_cpu, train_memory, train_image): see components.given.CLUSTER.
    images: source folder, as the steps see it.  images_version: represents its content in the cache key.
    initial: finished checkpoint, for the inits that need one.  *_image: by digest, so the cache notices a moved tag.
    evaluate_gpus: "0" to evaluate on the CPU.  A string, as step_gpus: from a number Kubeflow's driver (2.17) silently
    makes no GPU request.
    *_cpu, *_memory: limits, and for large steps also requests.  *_cpu_request, *_memory_request: requests of small
    steps, which may use more for a while if the node has it.
    step_*: for the training step's own pod; equal to train_* if it trains itself (nodes 1), small if it supervises a
    TrainJob.  pipelines.submit sets them.
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
        shards = shard_step(params=shard, images=images, images_version=images_version, image=shard_image)
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
        )
        needs = Needs(evaluate_image, evaluate_cpu, evaluate_memory, "8Gi", 12 * HOUR, gpu_type, evaluate_gpus)
        harden(evaluated, "evaluate", needs, cluster)

        opened = gate_step(
            params=register,
            shards=shards.outputs["shards"],
            predictions=evaluated.outputs["predictions"],
            evaluation=evaluated.outputs["metrics"],
        )
        needs = small(gate_cpu, gate_memory, gate_cpu_request, gate_memory_request)
        harden(opened, "gate", needs, cluster).set_caching_options(False)  # the champion may have changed

        with dsl.If(opened.output == True, name="gate-is-open"):  # noqa: E712  # compiled into a condition
            registered = register_step(
                params=register,
                shards=shards.outputs["shards"],
                checkpoint=trained.outputs["checkpoint"],
                predictions=evaluated.outputs["predictions"],
                evaluation=evaluated.outputs["metrics"],
                image=register_image,
            )
            needs = small(register_cpu, register_memory, register_cpu_request, register_memory_request)
            harden(registered, "register", needs, cluster).set_caching_options(False)
