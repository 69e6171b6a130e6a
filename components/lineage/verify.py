"""Hashes every link of a chain that can be reached, and compares it with what the records say."""

from __future__ import annotations

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from components.lineage.links import (
    BOXES,
    DAMAGED,
    DATA,
    EVALUATION,
    LOCALISATIONS,
    LOCALISER,
    NOT_REACHED,
    SOURCE,
    TRAINING,
    VERIFIED,
    VERSION,
    Link,
)
from components.lineage.places import NETWORKS, Locator, Place
from components.lineage.server import Server
from components.lineage.source import compare
from components.progress import Progress
from components.register.version.stored import FILES, FILES_SCHEMA
from components.shard.verify import Check
from components.tracking import artifacts
from components.tracking.problems import problem
from runtime import manifest
from runtime.errors import Problem, Refused, Unreachable
from runtime.wording import counted
from vgg.params.shard import EMBEDDED

NUM_READERS = 4
LOCALISER_FILE = "artifacts/localiser.safetensors"  # of a version with one
ADDED = ("registered_model_meta",)  # by MLflow, to a downloaded version


def verify(chain: Link, server: Server | None, locator: Locator) -> None:
    """Set state and findings of every link."""
    for link in chain.all():
        link.state, link.findings = NOT_REACHED, []
        with Progress(f"verify {link.kind}", unit="bytes") as bar:
            try:
                if link.kind == VERSION:
                    _version(link, server, bar)
                elif link.kind == SOURCE:
                    _source(link, chain, locator, bar)
                else:
                    _folder(link, locator, bar)
            except Problem as reason:
                _not_reached(link, str(reason))


def broken(chain: Link) -> list[str]:
    """A line for every finding about a damaged link."""
    return [f"{link}: {finding}" for link in chain.all() if link.state == DAMAGED for finding in link.findings]


def summary(chain: Link) -> str:
    """What was verified, and what could not be, in a line each."""
    names: dict[str, list[str]] = {VERIFIED: [], NOT_REACHED: []}
    for link in chain.all():
        names[link.state].append(str(link) if link.state == VERIFIED else f"{link} ({'; '.join(link.findings)})")
    return "\n".join(f"{state}: {', '.join(found) or 'nothing'}" for state, found in names.items())


def _not_reached(link: Link, reason: str) -> None:
    link.state, link.findings = NOT_REACHED, [reason]


def _damaged(link: Link, findings: list[str]) -> None:
    link.state, link.findings = DAMAGED, findings


def _version(link: Link, server: Server | None, report: Progress) -> None:
    """The version's files in the artifact store, against the list and the weights in its tags."""
    if not server:
        return _not_reached(link, "MLflow cannot be asked for its files")
    trained = link.find(TRAINING)
    if trained and link.digest and (other := trained.facts.get("weights", link.digest)) != link.digest:
        return _damaged(link, [f"its tag weights_sha256 is {link.digest}, its training's weights are {other}"])
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = artifacts.download(link.title, scratch)
        except Exception as error:  # of any store's library
            if isinstance(found := problem(error), Unreachable):
                return _not_reached(link, str(found))
            return _damaged(link, [f"its files cannot be read from the artifact store: {str(error).splitlines()[0]}"])
        hashes = _hashes(folder, report)
        listed, damage = _listed(folder, link.files_sha256)
    if findings := [*damage, *_wrong_files(link, hashes, listed), *_wrong_claims(link)]:
        return _damaged(link, findings)
    link.state = VERIFIED
    link.findings = [] if listed else ["registered without a list of its files: only its weights were compared"]
    return None


def _listed(folder: Path, files_sha256: str) -> tuple[dict[str, str], list[str]]:
    """sha256 of every file by path, as files.json lists them, and what is wrong with that file itself.

    files_sha256: the version's tag; "" for a version without a list.
    """
    if not files_sha256:
        return {}, []
    if wrong := _difference(FILES, _sha256(folder / FILES), files_sha256):
        return {}, [wrong]
    entries = manifest.parse((folder / FILES).read_bytes(), FILES_SCHEMA, FILES)["files"]
    return {FILES: files_sha256, **{entry["path"]: entry["sha256"] for entry in entries}}, []


def _wrong_files(link: Link, found: dict[str, str], listed: dict[str, str]) -> list[str]:
    """Files of a version that differ from its list; without a list, weights that differ from its tag."""
    weights = {path for path in {*found, *listed} if Path(path).name == "weights.safetensors"}
    if not weights:
        return ["it has no weights.safetensors"]
    if not link.digest:
        return ["it has no tag weights_sha256 to compare with: it was not registered by this pipeline"]
    expected = listed or dict.fromkeys(weights, link.digest)
    wrong = [_difference(path, found.get(path), expected[path]) for path in sorted(expected)]
    if listed:
        wrong += [f"{path}: is no file of this version" for path in sorted(found.keys() - expected.keys())]
        if {expected.get(path) for path in weights} != {link.digest}:
            wrong.append(f"{FILES} lists other weights than its tag weights_sha256, {link.digest}")
        recorded = link.record.get("inputs", {}).get("localiser_sha256")
        if recorded != expected.get(LOCALISER_FILE):
            wrong.append(f"{FILES} lists another localiser than its provenance, {recorded}")
    return [finding for finding in wrong if finding]


