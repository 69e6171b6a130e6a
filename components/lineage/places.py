"""Where content lies: the folders of dvc.yaml, VGG_STORE, DVC's cache and its remotes, or an address that a run names.

A finished folder is known by its digest, wherever it lies; a folder that holds other content is not a copy.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from components.shard.verify import CHUNK_BYTES, Directory, Location
from runtime import environment, manifest
from runtime.errors import Problem, Refused
from runtime.store import storage

log = logging.getLogger("vgg")

MADE_BY = {"shard": "data", "train": "training", "evaluate": "evaluation"}
KINDS = {
    "vgg.predictions/2": "evaluation", "vgg.checkpoint/1": "training", "vgg.shards/2": "data",
    "vgg.localisations/1": "localisations", "vgg.boxes/1": "boxes",
}  # fmt: skip
NETWORKS = ("training", "localiser")  # the kinds of a checkpoint
KIND_NAMES = {*KINDS.values(), *NETWORKS}  # folders of the stage localise are named like the kind
STORE_DEPTH = 3  # folders below VGG_STORE in which a finished one is looked for


@dataclass(frozen=True)
class Place:
    """A finished folder, intact or not.  damage: of its manifest; then kind is what the manifest states, unverified."""

    address: str
    location: Location = field(repr=False)
    kind: str
    digest: str
    manifest: dict[str, Any] = field(repr=False)
    damage: str = ""

    @property
    def weights(self) -> dict[str, str]:
        """sha256 of the weights of a network's steps, by step; {} for other folders."""
        ending = "/weights.safetensors"
        files = self.manifest.get("files", []) if self.kind in NETWORKS else []
        return {f["path"].removesuffix(ending): f["sha256"] for f in files if f["path"].endswith(ending)}


def read(address: str, location: Location, kind: str = "") -> Place | None:
    """The finished folder at an address; None if there is none, or one of other software.

    kind: that it should be, if its manifest is so damaged that it does not say.
    """
    raw = location.get(manifest.NAME)
    if raw is None:
        return None
    schema = manifest.schema_of(raw)
    if schema not in KINDS and (schema or not kind):
        return None
    try:
        content = manifest.parse(raw, schema, f"{address}/{manifest.NAME}")
    except Refused as damage:
        stated = KINDS.get(schema, kind)
        return Place(address, location, kind if {stated, kind} == {*NETWORKS} else stated, "", {}, str(damage))
    found = "localiser" if "localise" in content.get("run", {}) else KINDS[schema]
    return Place(address, location, found, manifest.digest_with(raw, content), content)


def at(address: str) -> Place | None:
    """The finished folder at a resolved address, local or s3://.  Raises Unreachable if the store does not answer."""
    if not storage.is_remote(address):
        return read(address, Directory(Path(address)))
    from runtime.store.s3 import Prefix

    return read(address, Prefix(address))


