"""The pipeline on this machine, in containers: Kubeflow's local runner, with the socket of Docker or podman.

Steps take from this environment what a cluster would provide: VGG_STORE, MLFLOW_TRACKING_URI and the AWS variables.  If
VGG_STORE is a folder, it is mounted.
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Any

from components.given import ADDRESSES, STORE_SECRET, TRACKING_SECRET
from components.tracking.address import tracking_uri
from pipelines.definition.harden import USER
from pipelines.kfp.failure import RunFailed
from runtime import environment
from runtime.errors import Refused, Unreachable, WrongParameters

OUTPUTS = Path("build/kubeflow")  # the runner's artifacts
MOUNT = "/store"
IMAGE = re.compile(r"\{\{\$\.inputs\.parameters\['pipelinechannel--(\w+)'\]\}\}")


def run(arguments: dict[str, Any], outputs: Path = OUTPUTS) -> None:
    """Run the compiled graph, one container per step.

    outputs: folder of Kubeflow's artifacts.  Raises WrongParameters without VGG_STORE or for a wrong address of MLflow,
    Unreachable without a container engine, Refused without the images, RunFailed if the run fails.
    """
    import docker
    from docker.errors import DockerException
    from kfp import local
    from kfp.local import docker_task_handler

    missing = {name for name, optional in ADDRESSES.items() if not optional} - environment.passed_on(
        (*ADDRESSES,)
    ).keys()
    if missing:
        raise WrongParameters(
            f"--local: set {', '.join(sorted(missing))}; steps in containers take their addresses from it"
        )
    tracking_uri()  # checked before any container
    try:
        docker.from_env().ping()
    except DockerException as error:
        raise Unreachable(
            f"no container engine answers ({error}). Start Docker, or: podman system service --time 0 "
            "unix:///tmp/podman.sock and DOCKER_HOST=unix:///tmp/podman.sock"
        ) from None
    outputs.mkdir(parents=True, exist_ok=True)
    outputs.chmod(0o777)  # steps run as another user
    local.init(local.DockerRunner(**container_options()), pipeline_root=str(outputs))
    from pipelines.definition.imagenet import pipeline

    made = pipeline("localise" in arguments)
    set_images(made.pipeline_spec, arguments)
    assert hasattr(docker_task_handler, "run_docker_container"), "kfp.local has changed: see run_container()"
    docker_task_handler.run_docker_container = run_container
    try:
        made(**arguments)
    except DockerException as failure:
        raise Refused(f"a step's container does not start: {failure}. Are the images built (make images)?") from None
    except RuntimeError as failure:  # kfp.local has printed the failed task
        raise RunFailed(f"the run failed: {failure}. Run again to continue; finished work is kept", 1) from None


def run_container(client: Any, image: str, command: list[str], volumes: dict[str, Any], **options: Any) -> int:
    """Run a step's container; returns its exit code.

    Replaces the function of kfp.local (2.17), which auto-removes containers and reports success if one was removed
    before its exit code was read, because it was killed or quick.
    """
    container = client.containers.run(image=image, command=command, detach=True, volumes=volumes, **options)
    try:
        for line in container.logs(stream=True):
            print(line.decode(errors="replace"), end="")
        return int(container.wait()["StatusCode"])
    finally:
        container.remove(force=True)


def set_images(spec: Any, arguments: dict[str, Any]) -> None:
    """Insert the image references, as a cluster's driver does; the local runner knows no run arguments there."""
    inputs = spec.root.input_definitions.parameters
    for executor in spec.deployment_spec["executors"].values():
        if argument := IMAGE.fullmatch(executor["container"]["image"]):
            default = inputs[argument[1]].default_value.string_value
            executor["container"]["image"] = arguments.get(argument[1], default)


def container_options() -> dict[str, Any]:
    """Options of every step's container: restricted as on a cluster.

    Raises WrongParameters for a store that the steps cannot write to.
    """
    from docker.types import Mount

    names = (*ADDRESSES, *STORE_SECRET, *TRACKING_SECRET, "AWS_REGION")
    passed_on = environment.passed_on(names)
    store, mounts = environment.STORE.get(), []
    if "://" not in store:
        folder = Path(store).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if folder.stat().st_uid != USER and not folder.stat().st_mode & 0o002:
            raise WrongParameters(f"VGG_STORE: {folder} is not writable for the steps' user: chown {USER} {folder}")
        mounts = [Mount(MOUNT, str(folder), type="bind")]
        passed_on["VGG_STORE"] = MOUNT
    return {
        "environment": {
            **passed_on,
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
