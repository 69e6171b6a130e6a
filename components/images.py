"""Which container image a stage runs in: by content, so that a cache hit is one and a changed program is another.

The tag is the hash of all our code that runs in the step, of the lock file of its image and of the Dockerfile.  A new
README keeps the tag; a changed line of the trainer does not.  Code around the science is in it, unlike in DVC's
dependencies: a mended program has to reach the cluster, where it then finds its finished work and makes nothing anew.

python -m components.images prints the four references.
"""

from __future__ import annotations

import hashlib

from components.closure import ROOT, fingerprint, program
from runtime import environment

TARGETS = {"shard": "data", "train": "train", "evaluate": "train", "register": "serve"}  # of docker/Dockerfile
AROUND = {  # what runs in the image beside the stage's program
    "train": ("components.trainjob.__main__", "components.launch"),
    "register": ("components.report.__main__", "components.register.served"),
}


def tag(stage: str) -> str:
    """16 hex digits."""
    digest = hashlib.sha256()
    for name in program(stage, "components.step", *AROUND.get(stage, ())):
        digest.update(f"{name} {fingerprint(name)}\n".encode())
    for name in ("docker/Dockerfile", "docker/install.sh", lock(TARGETS[stage])):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def lock(target: str) -> str:
    """What is installed in the image of a target."""
    return f"docker/{target}.lock"


def reference(stage: str) -> str:
    """<VGG_REGISTRY>/vgg-<target>:<stage>-<tag>; VGG_REGISTRY is an address and no parameter."""
    return f"{environment.REGISTRY.get()}/vgg-{TARGETS[stage]}:{stage}-{tag(stage)}"


def listing() -> str:
    """The references, a stage a line."""
    return "\n".join(f"{stage:10}{reference(stage)}" for stage in TARGETS)


if __name__ == "__main__":
    print(listing())