def _wrong_claims(link: Link) -> list[str]:
    """The result in a version's tags, where it differs from that of its predictions."""
    evaluation = link.find(EVALUATION)
    intact = [place for place in evaluation.places if not place.damage] if evaluation else []
    measured = intact[0].manifest["metrics"] if intact else {}
    return [
        f"its tag evaluation says {name} {link.claims[name]}, the predictions say {measured[name]}"
        for name in ("top1_error", "top5_error", "num_images")
        if name in measured and link.claims.get(name, measured[name]) != measured[name]
    ]


def _difference(path: str, found: str | None, expected: str | None) -> str:
    if found == expected:
        return ""
    return f"{path}: {'missing' if found is None else 'does not have the sha256 that it was registered with'}"


def _hashes(folder: Path, report: Progress) -> dict[str, str]:
    """sha256 of every file below a folder, by path; without what downloading or running a model adds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.name not in ADDED:
            found[path.relative_to(folder).as_posix()] = _sha256(path) or ""
    size = sum((folder / path).stat().st_size for path in found)
    report(size, size)
    return found


def _sha256(path: Path) -> str | None:
    """None for a missing file."""
    return manifest.file_entry(path.parent, path.name, md5=False)["sha256"] if path.is_file() else None


def _folder(link: Link, locator: Locator, report: Progress) -> None:
    """The nearest copy of a folder: all files against its manifest, the manifest against the digest in the records.

    A folder of this kind whose manifest is damaged may be the copy: it is named, too.
    """
    suspects = [place.damage for place in locator.damaged(link.kind)]
    place = next(iter(link.places), None)
    if place is None:
        return _damaged(link, suspects) if suspects else _not_reached(link, "no copy was found")
    findings = [place.damage] if place.damage else check(place, link.kind, report)
    if not place.damage and link.kind in NETWORKS:
        findings += _other_weights(link, place)
    if not place.damage and link.kind in (EVALUATION, LOCALISATIONS):
        findings += _other_inputs(link, place)
    if findings or suspects:
        return _damaged(link, [*(f"{place.address}: {finding}" for finding in findings), *suspects])
    link.state, link.findings = VERIFIED, []
    return None


def _other_weights(link: Link, place: Place) -> list[str]:
    weights = link.facts.get("weights", "")
    return [f"has other weights than {weights}"] if weights and weights not in place.weights.values() else []


def _other_inputs(link: Link, place: Place) -> list[str]:
    """Predictions or localisations that state another network than the chain has (from the version's tags)."""
    stated = place.manifest.get("inputs", {})
    below = {TRAINING: stated.get("checkpoint"), DATA: stated.get("shards"), BOXES: stated.get("boxes")}
    below[LOCALISER] = stated.get("localiser")
    return [
        f"was made from {kind} {digest}, the chain has {found.digest}"
        for kind, digest in below.items()
        if digest and (found := link.find(kind)) and found.digest and found.digest != digest
    ]


def check(place: Place, kind: str, report: Progress) -> list[str]:
    """The files of a folder that differ from its manifest, one line each."""
    if kind == DATA:
        check = Check(place.location, place.address)
        check.run(report)
        return check.damaged
    entries, done, findings = place.manifest["files"], 0, []
    total = sum(entry["size"] for entry in entries)
    with ThreadPoolExecutor(NUM_READERS) as readers:
        for entry, finding in zip(entries, readers.map(lambda e: _check_file(place, e), entries), strict=True):
            done += entry["size"]
            report(done, total)
            findings += [finding] if finding else []
    return findings


def _check_file(place: Place, entry: dict[str, Any]) -> str:
    size, digest = 0, hashlib.sha256()
    try:
        for chunk in place.location.stream(entry["path"]):
            size += len(chunk)
            digest.update(chunk)
    except Refused:
        return f"{entry['path']}: missing"
    if size != entry["size"]:
        return f"{entry['path']}: has {size:,} bytes instead of {entry['size']:,}"
    return "" if digest.hexdigest() == entry["sha256"] else f"{entry['path']}: does not have the sha256 of its manifest"


def _source(link: Link, chain: Link, locator: Locator, report: Progress) -> None:
    """The images of the source, one by one, against the index of the shards."""
    data = next(found for found in chain.all() if link in found.inputs)
    place = next((place for place in data.places if not place.damage), None)
    if place is None:
        return _not_reached(link, "its images are compared with the shards, of which no copy was found")
    if data.state == DAMAGED:
        return _not_reached(link, "its images are compared with the shards, which are damaged")
    images = locator.project / (link.where[0] if link.where else "data/images")
    if link.title not in EMBEDDED and not images.is_dir():
        return _not_reached(link, f"{images} is not here")
    num_images, findings = compare(images, place, report)
    if findings:
        return _damaged(link, findings)
    link.state, link.findings = VERIFIED, []
    link.facts["compared"] = counted(num_images, "image")
    return None
