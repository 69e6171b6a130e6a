"""shard → train → evaluate → register on Kubeflow Pipelines.

The sections of params.yaml come as run arguments without defaults, so the compiled package holds no number of the
science.  Big data never travels as an artifact: shards and checkpoints stay in the store (VGG_STORE, a volume that all
steps mount), and what is passed on is an address with the digest of what lies there, which makes Kubeflow's cache see
content.
"""

from kfp import dsl

from components.evaluate.component import evaluate as evaluate_step
from components.register.component import register as register_step
from components.shard.component import shard as shard_step
from components.train.component import train as train_step
from pipelines.harden import harden


@dsl.pipeline(
    name="vgg-imagenet", description="VGG (arXiv 1409.1556): shards, training, evaluation, gated registration"
)
def vgg_imagenet(
    shard: dict,
    train: dict,
    evaluate: dict,
    register: dict,
    images: str,
    initial: str = "",
    gpus: int = 1,
    store_claim: str = "vgg-store",
    addresses: str = "vgg-addresses",
):
    """shard, train, evaluate, register: the sections of params.yaml.  images: folder of the source, below the store's
    mount.  initial: folder of a finished checkpoint, for the inits that need one.  gpus: of the training step.
    store_claim: volume claim of the store.  addresses: config map with MLFLOW_TRACKING_URI."""
    shards = shard_step(params=shard, images=images)
    trained = train_step(params=train, shards=shards.outputs["shards"], initial=initial, gpus=gpus)
    evaluated = evaluate_step(
        params=evaluate, shards=shards.outputs["shards"], checkpoint=trained.outputs["checkpoint"]
    )
    registered = register_step(
        params=register,
        shards=shards.outputs["shards"],
        checkpoint=trained.outputs["checkpoint"],
        predictions=evaluated.outputs["predictions"],
        evaluation=evaluated.outputs["metrics"],
    )
    for task, stage in ((shards, "shard"), (trained, "train"), (evaluated, "evaluate"), (registered, "register")):
        harden(task, stage, store_claim, addresses)
    for task in (trained, evaluated):
        task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(gpus if task is trained else 1)
    # the registry, and what lies in the folder of images, are outside what a cache key can see
    for task in (shards, registered):
        task.set_caching_options(False)
