"""The pipeline on this machine, in its containers: Kubeflow's own local runner, on Docker's or podman's socket.

What a cluster gives a step (the store, addresses, secrets, the run's name) comes from this environment: VGG_STORE,
MLFLOW_TRACKING_URI and the AWS variables as they are set here.  A VGG_STORE that is a folder is mounted.
"""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path
from typing import Any

from pipelines.harden import ADDRESSES, STORE_SECRET, TRACKING_SECRET, USER
from vgg.errors import Refused, Unreachable, WrongParameters

OUTPUTS = Path("build/kubeflow")  # what the runner keeps of every step
MOUNT = "/store"
IMAGE = re.compile(r"\{\{\$\.inputs\.parameters\['pipelinechannel--(\w+)'\]\}\}")


def run(arguments: dict[str, Any], outputs: Path = OUTPUTS) -> None:
    """Run the compiled graph, one container a step.

    outputs: folder of Kubeflow's artifacts.  Raises WrongParameters without VGG_STORE, Unreachable without a container
    engine, Refused when the run fails.
    """
    import docker
    from docker.errors import DockerException
    from kfp import local

    missing = [name for name, optional in ADDRESSES.items() if not optional and not os.environ.get(name)]
    if missing:
        raise WrongParameters(
            f"--local: {', '.join(missing)} must be set; steps in containers see nothing else of here"
        )
    try:
        docker.from_env().ping()
    except DockerException as error:
        raise Unreachable(
            f"no container engine answers ({error}). Start Docker, or: podman system service --time 0 "
            "unix:///tmp/podman.sock and DOCKER_HOST=unix:///tmp/podman.sock"
        ) from None
    outputs.mkdir(parents=True, exist_ok=True)
    outputs.chmod(0o777)  # the steps' user is not ours
    local.init(local.DockerRunner(**container_options()), pipeline_root=str(outputs))
    from pipelines.imagenet import vgg_imagenet

    name_images(vgg_imagenet.pipeline_spec, arguments)
    try:
        vgg_imagenet(**arguments)
    except RuntimeError as failure:  # what failed has been printed
        raise Refused(f"the run failed: {failure}") from None


def name_images(spec: Any, arguments: dict[str, Any]) -> None:
    """Put the images' names where a cluster's driver would; the local runner does not know run arguments there."""
    inputs = spec.root.input_definitions.parameters
    for executor in spec.deployment_spec["executors"].values():
        if argument := IMAGE.fullmatch(executor["container"]["image"]):
            default = inputs[argument[1]].default_value.string_value
            executor["container"]["image"] = arguments.get(argument[1], default)


def container_options() -> dict[str, Any]:
    """What every step's container is started with: as little as on a cluster."""
    from docker.types import Mount

    names = (*ADDRESSES, *STORE_SECRET, *TRACKING_SECRET, "AWS_REGION")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    store, mounts = environment["VGG_STORE"], []
    if "://" not in store:
        mounts = [Mount(MOUNT, str(Path(store).resolve()), type="bind")]
        environment["VGG_STORE"] = MOUNT
    return {
        "environment": {
            **environment,
            "VGG_PIPELINE_RUN": f"local-{uuid.uuid4().hex[:12]}",
            "HOME": "/tmp",  # noqa: S108
            "VGG_CACHE": "/tmp/cache",  # noqa: S108
            "VGG_JOURNAL": "/tmp/tracking",  # noqa: S108
        },
        "mounts": mounts,
        "user": f"{USER}:{USER}",
        "network_mode": "host",
        "shm_size": "1g",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "tmpfs": {"/tmp": "rw,exec,size=8g,mode=1777"},  # noqa: S108
        "entrypoint": "",
    }
