"""The container engine of the tests: podman, configured to run in a container or on a small machine too."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from socket import create_connection as connection

from conftest import ROOT
from ports import free_port

from pipelines.build import PYTHON

CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")  # of Debian; may include the network's own
# runc and these limits also work without CAP_SYS_RESOURCE and on hybrid cgroups, where crun does not
SETTINGS = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
netns = "host"
[engine]
runtime = "runc"
"""
# the limits of Pod Security "restricted", and no network and no writable root file system
HARDENED = (
    *("--user", "65532:65532", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none"),
    *("--tmpfs", "/tmp:rw,exec,size=2g,mode=1777"),
)


def configure_podman(folder: Path) -> None:
    """Set the configuration of every podman started by this process.  Fails if podman is not installed."""
    needed = ("podman", "runc", "debootstrap", "docker-registry")
    missing = [name for name in needed if not shutil.which(name)]
    assert not missing, (
        f"{', '.join(missing)} missing; as root: apt-get install podman runc debootstrap docker-registry"
    )
    path = folder / "containers.conf"
    path.write_text(SETTINGS)
    os.environ["CONTAINERS_CONF"] = str(path)
    os.environ["BUILDAH_FORMAT"] = "docker"


def podman(*words: str, timeout: int = 600) -> str:
    done = subprocess.run(["podman", *words], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"podman {' '.join(words[:3])}…:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def base() -> str:
    """Id of the base image: the published one or, if it cannot be pulled, one built from Debian packages."""
    name = "localhost/vgg-base:bookworm"
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
        podman("pull", "--quiet", PYTHON, timeout=60)
        name = PYTHON
    if name != PYTHON and subprocess.run(["podman", "image", "exists", name], timeout=60).returncode:
        subprocess.run([ROOT / "docker/debian.sh", name], check=True, timeout=600)
    return podman("image", "inspect", "--format", "{{.Id}}", name).strip()


@contextlib.contextmanager
def socket(folder: Path) -> Iterator[str]:
    """Run podman's service for Docker clients: yields the value of DOCKER_HOST."""
    path = folder / "podman.sock"
    with open(folder / "podman.log", "w") as log:
        service = subprocess.Popen(["podman", "system", "service", "--time", "0", f"unix://{path}"], stderr=log)
    try:
        deadline = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < deadline and service.poll() is None, (folder / "podman.log").read_text()
            time.sleep(0.05)
        yield f"unix://{path}"
    finally:
        service.terminate()
        service.wait(30)


@contextlib.contextmanager
def image_registry(folder: Path) -> Iterator[str]:
    """Run an image registry on loopback, without TLS; yields host and port.  Writes registries.conf to the folder."""
    port = free_port()
    (folder / "registries.conf").write_text(f'[[registry]]\nlocation = "localhost:{port}"\ninsecure = true\n')
    storage = f"storage: {{filesystem: {{rootdirectory: {folder}/images}}}}"
    (folder / "registry.yml").write_text(f"version: 0.1\nhttp: {{addr: 'localhost:{port}'}}\n{storage}\n")
    with open(folder / "registry.log", "w") as log:
        command = ["docker-registry", "serve", str(folder / "registry.yml")]
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), connection(("localhost", port), 1):
                break
            assert time.monotonic() < deadline and server.poll() is None, (folder / "registry.log").read_text()
            time.sleep(0.05)
        yield f"localhost:{port}"
    finally:
        server.terminate()
        server.wait(30)
