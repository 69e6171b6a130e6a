"""Checkpoints: written so that a kill at any moment leaves a good one, and never trusted unverified.

    <directory>/step-00000300/   weights.safetensors  momentum.safetensors  state.json  manifest.json
    <directory>/manifest.json    when training is finished: which step is last, which was best; sha256 of everything

A step's files are written into a folder under another name, fsynced, then the folder is renamed.  There is no pointer
to the newest: it is the highest step that verifies and belongs to this run.  safetensors and JSON only; nothing here
can run code.  A sha256 that fits is not enough: a checkpoint is opened only if its files are what their names say.
"""

from __future__ import annotations

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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from runtime import manifest
from runtime.errors import Refused

log = logging.getLogger("vgg.checkpoint")

STEP_SCHEMA = "vgg.checkpoint.step/1"
SCHEMA = "vgg.checkpoint/1"
FILES = ("weights.safetensors", "momentum.safetensors", "state.json")  # of a step, beside its manifest
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Expected:
    """What the tensors of a network must be: (type as safetensors writes it, shape) by name; names of those with a
    momentum."""

    weights: dict[str, tuple[str, list[int]]]
    learnt: set[str]


# of the manifest's "network".  Raises ValueError for what is no network.
ShapesOf = Callable[[dict[str, Any]], Expected]


class Entry(BaseModel, strict=True):
    path: str
    size: int
    sha256: str


class About(BaseModel, strict=True):
    """What the manifests of a step and of a finished training have in common; readers rely on these."""

    files: list[Entry]
    run: dict[str, Any]
    network: dict[str, Any]
    pixels: dict[str, list[float]]
    classes: list[Any]
    versions: dict[str, Any]


class AboutStep(About):
    step: int


class AboutTraining(About):
    last: str
    best: str


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
        entries = [manifest.file_entry(temporary, name, md5=False) for name in FILES]
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
    names = [path.name for path in directory.glob("step-*")]
    return sorted(int(name[5:]) for name in names if re.fullmatch("step-[0-9]{8}", name))


def open_step(directory: Path, step: int, shapes_of: ShapesOf, known: list[dict[str, Any]] | None = None) -> Step:
    """One checkpoint, every byte of it verified before any is parsed, and every file what its name says.

    known: entries of files below `directory` whose sha256 was computed just now; those are not read a second time.
    The tensors have the names, shapes and types of the network; their values are read later.
    Raises Refused, naming the file.
    """
    path = directory / step_name(step)
    about = manifest.read(path, STEP_SCHEMA)
    _expect(AboutStep, about, path)
    _expect_files(about, path, FILES)
    for found in path.iterdir():
        if found.name not in (*FILES, manifest.NAME) or not found.is_file():
            raise Refused(f"{path}: {found.name!r} is no file of a checkpoint. Remove it.")
    digests = {entry["path"]: entry["sha256"] for entry in known or ()}
    for entry in about["files"]:
        if digests.get(f"{path.name}/{entry['path']}") != entry["sha256"]:
            manifest.verify_file(path, entry)
    if about["step"] != step:
        raise Refused(f"{path}: holds step {about['step']}. The folder has been renamed; give it its name back.")
    _expect_tensors(path, about["network"], shapes_of)
    return Step(path, step, _read_state(path / "state.json", step), about)


def _expect(model: type[BaseModel], about: dict[str, Any], path: Path) -> None:
    try:
        model.model_validate(about)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(f"{path / manifest.NAME}: {where}: {first['msg']}. No training wrote it.") from None


def _expect_files(about: dict[str, Any], path: Path, names: Iterable[str]) -> None:
    """A manifest that lists other files, outside of its directory perhaps, is no checkpoint's."""
    listed = sorted(entry["path"] for entry in about["files"])
    if listed != sorted(names):
        raise Refused(f"{path / manifest.NAME}: lists {listed} instead of {sorted(names)}. No training wrote it.")


