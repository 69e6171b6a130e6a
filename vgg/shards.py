"""Packing: verify every image once, permute, and write byte-reproducible WebDataset shards.

A plan first (a seeded global permutation, cut into shards), then one task per shard over all cores.  A shard appears
under its name only when it is whole, with a receipt beside it; the manifest comes last and the receipts go.  Killed at
any point and run again, finished shards are kept and the bytes are those of an undisturbed run.  Same source and
parameters give the same bytes on any machine with any number of workers.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from vgg import draws, manifest
from vgg.errors import BadData, Refused, WrongParameters
from vgg.images import BadImage, decode, open_checked
from vgg.index import SCHEMA, row_type
from vgg.params.shard import ShardParams
from vgg.sources import SPLITS, Original, Source

log = logging.getLogger("vgg.shards")

BLOCK = 512  # bytes of a tar block
RECORD = 20 * BLOCK  # tars are padded to whole records, as tar(1) does


@dataclass(frozen=True)
class Task:
    """One shard to write: its file name, and its originals in order."""

    path: str
    originals: list[Original]


@dataclass
class Packed:
    """What became of a task.  rows: (offset, size, label, width, height, crc32c, key, sha256 of the original)."""

    path: str
    rows: list[tuple[int, int, int, int, int, int, str, str]] = field(default_factory=list)
    amended: list[dict[str, str]] = field(default_factory=list)
    bad: list[dict[str, str]] = field(default_factory=list)
    histogram: list[int] = field(default_factory=lambda: [0] * 768)
    entry: dict[str, Any] = field(default_factory=dict)


def pack(
    params: ShardParams,
    source: Source,
    directory: Path,
    code_sha256: str,
    num_workers: int | None = None,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write all shards of a source into a directory and return its manifest.

    code_sha256: digest of the code that packs; receipts of other code are not trusted.
    report: called with (images done, images in all).
    Raises BadData, naming every unusable image, and StorageFailure when the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _refuse_strangers(directory)
    (directory / manifest.NAME).unlink(missing_ok=True)  # from here on it is unfinished
    splits = {split: source.originals(split) for split in SPLITS}
    tasks = {split: plan(params, split, originals) for split, originals in splits.items()}
    all_tasks = [task for split in SPLITS for task in tasks[split]]
    _sweep(directory, {task.path for task in all_tasks})
    packed = _pack_all(params, source, directory, all_tasks, code_sha256, num_workers, report)
    _judge(params, packed)

    entries, about_splits = [], {}
    for split in SPLITS:
        results = [packed[task.path] for task in tasks[split]]
        entries += [result.entry for result in results]
        index = f"{split}.index.npy"
        _write_index(directory / index, results)
        entries.append(manifest.file_entry(directory, index))
        about_splits[split] = {
            "index": index,
            "num_images": sum(len(result.rows) for result in results),
            "shards": [{"path": result.path, "num_images": len(result.rows)} for result in results],
        }
    body = {
        "dataset": params.source,
        "parameters": params.model_dump(),
        "classes": [asdict(c) for c in source.classes],
        "classes_sha256": manifest.digest_of([c.wnid for c in source.classes]),
        "splits": about_splits,
        "pixels": _mean_and_std([packed[task.path] for task in tasks["train"]]),
        "source": {"sha256": _source_digest(packed)},
        "amended": [item for result in packed.values() for item in result.amended],
        "quarantined": [item for result in packed.values() for item in result.bad],
        "renamed": {f"{split}/{o.key}": o.name for split in SPLITS for o in splits[split] if o.renamed},
        "duplicates": _duplicates(packed),
    }
    finished = manifest.write(directory, SCHEMA, body, entries)
    _sweep(directory, {entry["path"] for entry in entries} | {manifest.NAME}, receipts=True)
    return finished


def plan(params: ShardParams, split: str, originals: list[Original]) -> list[Task]:
    """Permute all images of a split, then cut them into shards that differ by at most one image."""
    order = draws.permutation("shards/" + split, len(originals), params.seed)
    num_shards = -(-len(originals) // params.samples_per_shard)
    return [
        Task(f"{split}-{number:05d}.tar", [originals[i] for i in part])
        for number, part in enumerate(np.array_split(order, num_shards))
    ]


def _pack_all(
    params: ShardParams,
    source: Source,
    directory: Path,
    tasks: list[Task],
    code_sha256: str,
    num_workers: int | None,
    report: Callable[[int, int], None] | None,
) -> dict[str, Packed]:
    """Every task's result, from its receipt where one is current.  In the order of the tasks."""
    total, done, results = sum(len(task.originals) for task in tasks), 0, {}
    num_workers = min(num_workers or os.cpu_count() or 1, len(tasks))
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(num_workers, context, _start_worker, (params, source, directory, code_sha256)) as workers:
        running = {workers.submit(_pack_one, task): task for task in tasks}
        try:
            for finished in as_completed(running):
                results[running[finished].path] = finished.result()
                done += len(running[finished].originals)
                if report:
                    report(done, total)
        finally:
            workers.shutdown(cancel_futures=True)
    return {task.path: results[task.path] for task in tasks}


