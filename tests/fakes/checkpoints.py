"""Checkpoints of tiny networks, and manifests rewritten to fit whatever a test did to their files."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TRAIN

from runtime import checkpoint, manifest
from runtime.checkpoint import FILES, Tensors
from runtime.distributed import Group
from vgg.network.model import CONFIGURATIONS, VGG, Architecture
from vgg.network.trained import shapes_of
from vgg.training.task import State

ALONE = Group(0, 1, 0, 1, torch.device("cpu"))


SEED = 20140904


TINY = ((1,), (1,), (1, 1), (1, 1), (1, 1))


NETWORK = {"configuration": "A", "batch_norm": True, "classifier_width": 3, "num_classes": 3, "input_size": 32}


METADATA: dict[str, Any] = {
    "run": {
        "train": TRAIN,
        "data": {"digest": "d" * 32 + ".dir", "classes_sha256": "c" * 64},
        "initial": None,
        "precision": "float32",
        "code": {"vgg/training/loop.py": "1"},
    },
    "network": NETWORK,
    "pixels": {"mean": [120.0, 110.0, 100.0], "std": [1.0, 1.0, 1.0]},
    "classes": [{"wnid": "cat", "name": "cat"}, {"wnid": "dog", "name": "dog"}, {"wnid": "emu", "name": "emu"}],
    "versions": {"torch": "2", "decoder": "none"},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of one channel: a checkpoint has a few kilobytes, so that random bytes hit JSON and tensors equally."""
    monkeypatch.setitem(CONFIGURATIONS, "A", TINY)
    monkeypatch.setitem(CONFIGURATIONS, "B", ((1, 1), (1, 1), (1, 1), (1, 1), (1, 1)))


def tensors(network: dict[str, Any] = NETWORK, seed: int = 0) -> tuple[Tensors, Tensors]:
    """Random weights and momentum of a network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = VGG(Architecture(**network))
    weights = {
        name: torch.rand(like.shape, generator=generator).to(like.dtype) for name, like in model.state_dict().items()
    }
    return weights, {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}


def saved(directory: Path, step: int, metadata: dict[str, Any] = METADATA) -> Path:
    """Save a good checkpoint of a step."""
    state = vars(State(step=step, best_step=1, schedule={"best_error": 0.5, "epochs_without": 0, "drops": 0}))
    return checkpoint.save(directory, step, *tensors(metadata["network"], step), state, metadata)


def finished(directory: Path) -> Path:
    saved(directory, 1)
    saved(directory, 2)
    checkpoint.finish(directory, 2, 1, METADATA, shapes_of)
    return directory


def rewrite_manifest(
    directory: Path, schema: str = checkpoint.STEP_SCHEMA, names: list[str] | None = None, **body: Any
) -> None:
    """Rewrite the manifest to match the current files.  body: changed entries (None: removed)."""
    metadata = json.loads((directory / manifest.NAME).read_bytes())
    names = names or [entry["path"] for entry in metadata["files"]]
    entries = [manifest.file_entry(directory, name, schema == checkpoint.SCHEMA) for name in names]
    metadata = {**metadata, **body}
    metadata = {k: v for k, v in metadata.items() if k not in ("schema", "files", "sha256") and v is not None}
    metadata.pop("dvc_digest", None)
    (directory / manifest.NAME).write_bytes(manifest.text(manifest.compose(schema, metadata, entries)))


def rewrite_manifests(step: Path, **body: Any) -> None:
    """Rewrite the manifests of a step in a finished directory and of the directory."""
    rewrite_manifest(step, **body)
    rewrite_manifest(step.parent, checkpoint.SCHEMA)


def cut(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        os.truncate(path, int(path.stat().st_size * share))

    return damage


def with_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(step: Path) -> None:
        state = json.loads((step / "state.json").read_bytes())
        (step / "state.json").write_text(json.dumps(change(state)))

    return rewrite


WEIGHTS, MOMENTUM, STATE = FILES
