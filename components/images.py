"""Which container image a stage runs in: by content, so that a cache hit is one and a changed program is another.

The tag is the hash of the stage's science closure, the lock file and the Dockerfile.  A new README or a reworded help
text keeps the tag; a changed line of training code does not.
"""

from __future__ import annotations

import hashlib
import os

from components.closure import ROOT, fingerprints

TARGETS = {"shard": "data", "train": "train", "evaluate": "train", "register": "serve"}  # of docker/Dockerfile


def tag(stage: str) -> str:
    """16 hex digits."""
    digest = hashlib.sha256()
    for name, sha256 in fingerprints(stage).items():
        digest.update(f"{name} {sha256}\n".encode())
    for name in ("requirements.lock", "docker/Dockerfile"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def reference(stage: str) -> str:
    """<VGG_REGISTRY>/vgg-<target>:<stage>-<tag>; VGG_REGISTRY is an address and no parameter."""
    registry = os.environ.get("VGG_REGISTRY", "localhost")
    return f"{registry}/vgg-{TARGETS[stage]}:{stage}-{tag(stage)}"