_worker: tuple[ShardParams, Source, Path, str]


def _start_worker(params: ShardParams, source: Source, directory: Path, code_sha256: str) -> None:
    global _worker
    _worker = (params, source, directory, code_sha256)
    # a worker that outlived a killed parent would write beside the next attempt's
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _pack_one(task: Task) -> Packed:
    """Write one shard and its receipt, or return what a current receipt says."""
    params, source, directory, code_sha256 = _worker
    receipt = directory / f"{task.path}.receipt"
    told = {"code": code_sha256, "params": params.model_dump(), "originals": [asdict(o) for o in task.originals]}
    identity = manifest.digest_of(told)
    try:
        earlier = json.loads(receipt.read_bytes())
        if earlier["identity"] == identity and manifest.file_entry(directory, task.path) == earlier["packed"]["entry"]:
            return Packed(**{**earlier["packed"], "rows": [tuple(row) for row in earlier["packed"]["rows"]]})
    except (OSError, ValueError, KeyError):
        pass
    packed = Packed(task.path)
    manifest.write_atomically(directory / task.path, lambda file: _write_tar(file, params, source, task, packed))
    packed.entry = manifest.file_entry(directory, task.path)
    manifest.write_json(receipt, {"identity": identity, "packed": asdict(packed)})
    return packed


def _write_tar(file: BinaryIO, params: ShardParams, source: Source, task: Task, packed: Packed) -> None:
    histogram = np.zeros(768, np.int64)
    offset = 0
    for original in task.originals:
        try:
            raw = source.read(original)
            jpeg, width, height, pixels, amended = inspect(raw, params.max_pixels)
        except BadImage as reason:
            packed.bad.append({"name": original.name, "split": original.split, "reason": str(reason)})
            continue
        if amended:
            packed.amended.append({"key": original.key, "split": original.split, "reason": amended})
        histogram += pixels
        label = member(f"{original.key}.cls", str(original.label).encode())
        image = member(f"{original.key}.jpg", jpeg)
        file.write(label + image)
        start = offset + len(label) + BLOCK
        digest = hashlib.sha256(raw).hexdigest()
        crc = google_crc32c.value(jpeg)
        packed.rows.append((start, len(jpeg), original.label, width, height, crc, original.key, digest))
        offset += len(label) + len(image)
    file.write(bytes(2 * BLOCK + -(offset + 2 * BLOCK) % RECORD))
    packed.histogram = histogram.tolist()


