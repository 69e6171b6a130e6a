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

from components.given import ADDRESSES, STORE_SECRET, TRACKING_SECRET
from pipelines.failure import RunFailed
from pipelines.harden import USER
from vgg.errors import Refused, Unreachable, WrongParameters

OUTPUTS = Path("build/kubeflow")  # what the runner keeps of every step
MOUNT = "/store"
IMAGE = re.compile(r"\{\{\$\.inputs\.parameters\['pipelinechannel--(\w+)'\]\}\}")


def run(arguments: dict[str, Any], outputs: Path = OUTPUTS) -> None:
    """Run the compiled graph, one container a step.

    outputs: folder of Kubeflow's artifacts.  Raises WrongParameters without VGG_STORE, Unreachable without a container
    engine, Refused without the images, RunFailed when the run fails.
    """
    import docker
    from docker.errors import DockerException
    from kfp import local
    from kfp.local import docker_task_handler

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
    assert hasattr(docker_task_handler, "run_docker_container"), "kfp.local has changed: see run_container()"
    docker_task_handler.run_docker_container = run_container
    try:
        vgg_imagenet(**arguments)
    except DockerException as failure:
        raise Refused(f"a step's container does not start: {failure}. Are the images built (make images)?") from None
    except RuntimeError as failure:  # what failed has been printed
        raise RunFailed(f"the run failed: {failure}. Run again to go on; what it had made is kept", 1) from None


def run_container(client: Any, image: str, command: list[str], volumes: dict[str, Any], **options: Any) -> int:
    """A step's container, to its end; returns its exit code.

    In place of kfp.local's own (2.17), which has containers removed as they end and takes one that is gone before it
    was asked for its code, because it was killed or was quick, for a success.
    """
    container = client.containers.run(image=image, command=command, detach=True, volumes=volumes, **options)
    try:
        for line in container.logs(stream=True):
            print(line.decode(errors="replace"), end="")
        return int(container.wait()["StatusCode"])
    finally:
        container.remove(force=True)


def name_images(spec: Any, arguments: dict[str, Any]) -> None:
    """Put the images' names where a cluster's driver would; the local runner does not know run arguments there."""
    inputs = spec.root.input_definitions.parameters
    for executor in spec.deployment_spec["executors"].values():
        if argument := IMAGE.fullmatch(executor["container"]["image"]):
            default = inputs[argument[1]].default_value.string_value
            executor["container"]["image"] = arguments.get(argument[1], default)


def container_options() -> dict[str, Any]:
    """What every step's container is started with: as little as on a cluster.

    Raises WrongParameters for a store that the steps cannot write.
    """
    from docker.types import Mount

    names = (*ADDRESSES, *STORE_SECRET, *TRACKING_SECRET, "AWS_REGION")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    store, mounts = environment["VGG_STORE"], []
    if "://" not in store:
        folder = Path(store).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if folder.stat().st_uid != USER and not folder.stat().st_mode & 0o002:
            raise WrongParameters(f"VGG_STORE: {folder} is not writable for the steps' user: chown {USER} {folder}")
        mounts = [Mount(MOUNT, str(folder), type="bind")]
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
