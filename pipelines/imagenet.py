"""shard → train → evaluate → gate → register on Kubeflow Pipelines, and a report however it ends.

The sections of params.yaml come as run arguments without defaults, so the compiled package holds no number of the
science.  Big data never travels as an artifact: shards and checkpoints stay in the store (VGG_STORE), and what is
passed on is an address with the digest of what lies there, which makes Kubeflow's cache see content.
"""

from kfp import dsl

from components.evaluate.component import evaluate as evaluate_step
from components.images import reference
from components.register.component import gate as gate_step
from components.register.component import register as register_step
from components.report.component import report as report_step
from components.shard.component import shard as shard_step
from components.train.component import train as train_step
from pipelines.harden import HOUR, Cluster, Needs, harden

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
    nodes: int = 1,
    gpus: int = 1,
    gpu_type: str = "nvidia.com/gpu",
    shard_cpu: str = "16",
    shard_memory: str = "32Gi",
    train_cpu: str = "16",
    train_memory: str = "64Gi",
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
    node_selector: dict = {},  # noqa: B006  # kfp reads it as JSON
    tolerations: list = [],  # noqa: B006
    claim: str = "vgg-store",
    addresses: str = "vgg-addresses",
    store_secret: str = "vgg-store",  # noqa: S107  # its name
    tracking_secret: str = "vgg-tracking",  # noqa: S107
    runtime: str = "vgg-train",
):
    """shard, train, evaluate, register: the sections of params.yaml.

    images: folder of the source, as the steps see it.  images_version: what stands for its content in the cache key.
    initial: finished checkpoint, for the inits that need one.  *_image: by digest, so that a moved tag is another.
    nodes, gpus: of training; gpus are of one node.  train_cpu, train_memory: of a training pod.
    evaluate_gpus: "0" where there are none.  A text, as step_gpus: of a number Kubeflow's driver (2.17) makes no GPU,
    without a word.
    *_cpu, *_memory: at most, and for the big steps what the node must have free, too.  *_cpu_request,
    *_memory_request: what it must have free for a small one, which takes more for a moment if there is more.
    step_*: of the training step's own pod; the same as train_* where it trains (nodes 1), and little where it watches
    over a TrainJob (pipelines.submit fills them in).
    node_selector, tolerations: of the pods with GPUs, Kubernetes' JSON.  claim: volume claim, mounted as /store.
    addresses: config map; store_secret, tracking_secret: secrets; all by name.  runtime: TrainingRuntime for nodes > 1.
    """
    cluster = Cluster(claim, addresses, store_secret, tracking_secret, node_selector, tolerations)

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
            image=train_image,
            nodes=nodes,
            gpus=gpus,
            gpu_type=gpu_type,
            cpu=train_cpu,
            memory=train_memory,
            node_selector=node_selector,
            tolerations=tolerations,
            claim=claim,
            addresses=addresses,
            store_secret=store_secret,
            tracking_secret=tracking_secret,
            runtime=runtime,
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

        opened = gate_step(params=register, shards=shards.outputs["shards"], evaluation=evaluated.outputs["metrics"])
        needs = small(gate_cpu, gate_memory, gate_cpu_request, gate_memory_request)
        harden(opened, "gate", needs, cluster).set_caching_options(False)  # the champion may be another by now

        with dsl.If(opened.output == True, name="gate-is-open"):  # noqa: E712  # it becomes a condition of the graph
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
