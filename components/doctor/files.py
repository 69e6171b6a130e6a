"""Files: damaged shards, checkpoints, predictions and caches; what killed processes have left over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from components.doctor.finding import Finding, Patient, holder
from components.lineage.links import STAGE
from components.lineage.places import Place, outputs
from components.lineage.verify import check as differing
from components.progress import Progress
from runtime import environment
from runtime.wording import some

LEFTOVERS = ("*.tmp", "*.old", "*.part")
MAX_DEPTH = 2  # folders below an output in which leftovers lie: files of a checkpoint


def damaged(patient: Patient) -> Iterator[Finding]:
    """Finished folders whose files have other sizes than the manifest says; with deep, other bytes."""
    for place in patient.locator.near:
        wrong = [place.damage] if place.damage else _wrong_sizes(patient, place)
        if not wrong and patient.deep:
            with Progress(f"hash {place.address}", unit="bytes") as bar:
                wrong = differing(place, place.kind, bar)
        if wrong:
            stage = STAGE.get(place.kind, "that made it")
            yield Finding(
                f"{place.address}: {some(wrong)}", f"dvc checkout --force {place.address}, or run stage {stage} again"
            )


def _wrong_sizes(patient: Patient, place: Place) -> list[str]:
    found = []
    for entry in place.manifest["files"]:
        path = patient.project / place.address / entry["path"]
        size = path.stat().st_size if path.is_file() else None
        if size != entry["size"]:
            found.append(f"{entry['path']} {'is missing' if size is None else f'has {size:,} bytes'}")
    return found


def caches(patient: Patient) -> Iterator[Finding]:
    """With deep: files of VGG_CACHE and of DVC's cache that do not have the content of their names."""
    if patient.deep:
        for path in sorted((environment.cache() / "shards").glob("*")):
            name = path.name.partition(".")[0]
            if len(name) == 64 and path.suffix not in (".lock", ".part") and _hash(path, "sha256") != name:
                yield Finding(f"cache {path}: its bytes are not those of its name", f"rm {path} (it is fetched again)")
        for path in sorted((patient.project / ".dvc/cache/files/md5").glob("??/*")):
            name = path.parent.name + path.name.removesuffix(".dir")
            if len(name) == 32 and _hash(path, "md5") != name:
                cure = f"rm -f {patient.shown(path)}; then dvc pull, or dvc commit if the workspace has it intact"
                yield Finding(f"DVC's cache: {patient.shown(path)}: its bytes are not those of its name", cure)


def _hash(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def leftovers(patient: Patient) -> Iterator[Finding]:
    """Temporary files and folders of processes that are gone."""
    made_by = outputs(patient.project)
    idle = [patient.project / name for name in patient.outputs if name not in patient.at_work]
    folders = [(folder, MAX_DEPTH) for folder in idle] + [
        (patient.project / "metrics", 1),
        (environment.cache() / "shards", 0),
    ]
    for folder, depth in folders:
        for path in sorted({path for pattern in LEFTOVERS for path in _below(folder, pattern, depth)}):
            if holder(path.with_suffix(".lock")):  # a download that is going on
                continue
            shown = patient.shown(path)
            if path.suffix == ".old" and not path.with_suffix("").exists():
                yield Finding(
                    f"{shown}: a checkpoint whose replacement was interrupted",
                    f"run stage {made_by.get(patient.shown(folder), 'train')}: it restores it",
                )
            else:
                yield Finding(f"{shown}: left over by a process that was killed", f"rm -r {shown}")


def _below(folder: Path, pattern: str, depth: int) -> Iterator[Path]:
    for level in range(depth + 1):
        yield from folder.glob("*/" * level + pattern)