def member(name: str, data: bytes) -> bytes:
    """One tar member (POSIX ustar): header, data, padding.  No times, owners or modes of this machine."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o444
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def inspect(raw: bytes, max_pixels: int) -> tuple[bytes, int, int, np.ndarray, str | None]:
    """Decode an image once, in full.

    Returns its JPEG bytes, width, height, the histogram of its RGB values (768 counts), and, if it had to be re-coded
    because it is no RGB or grey JPEG, the reason.  Raises BadImage.
    """
    image = open_checked(raw, max_pixels)
    rgb = decode(raw, max_pixels)
    amended = None
    if image.format not in ("JPEG", "MPO"):  # MPO: a JPEG with further pictures behind it, as phones write
        amended = f"{image.format} re-coded as JPEG"
    elif image.mode not in ("RGB", "L"):
        amended = f"{image.mode} JPEG re-coded as RGB"
    if amended:
        file = io.BytesIO()
        rgb.save(file, "JPEG", quality=95, subsampling=0)
        raw = file.getvalue()
        rgb = decode(raw, max_pixels)
    return raw, rgb.width, rgb.height, np.array(rgb.histogram(), np.int64), amended


def _write_index(path: Path, results: list[Packed]) -> None:
    key_bytes = max((len(row[6]) for result in results for row in result.rows), default=1)
    rows = [(shard, *row[:6], row[6].encode()) for shard, result in enumerate(results) for row in result.rows]
    array = np.array(rows, row_type(key_bytes))
    manifest.write_atomically(path, lambda file: np.save(file, array, allow_pickle=False))


def _judge(params: ShardParams, packed: dict[str, Packed]) -> None:
    """Stop on unusable images unless the parameters let that many be left out; stop on a split without images."""
    bad = [item for result in packed.values() for item in result.bad]
    allowed = params.max_quarantined if params.on_bad_image == "quarantine" else 0
    listing = "\n".join(f"  {item['name']}: {item['reason']}" for item in bad)
    if len(bad) > allowed:
        raise BadData(
            f"{len(bad)} unusable image{'s' if len(bad) > 1 else ''} ({allowed} allowed):\n{listing}\n"
            "Mend or remove them, or set shard.on_bad_image: quarantine with shard.max_quarantined."
        )
    if bad:
        log.warning("%d unusable images left out (listed in the manifest):\n%s", len(bad), listing)
    for split in SPLITS:
        if not any(result.rows for path, result in packed.items() if path.startswith(split)):
            raise BadData(f"no usable image in split {split!r}")


def _mean_and_std(results: list[Packed]) -> dict[str, list[float]]:
    """Mean and deviation of R, G and B over all pixels, 0 to 255, from exact integer sums; 4 decimals."""
    counts = np.sum([result.histogram for result in results], axis=0).reshape(3, 256).tolist()
    mean, std = [], []
    for channel in counts:
        n = sum(channel)
        total = sum(value * count for value, count in enumerate(channel))
        squares = sum(value * value * count for value, count in enumerate(channel))
        mean.append(round(total / n, 4))
        # an image set of one flat colour has no deviation: divide by one grey level rather than by zero
        std.append(round(max(1.0, ((squares * n - total * total) ** 0.5) / n), 4))
    return {"mean": mean, "std": std}


def _samples(packed: dict[str, Packed]) -> Iterator[tuple[str, str, str]]:
    """(split, key, sha256 of the original) of every image."""
    for path, result in packed.items():
        for row in result.rows:
            yield path.split("-")[0], row[6], row[7]


def _source_digest(packed: dict[str, Packed]) -> str:
    return manifest.digest_of(sorted(_samples(packed)))


def _duplicates(packed: dict[str, Packed]) -> list[list[str]]:
    """Groups of images with the same bytes, as 'split/key'; those that stand in both splits spoil a validation."""
    groups: dict[str, list[str]] = {}
    for split, key, digest in _samples(packed):
        groups.setdefault(digest, []).append(f"{split}/{key}")
    found = sorted(sorted(group) for group in groups.values() if len(group) > 1)
    across = [group for group in found if group[0].startswith("train") and group[-1].startswith("val")]
    if across:
        log.warning("%d images stand in both train and val (see 'duplicates' in the manifest)", len(across))
    return found


OURS = re.compile(r"((train|val)(-\d{5,}\.tar(\.receipt)?|\.index\.npy)|manifest\.json)(\.\d+\.tmp)?")


def _refuse_strangers(directory: Path) -> None:
    """What this stage did not write, it must not clear away: the folder has to be its own."""
    strangers = sorted(path.name for path in directory.iterdir() if not OURS.fullmatch(path.name))
    if not strangers and (directory / manifest.NAME).exists():
        try:
            manifest.read(directory, SCHEMA)
        except Refused as reason:
            if "is needed here" in str(reason):
                strangers = [manifest.NAME]
    if strangers:
        raise WrongParameters(
            f"{directory}: holds {', '.join(strangers[:5])}{' …' if len(strangers) > 5 else ''}, which is not of this "
            "stage. Shards need a folder of their own."
        )


def _sweep(directory: Path, keep: set[str], receipts: bool = False) -> None:
    """Remove what earlier runs left that is not part of this one: other shards, temporary files, receipts."""
    for path in directory.iterdir():
        is_receipt = path.suffix == ".receipt" and not receipts and path.name.removesuffix(".receipt") in keep
        if path.name not in keep and not is_receipt:
            path.unlink()
