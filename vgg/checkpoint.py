"""Checkpoints: written so that a kill at any moment leaves a good one, and never trusted unverified.

    <directory>/step-00000300/   weights.safetensors  momentum.safetensors  state.json  manifest.json
    <directory>/manifest.json    when training is finished: which step is last, which was best; sha256 of everything

A step's files are written into a folder under another name, fsynced, then the folder is renamed.  There is no pointer
to the newest: it is the highest step that verifies.  safetensors and JSON only; nothing here can run code.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vgg import manifest
from vgg.errors import Refused
from vgg.model import VGG, Architecture, blank

log = logging.getLogger("vgg.checkpoint")

STEP_SCHEMA = "vgg.checkpoint.step/1"
SCHEMA = "vgg.checkpoint/1"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """One verified checkpoint.  state: counters and curves, JSON.  about: run, network, pixels, versions."""

    path: Path
    step: int
    state: dict[str, Any]
    about: dict[str, Any]

    def weights(self) -> Tensors:
        return load_file(self.path / "weights.safetensors")

    def momentum(self) -> Tensors:
        return load_file(self.path / "momentum.safetensors")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def save(
    directory: Path, step: int, weights: Tensors, momentum: Tensors, state: dict[str, Any], about: dict[str, Any]
) -> Path:
    """Write the checkpoint of a step.  It exists whole under its name, or not at all.

    Raises StorageFailure when the disk is full; earlier checkpoints stay.
    """
    final, temporary = directory / step_name(step), directory / f"{step_name(step)}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with manifest.storage_errors(temporary):
        temporary.mkdir(parents=True)
        for name, tensors in (("weights", weights), ("momentum", momentum)):
            try:
                save_file(tensors, temporary / f"{name}.safetensors")
            except Exception as error:  # safetensors reports I/O errors as its own type, with the text of the OSError
                if found := re.search(r"os error (\d+)", str(error)):
                    raise OSError(int(found[1]), str(error), str(temporary / f"{name}.safetensors")) from error
                raise
            os.chmod(temporary / f"{name}.safetensors", 0o644)  # safetensors makes it private
            with open(temporary / f"{name}.safetensors", "rb") as file:
                os.fsync(file.fileno())
        manifest.write_json(temporary / "state.json", state)
        names = ("weights.safetensors", "momentum.safetensors", "state.json")
        entries = [manifest.file_entry(temporary, name, md5=False) for name in names]
        manifest.write(temporary, STEP_SCHEMA, {**about, "step": step}, entries)
        earlier = directory / f"{step_name(step)}.old"
        if final.exists():  # found damaged and computed again, or saved before its validation: see recover()
            os.rename(final, earlier)
        os.rename(temporary, final)
        manifest.fsync_directory(directory)
        shutil.rmtree(earlier, ignore_errors=True)
    return final


def recover(directory: Path) -> None:
    """Give a checkpoint its name back whose replacement was interrupted between two renames."""
    for earlier in directory.glob("step-*.old"):
        final = earlier.with_suffix("")
        shutil.rmtree(earlier) if final.exists() else os.rename(earlier, final)


def steps(directory: Path) -> list[int]:
    """All steps that have a folder, verified or not, rising."""
    names = [path.name for path in directory.glob("step-????????")]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def open_step(directory: Path, step: int) -> Step:
    """One checkpoint, every byte of it verified before any is parsed.  Raises Refused, naming the file."""
    path = directory / step_name(step)
    about = manifest.read(path, STEP_SCHEMA)
    for entry in about["files"]:
        manifest.verify_file(path, entry)
    if about["step"] != step:
        raise Refused(f"{path}: holds step {about['step']}. The folder has been renamed; give it its name back.")
    return Step(path, step, json.loads((path / "state.json").read_bytes()), about)


def newest(directory: Path) -> Step | None:
    """The newest checkpoint that verifies; None if there is no checkpoint at all.

    Damaged ones are named and passed over.  Raises Refused if there are some but none is good: starting afresh without
    a word would throw away a run.
    """
    found = steps(directory)
    for step in reversed(found):
        try:
            return open_step(directory, step)
        except Refused as damage:
            log.warning("checkpoint refused: %s", damage)
    if found:
        raise Refused(
            f"{directory}: none of its {len(found)} checkpoints verifies (each is named above). "
            f"Restore one from a copy, or start anew with: rm -r {directory}"
        )
    return None


def prune(directory: Path, keep: set[int]) -> None:
    """Delete the checkpoints of all other steps, and what an interrupted save left."""
    for step in steps(directory):
        if step not in keep:
            shutil.rmtree(directory / step_name(step))
    for leftover in directory.glob("step-*.tmp"):
        shutil.rmtree(leftover)


def finish(directory: Path, last: int, best: int, about: dict[str, Any]) -> None:
    """Declare training finished: keep the last and the best checkpoint, and write the directory's manifest."""
    prune(directory, {last, best})
    names = sorted(str(p.relative_to(directory)) for p in directory.glob("step-*/*"))
    entries = [manifest.file_entry(directory, name) for name in names]
    body = {**about, "last": step_name(last), "best": step_name(best)}
    manifest.write(directory, SCHEMA, body, entries)


def set_aside(directory: Path) -> Path:
    """Move a finished checkpoint out of the way of a run with other parameters.  Returns where it lies now."""
    directory = directory.resolve()  # the name of "." is empty
    aside = directory.with_name(directory.name + ".previous")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(directory, aside)
    return aside


@dataclass(frozen=True)
class Trained:
    """A finished training's network, verified.  Opened for evaluation, registration and as first weights."""

    directory: Path
    manifest: dict[str, Any]
    step: Step
    digest: str  # what dvc.lock records for the directory

    @classmethod
    def open(cls, directory: Path, which: str = "last") -> Trained:
        """which: "last" or "best".  Raises Refused if training is not finished or anything is damaged."""
        about = manifest.read(directory, SCHEMA)
        for entry in about["files"]:
            manifest.verify_file(directory, entry)
        step = open_step(directory, int(about[which].removeprefix("step-")))
        return cls(directory, about, step, manifest.directory_digest(directory, about))

    @property
    def weights_sha256(self) -> str:
        entries = {entry["path"]: entry["sha256"] for entry in self.step.about["files"]}
        return str(entries["weights.safetensors"])

    def network(self) -> VGG:
        """The network with its weights, in evaluation mode."""
        model = blank(Architecture(**self.manifest["network"]))
        model.load_state_dict(self.step.weights())
        return model.eval()


def differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """What differs between two JSON values, one line a leaf: '<path>: <there> there, <here> here'."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            yield from differences(there.get(key), here.get(key), f"{path}.{key}" if path else key)
    elif there != here:
        yield f"{path}: {there} there, {here} here"
