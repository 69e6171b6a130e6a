"""The container image of each stage, tagged by content: the same tag means the same program.

The tag is the hash of all code that runs in the step, of the lock file of its image and of the Dockerfile.  A change of
the README keeps the tag; a changed line of the trainer changes it.  Unlike DVC's dependencies, the tag also covers the
code around the science: a fixed program must reach the cluster, where it finds finished work and does not repeat it.

python -m components.images prints the references: those of the four stages, and of the optional one.
"""

from __future__ import annotations

import hashlib

from components import program
from components.closure import ROOT, fingerprint
from components.closure import program as files_of
from runtime import environment

TARGETS = {  # of docker/Dockerfile
    "shard": "data", "train": "train", "evaluate": "train", "register": "serve", "localise": "train",
}  # fmt: skip
EXTRA_MODULES = {  # that run in the image of a stage besides its program
    "train": ("components.trainjob.__main__", "components.launch"),
    "localise": ("components.trainjob.__main__", "components.launch"),
    "register": (
        "components.report.__main__",
        "components.register.version.served",
        "components.register.gate",
        "components.services",
    ),
}


def tag(stage: str) -> str:
    """16 hex digits."""
    digest = hashlib.sha256()
    for name in files_of(stage, "components.step", *EXTRA_MODULES.get(stage, ())):
        digest.update(f"{name} {fingerprint(name)}\n".encode())
    for name in ("docker/Dockerfile", "docker/install.sh", lock(TARGETS[stage])):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def lock(target: str) -> str:
    """Lock file of the packages in the image of a target."""
    return f"docker/{target}.lock"


def reference(stage: str) -> str:
    """<VGG_REGISTRY>/vgg-<target>:<stage>-<tag>; VGG_REGISTRY is an address, not a parameter."""
    return f"{environment.REGISTRY.get()}/vgg-{TARGETS[stage]}:{stage}-{tag(stage)}"


def listing() -> str:
    """The references, one stage per line."""
    return "\n".join(f"{stage:10}{reference(stage)}" for stage in TARGETS)


def main() -> None:
    program.Parser("components.images", __doc__).parse_args()
    print(listing())


if __name__ == "__main__":
    program.run(main)
