"""Checkpoints: a kill at any moment leaves a good one, and none is used before it is verified.

    <directory>/step-00000300/   weights.safetensors  momentum.safetensors  state.json  manifest.json
    <directory>/manifest.json    when training is finished: the last and the best step, sha256 of every file

The files of a step are written to a folder under a temporary name and fsynced; then the folder is renamed.  No file
points to the newest checkpoint: it is the highest step that verifies and belongs to this run.  All files are
safetensors or JSON; reading them cannot run code.  A correct sha256 is not enough: types and shapes are checked, too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load, load_file, save_file

from runtime import filesystem, manifest
from runtime.errors import Refused
from runtime.wording import listing, some

log = logging.getLogger("vgg.checkpoint")

STEP_SCHEMA = "vgg.checkpoint.step/1"
SCHEMA = "vgg.checkpoint/1"
FILES = ("weights.safetensors", "momentum.safetensors", "state.json")  # of a step, in addition to its manifest
CANNOT_MAP = "os error 19"  # ENODEV: FUSE with direct_io cannot map files into memory
NOT_OURS = "This is not a checkpoint written by this program."
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Expected:
    """The tensors that a network must have.

    weights: (type as in safetensors, shape) by name.  trainable: names of those that have a momentum.
    """

    weights: dict[str, tuple[str, list[int]]]
    trainable: set[str]


# The expected tensors for the "network" of a manifest.  Raises ValueError if it does not describe a network.
ShapesOf = Callable[[dict[str, Any]], Expected]


class Entry(BaseModel, strict=True):
    path: str
    size: int
    sha256: str


class Metadata(BaseModel, strict=True):
    """Required entries of the manifests of a step and of a finished training."""

    files: list[Entry]
    run: dict[str, Any]
    network: dict[str, Any]
    pixels: dict[str, list[float]]
    classes: list[Any]
    versions: dict[str, Any]


class StepMetadata(Metadata):
    step: int


class TrainingMetadata(Metadata):
    last: str
    best: str


@dataclass(frozen=True)
class Step:
    """One verified checkpoint.

    state: counters and curves, from state.json.  metadata: run, network, pixels, classes and versions, from the
    manifest.
    """

    path: Path
    step: int
    state: dict[str, Any]
    metadata: dict[str, Any]

    def weights(self) -> Tensors:
        return read_tensors(self.path / "weights.safetensors")

    def momentum(self) -> Tensors:
        return read_tensors(self.path / "momentum.safetensors")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def save(
    directory: Path, step: int, weights: Tensors, momentum: Tensors, state: dict[str, Any], metadata: dict[str, Any]
) -> Path:
    """Write the checkpoint of a step, atomically.  Returns its folder.

    Raises StorageFailure when the disk is full; earlier checkpoints are kept.
    """
    final, temporary = directory / step_name(step), directory / f"{step_name(step)}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    needed = sum(tensor.nbytes for tensors in (weights, momentum) for tensor in tensors.values())
    with manifest.storage_errors(temporary, needed), contextlib.ExitStack() as unless_saved:
        unless_saved.callback(shutil.rmtree, temporary, ignore_errors=True)  # a full disk gets its space back
        temporary.mkdir(parents=True)
        for name, tensors in (("weights", weights), ("momentum", momentum)):
            try:
                save_file(tensors, temporary / f"{name}.safetensors")
            except Exception as error:  # safetensors raises its own type for I/O errors, with the text of the OSError
                if found := re.search(r"os error (\d+)", str(error)):
                    number = int(found[1])
                    raise OSError(number, os.strerror(number), str(temporary / f"{name}.safetensors")) from error
                raise
            filesystem.make_readable(temporary / f"{name}.safetensors")  # safetensors writes it with mode 0600
            with open(temporary / f"{name}.safetensors", "rb") as file:
                filesystem.fsync(file.fileno())
        manifest.write_json(temporary / "state.json", state)
        entries = [manifest.file_entry(temporary, name, md5=False) for name in FILES]
        manifest.write(temporary, STEP_SCHEMA, {**metadata, "step": step}, entries)
        earlier = directory / f"{step_name(step)}.old"
        if final.exists():  # it was damaged, or saved before its validation; see recover()
            os.rename(final, earlier)
        os.rename(temporary, final)
        filesystem.fsync_directory(directory)
        unless_saved.pop_all()
        shutil.rmtree(earlier, ignore_errors=True)
    return final


def recover(directory: Path) -> None:
    """Restore the name of a checkpoint whose replacement was interrupted between the two renames of save()."""
    for earlier in directory.glob("step-*.old"):
        final = earlier.with_suffix("")
        shutil.rmtree(earlier) if final.exists() else os.rename(earlier, final)


def steps(directory: Path) -> list[int]:
    """All steps that have a folder, verified or not, in ascending order."""
    names = [path.name for path in directory.glob("step-*")]
    return sorted(int(name[5:]) for name in names if re.fullmatch("step-[0-9]{8}", name))


def open_step(directory: Path, step: int, shapes_of: ShapesOf, known: list[dict[str, Any]] | None = None) -> Step:
    """Open one checkpoint.  Every byte is verified before anything is parsed.

    known: entries of files in `directory` whose size and sha256 were just computed; these are not read again.
    The names, shapes and types of the tensors are checked against the network; their values are not read yet.
    Raises Refused, naming the file.
    """
    path = directory / step_name(step)
    metadata = manifest.read(path, STEP_SCHEMA)
    _expect(StepMetadata, metadata, path)
    _expect_files(metadata, path, FILES)
    for found in path.iterdir():
        if found.name not in (*FILES, manifest.NAME) or not found.is_file():
            raise Refused(f"{path}: {found.name!r} is not a checkpoint file. Remove it.")
    verified = {(entry["path"], entry["size"], entry["sha256"]) for entry in known or ()}
    for entry in metadata["files"]:
        if (f"{path.name}/{entry['path']}", entry["size"], entry["sha256"]) not in verified:
            manifest.verify_file(path, entry)
    if metadata["step"] != step:
        raise Refused(f"{path}: contains step {metadata['step']}. The folder was renamed; restore its name.")
    _expect_tensors(path, metadata, shapes_of)
    return Step(path, step, _read_state(path / "state.json", step), metadata)


def _expect(model: type[BaseModel], metadata: dict[str, Any], path: Path) -> None:
    try:
        model.model_validate(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(f"{path / manifest.NAME}: {where}: {first['msg']}. {NOT_OURS}") from None


def _expect_files(metadata: dict[str, Any], path: Path, names: Iterable[str]) -> None:
    """Raises Refused if the manifest lists other files, for example outside its directory."""
    listed = sorted(entry["path"] for entry in metadata["files"])
    if listed != sorted(names):
        raise Refused(f"{path / manifest.NAME}: lists {some(listed)} instead of {some(sorted(names))}. {NOT_OURS}")


def _read_state(path: Path, step: int) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not valid JSON")

    try:
        state = json.loads(path.read_bytes(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path}: not JSON ({error}). {NOT_OURS}") from None
    if not isinstance(state, dict) or state.get("step") != step:
        raise Refused(f"{path}: not the state of step {step}. {NOT_OURS}")
    return state


def _expect_tensors(path: Path, metadata: dict[str, Any], shapes_of: ShapesOf) -> None:
    """Raises Refused unless the tensors of a step match its network.  Reads headers only."""
    network, frozen = metadata["network"], metadata["run"].get("frozen", [])
    try:
        wanted = shapes_of(network)
    except ValueError as error:
        raise Refused(f"{path / manifest.NAME}: network {network}: {error}.") from None
    for file in FILES[:2]:
        try:
            found = _header(path / file)
        except (SafetensorError, OSError, ValueError) as error:
            raise Refused(f"{path / file}: not a safetensors file ({error}). {NOT_OURS}") from None
        trained = {name: wanted.weights[name] for name in wanted.trainable if name not in frozen}
        expected = wanted.weights if file == FILES[0] else trained
        if file == FILES[1] and not found:  # none before the first update or without momentum
            continue
        for wrong in sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
            raise Refused(
                f"{path / file}: {wrong!r} is {_describe(found.get(wrong))}; the network requires "
                f"{_describe(expected.get(wrong))}. {NOT_OURS}"
            )


def _header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor in a file.  Raises SafetensorError, OSError or ValueError."""
    try:
        with safe_open(path, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        if CANNOT_MAP not in str(error):
            raise
        parts = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
        return {name: (part["dtype"], list(part["shape"])) for name, part in parts}


def read_tensors(path: Path) -> Tensors:
    """The tensors of a safetensors file, which must have been verified."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        if CANNOT_MAP not in str(error):
            raise
        return load(path.read_bytes())


def _describe(tensor: tuple[str, list[int]] | None) -> str:
    return f"{tensor[0]} {tensor[1]}" if tensor else "absent"


def newest(directory: Path, shapes_of: ShapesOf, differs: Callable[[Step], list[str]] = lambda _: []) -> Step | None:
    """The newest checkpoint that verifies and belongs to this run; None if there are no checkpoints.

    differs: the differences between the run of a checkpoint and this run, one line each; may raise Refused, too.
    Checkpoints that are damaged or belong to another run are logged and skipped.  Raises Refused if there are
    checkpoints but none is good: starting at step 0 would discard a run.
    """
    found = steps(directory)
    others: list[tuple[Step, list[str]]] = []
    for step in reversed(found):
        try:
            candidate = open_step(directory, step, shapes_of)
            changes = differs(candidate)
        except Refused as damage:
            log.warning("checkpoint refused: %s", damage)
            continue
        if changes:
            others.append((candidate, changes))
            continue
        for other, changes in others:
            log.warning("checkpoint refused: %s belongs to another run: %s", other.path, some(changes, "; "))
        if step != found[-1]:
            log.warning("falling back to %s", candidate.path)
        return candidate
    if others:
        other, changes = others[0]
        raise Refused(
            f"{directory}: contains an unfinished run (step {other.step}) that differs:\n{listing(changes)}\n"
            "To continue it, restore these values (if only code differs: --accept-code-change). "
            f"To start again: rm -r {directory}",
            changes,
        )
    if found:
        raise Refused(
            f"{directory}: none of its {len(found)} checkpoints verifies (see the messages above). "
            f"Restore one from a copy, or start again: rm -r {directory}"
        )
    return None


def move_later(directory: Path, step: int) -> None:
    """Move the checkpoints after a step, all of them refused, to <directory>.refused.

    The run would overwrite them.
    """
    target = manifest.sibling(directory, ".refused")
    for later in (later for later in steps(directory) if later > step):
        target.mkdir(exist_ok=True)
        shutil.rmtree(target / step_name(later), ignore_errors=True)
        os.rename(directory / step_name(later), target / step_name(later))
        log.warning("%s: moved to %s", step_name(later), target)


def prune(directory: Path, keep: set[int]) -> None:
    """Delete the checkpoints of all other steps, and leftovers of an interrupted save."""
    for step in steps(directory):
        if step not in keep:
            shutil.rmtree(directory / step_name(step))
    for leftover in directory.glob("*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def finish(
    directory: Path, last: int, best: int, metadata: dict[str, Any], shapes_of: ShapesOf
) -> tuple[dict[str, Any], Step]:
    """Finish a training: keep the last and the best checkpoint, and write the directory's manifest.

    Returns the manifest and the last step.  Raises Refused if one of the two does not verify: the manifest would
    confirm damaged files.
    """
    entries, opened = [], {}
    for step in sorted({last, best}):
        names = sorted(f"{step_name(step)}/{name}" for name in (*FILES, manifest.NAME))
        of_step = [manifest.file_entry(directory, name) for name in names if (directory / name).is_file()]
        opened[step] = open_step(directory, step, shapes_of, known=of_step)
        entries += of_step
    prune(directory, {last, best})
    body = {**metadata, "last": step_name(last), "best": step_name(best)}
    return manifest.write(directory, SCHEMA, body, entries), opened[last]


def move_finished(directory: Path) -> Path:
    """Move a finished training to <directory>.previous, before a run with other inputs.  Returns the new path."""
    target = manifest.sibling(directory, ".previous")
    shutil.rmtree(target, ignore_errors=True)
    os.rename(directory.resolve(), target)
    return target


def open_finished(directory: Path, which: str, shapes_of: ShapesOf) -> tuple[dict[str, Any], Step]:
    """The manifest of a finished training and one of its steps; every file is verified.

    which: "last" or "best".  Raises Refused if training is not finished or anything is damaged.
    """
    metadata = manifest.read(directory, SCHEMA)
    _expect(TrainingMetadata, metadata, directory)
    names = {metadata["last"], metadata["best"]}
    if not all(re.fullmatch("step-[0-9]{8}", name) for name in names):
        raise Refused(f"{directory / manifest.NAME}: last and best are {sorted(names)}. {NOT_OURS}")
    _expect_files(metadata, directory, [f"{name}/{file}" for name in names for file in (*FILES, manifest.NAME)])
    for entry in metadata["files"]:
        manifest.verify_file(directory, entry)
    step = open_step(directory, int(metadata[which].removeprefix("step-")), shapes_of, known=metadata["files"])
    for name in ("network", "pixels", "classes"):  # "run" may differ: the code may have changed since the best step
        if step.metadata[name] != metadata[name]:
            raise Refused(f"{directory / manifest.NAME}: {name!r} differs from {step.path}.")
    return metadata, step


def differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """The differences between two JSON values, one line per leaf: '<path>: <there> there, <here> here'."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            yield from differences(there.get(key), here.get(key), f"{path}.{key}" if path else key)
    elif there != here:
        yield f"{path}: {there} there, {here} here"