def _read_state(path: Path, step: int) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        state = json.loads(path.read_bytes(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path}: not JSON ({error}). No training wrote it.") from None
    if not isinstance(state, dict) or state.get("step") != step:
        raise Refused(f"{path}: not the state of step {step}. No training wrote it.")
    return state


def _expect_tensors(path: Path, network: dict[str, Any], shapes_of: ShapesOf) -> None:
    """Raises Refused unless the tensors of a step are those of its network.  Reads headers only."""
    try:
        wanted = shapes_of(network)
    except ValueError as error:
        raise Refused(f"{path / manifest.NAME}: network {network}: {error}.") from None
    for file in FILES[:2]:
        try:
            with safe_open(path / file, "pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # it is no dict
                found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise Refused(f"{path / file}: not a safetensors file ({error}). No training wrote it.") from None
        expected = wanted.weights if file == FILES[0] else {name: wanted.weights[name] for name in wanted.learnt}
        if file == FILES[1] and not found:  # before the first update, and without momentum
            continue
        for wrong in sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
            raise Refused(
                f"{path / file}: {wrong!r} is {_shown(found.get(wrong))}; this network has it "
                f"{_shown(expected.get(wrong))}. No training wrote it."
            )


def _shown(tensor: tuple[str, list[int]] | None) -> str:
    return f"{tensor[0]} {tensor[1]}" if tensor else "absent"


def newest(directory: Path, shapes_of: ShapesOf, differs: Callable[[Step], list[str]] = lambda _: []) -> Step | None:
    """The newest checkpoint that verifies and belongs to this run; None if there is no checkpoint at all.

    differs: what sets the run of a checkpoint apart from this one, a line each; it may refuse one as damaged, too.
    Those that are damaged or of another run are named and passed over.  Raises Refused if there are some but none is
    good: starting afresh without a word would throw away a run.
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
            log.warning("checkpoint refused: %s is of another run: %s", other.path, "; ".join(changes))
        if step != found[-1]:
            log.warning("falling back to %s", candidate.path)
        return candidate
    if others:
        other, changes = others[0]
        listing = "\n".join(f"  {change}" for change in changes)
        raise Refused(
            f"{directory}: holds an unfinished run (step {other.step}) that differs:\n{listing}\n"
            "To continue it, restore these (for code alone: --accept-code-change). "
            f"To start anew: rm -r {directory}"
        )
    if found:
        raise Refused(
            f"{directory}: none of its {len(found)} checkpoints verifies (each is named above). "
            f"Restore one from a copy, or start anew with: rm -r {directory}"
        )
    return None


def set_later_aside(directory: Path, step: int) -> None:
    """Move the checkpoints after a step, all of them refused, to <directory>.refused: the run would overwrite them."""
    aside = manifest.sibling(directory, ".refused")
    for later in (later for later in steps(directory) if later > step):
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / step_name(later), ignore_errors=True)
        os.rename(directory / step_name(later), aside / step_name(later))
        log.warning("%s lies in %s now", step_name(later), aside)


def prune(directory: Path, keep: set[int]) -> None:
    """Delete the checkpoints of all other steps, and what an interrupted save left."""
    for step in steps(directory):
        if step not in keep:
            shutil.rmtree(directory / step_name(step))
    for leftover in directory.glob("*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def finish(
    directory: Path, last: int, best: int, about: dict[str, Any], shapes_of: ShapesOf
) -> tuple[dict[str, Any], Step]:
    """Declare training finished: keep the last and the best checkpoint, and write the directory's manifest.

    Returns the manifest and the last step.  Raises Refused if one of them does not verify: the manifest would vouch for
    it.
    """
    entries, opened = [], {}
    for step in sorted({last, best}):
        names = [f"{step_name(step)}/{name}" for name in (*FILES, manifest.NAME)]
        of_step = [manifest.file_entry(directory, name) for name in sorted(names)]
        opened[step] = open_step(directory, step, shapes_of, known=of_step)
        entries += of_step
    prune(directory, {last, best})
    body = {**about, "last": step_name(last), "best": step_name(best)}
    return manifest.write(directory, SCHEMA, body, entries), opened[last]


def set_aside(directory: Path) -> Path:
    """Move a finished checkpoint out of the way of a run with other parameters.  Returns where it lies now."""
    aside = manifest.sibling(directory, ".previous")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(directory.resolve(), aside)
    return aside


def open_finished(directory: Path, which: str, shapes_of: ShapesOf) -> tuple[dict[str, Any], Step]:
    """The manifest of a finished training, every file of it verified, and its step.

    which: "last" or "best".  Raises Refused if training is not finished or anything is damaged.
    """
    about = manifest.read(directory, SCHEMA)
    _expect(AboutTraining, about, directory)
    kept = {about["last"], about["best"]}
    if not all(re.fullmatch("step-[0-9]{8}", name) for name in kept):
        raise Refused(f"{directory / manifest.NAME}: last and best are {sorted(kept)}. No training wrote it.")
    _expect_files(about, directory, [f"{name}/{file}" for name in kept for file in (*FILES, manifest.NAME)])
    for entry in about["files"]:
        manifest.verify_file(directory, entry)
    step = open_step(directory, int(about[which].removeprefix("step-")), shapes_of, known=about["files"])
    for name in ("network", "pixels", "classes"):  # of the best step another code may be recorded
        if step.about[name] != about[name]:
            raise Refused(f"{directory / manifest.NAME}: its {name} are not those of {step.path}.")
    return about, step


def differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """What differs between two JSON values, one line a leaf: '<path>: <there> there, <here> here'."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            yield from differences(there.get(key), here.get(key), f"{path}.{key}" if path else key)
    elif there != here:
        yield f"{path}: {there} there, {here} here"