class Locator:
    """Finds copies of content in and around a project.  unreachable: what could not be asked, and why."""

    def __init__(self, project: Path) -> None:
        self.project = project
        self.unreachable: list[str] = []

    @cached_property
    def near(self) -> list[Place]:
        """Finished folders of the project and of a local VGG_STORE."""
        imported = sorted(self.project.glob(f"models/*/{manifest.NAME}"))  # beside the output of a training
        folders = {path.parent: "" for path in imported} | dict(self._outputs())
        store = environment.STORE.get()
        if store and not storage.is_remote(store):
            pattern = "*/"
            for _ in range(STORE_DEPTH):
                folders |= {path.parent: "" for path in sorted(Path(store).glob(pattern + manifest.NAME))}
                pattern += "*/"
        found = (read(self._shown(folder), Directory(folder), kind) for folder, kind in folders.items())
        return [place for place in found if place]

    def _outputs(self) -> Iterator[tuple[Path, str]]:
        """Folders of dvc.yaml's outputs, and those that a newer run has moved away; what they should hold."""
        for name, stage in outputs(self.project).items():
            kind = Path(name).name if stage == "localise" else MADE_BY.get(stage, "")
            for folder in (self.project / name, manifest.sibling(self.project / name, ".previous")):
                yield folder, kind if kind in KIND_NAMES else ""

    def _shown(self, folder: Path) -> str:
        return str(folder.relative_to(self.project) if folder.is_relative_to(self.project) else folder)

    def damaged(self, kind: str) -> list[Place]:
        """Folders of a kind whose manifest is damaged, so that nobody knows what they hold."""
        return [place for place in self.near if place.damage and place.kind == kind]

    def find(self, digest: str, addresses: tuple[str, ...] = ()) -> list[Place]:
        """Copies of a folder, the nearest first.  addresses: where runs say that it was written."""
        found = [place for place in self.near if place.digest == digest]
        known = {place.address for place in found}
        for text in addresses:
            with contextlib.suppress(OSError):
                try:
                    address = storage.resolve(text)
                    place = None if address in known else at(address)
                except Problem as reason:
                    self.unreachable.append(f"{text}: {reason}")
                    continue
                if place and place.digest == digest and place.address not in known:
                    known.add(place.address)
                    found.append(place)
        return found or list(self._of_dvc(digest))

    def training_of(self, weights_sha256: str) -> list[Place]:
        """Finished trainings, also of localisers, with these weights."""
        return [place for place in self.near if weights_sha256 in place.weights.values()]

    def _of_dvc(self, digest: str) -> Iterator[Place]:
        """The copy in DVC's cache, or else those in its remotes."""
        for name, store in self._dvc_stores:
            try:
                place = read(*_in_dvc(name, store, digest))
            except FileNotFoundError:
                continue
            except Exception as reason:  # of any store's library
                self.unreachable.append(f"{name}: {type(reason).__name__}: {str(reason).splitlines()[0][:200]}")
                continue
            if place:
                yield place
                return

    @cached_property
    def _dvc_stores(self) -> list[tuple[str, Any]]:
        try:
            from dvc.repo import Repo

            repo = Repo(str(self.project))
            found = [("DVC's cache", repo.cache.local)]
            for remote in repo.config.get("remote", {}):
                found.append((f"DVC remote {remote!r}", repo.cloud.get_remote_odb(remote)))
            return found
        except Exception as reason:  # no DVC project, or an image without DVC
            log.debug("DVC: %s", reason)
            return []


class _DvcFolder:
    """A folder in a DVC object store, whose files are named by their md5."""

    def __init__(self, store: Any, files: dict[str, str]) -> None:
        self.store, self.files = store, files

    def names(self) -> list[str]:
        return list(self.files)

    def get(self, name: str) -> bytes | None:
        try:
            return b"".join(self.stream(name))
        except Refused:
            return None

    def stream(self, name: str) -> Iterator[bytes]:
        try:
            with self.store.fs.open(self.store.oid_to_path(self.files[name]), "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except (KeyError, FileNotFoundError):
            raise Refused("missing") from None


def _in_dvc(name: str, store: Any, digest: str) -> tuple[str, Location]:
    """Raises FileNotFoundError if the store does not have the folder."""
    with store.fs.open(store.oid_to_path(digest), "rb") as file:
        listing = json.loads(file.read())
    return name, _DvcFolder(store, {entry["relpath"]: entry["md5"] for entry in listing})


def outputs(project: Path) -> dict[str, str]:
    """Paths of all outputs in dvc.yaml, and the stages that make them; {} without one."""
    return {
        name: stage
        for stage, content in stages(project).items()
        for output in content.get("outs", [])
        for name in (output if isinstance(output, dict) else [output])
    }


def stages(project: Path) -> dict[str, Any]:
    """The stages of dvc.yaml; {} without one, or if it cannot be read."""
    from runtime.parameters import read_yaml

    try:
        document, _, _ = read_yaml(project / "dvc.yaml")
        return dict(document["stages"])
    except (Problem, KeyError, TypeError, ValueError):
        return {}
