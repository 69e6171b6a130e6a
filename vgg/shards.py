"""Packing: verify every image once, permute, and write byte-reproducible WebDataset shards.

A plan first (a seeded global permutation, cut into shards), then one task per shard over all cores.  A shard appears
under its name only when it is whole, with a receipt beside it; the manifest comes last and the receipts go.  Killed at
any point and run again, finished shards are kept and the bytes are those of an undisturbed run.  Same source and
parameters give the same bytes on any machine with any number of workers.
"""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import re
import resource
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from vgg import draws, manifest
from vgg.errors import BadData, Refused, StorageFailure, WrongParameters
from vgg.images import BadImage
from vgg.index import SCHEMA
from vgg.inspect import NUM_SUMS, inspect
from vgg.packed import Packed, describe, duplicates, index_bytes, others_indexes
from vgg.params.shard import ShardParams
from vgg.sources import Original, Report, Source
from vgg.targets import Target, holding

log = logging.getLogger("vgg.shards")

BLOCK = 512  # bytes of a tar block
RECORD = 20 * BLOCK  # tars are padded to whole records, as tar(1) does
MEMBER_OVERHEAD = 4 * BLOCK  # bytes an image takes in a shard besides its own: two headers, a label, padding
DECODER_BYTES = 24  # memory of decoding, bytes a pixel: coefficients of a progressive JPEG, planes, RGB, a copy
SPARE_BYTES = 1 << 30  # memory of a worker besides


@dataclass(frozen=True)
class Task:
    """One shard to write: its file name, and its originals in order."""

    path: str
    originals: list[Original]


def pack(
    params: ShardParams,
    source: Source,
    target: Target,
    code_sha256: str,
    num_workers: int | None = None,
    report: Report | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write all shards of a source to a target and return its manifest.

    code_sha256: digest of the code that packs; receipts of other code are not trusted.
    report: called with (images done, images in all).  check: called after every shard; may raise to stop.
    Raises BadData, naming every unusable image, and StorageFailure when the disk is full.
    """
    _refuse_strangers(target)
    target.delete(manifest.NAME)  # from here on it is unfinished
    splits = {split: source.originals(split) for split in source.splits}
    _refuse_repeated_keys(splits)
    tasks = {split: plan(params, split, originals) for split, originals in splits.items()}
    all_tasks = [task for split in source.splits for task in tasks[split]]
    _sweep(target, {task.path for task in all_tasks})
    _refuse_without_room(target, all_tasks)
    try:
        results = _pack_all(params, source, target, all_tasks, code_sha256, num_workers, report, check)
    except StorageFailure as failure:
        needed = _bytes_needed(target, all_tasks)
        raise StorageFailure(f"{failure}\nWhat is not finished needs about {needed:,} bytes.") from None
    _judge(params, source.splits, results)

    packed = {split: [results[task.path] for task in tasks[split]] for split in source.splits}
    entries = []
    for split, shards in packed.items():
        for shard in shards:
            entries += [shard.entry, shard.dali_entry]
        entries.append(target.write(f"{split}.index.npy", holding(index_bytes(shards))))
    for name, data in {**others_indexes(packed), **source.tables()}.items():
        entries.append(target.write(name, holding(data)))
    body = {
        "dataset": params.source,
        "parameters": params.model_dump(),
        "classes": [asdict(c) for c in source.classes],
        "classes_sha256": manifest.digest_of([c.wnid for c in source.classes]),
        "source": source.about(),
        "renamed": {f"{split}/{o.key}": o.name for split, originals in splits.items() for o in originals if o.renamed},
        **describe(packed, duplicates(packed, _reader(source, splits))),
    }
    finished = manifest.compose(SCHEMA, body, entries)
    check()
    target.write(manifest.NAME, holding(manifest.text(finished)))
    _sweep(target, {entry["path"] for entry in entries} | {manifest.NAME}, receipts=True)
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
    target: Target,
    tasks: list[Task],
    code_sha256: str,
    num_workers: int | None,
    report: Report | None,
    check: Callable[[], None],
) -> dict[str, Packed]:
    """Every task's result, from its receipt where one is current.  By path, in the order of the tasks."""
    total, done, results = sum(len(task.originals) for task in tasks), 0, {}
    num_workers = min(num_workers or len(os.sched_getaffinity(0)), len(tasks))
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(num_workers, context, _start_worker, (params, source, target, code_sha256)) as workers:
        running = {workers.submit(_pack_one, task): task for task in tasks}
        try:
            for finished in as_completed(running):
                results[running[finished].path] = finished.result()
                done += len(running[finished].originals)
                check()
                if report:
                    report(done, total)
        finally:
            workers.shutdown(cancel_futures=True)
    return {task.path: results[task.path] for task in tasks}


_worker: tuple[ShardParams, Source, Target, str]


def _start_worker(params: ShardParams, source: Source, target: Target, code_sha256: str) -> None:
    global _worker
    _worker = (params, source, target, code_sha256)
    # a worker that outlived a killed parent would write beside the next attempt's
    threading.Thread(target=_die_with_parent, daemon=True).start()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + SPARE_BYTES + DECODER_BYTES * params.max_pixels
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (allowed if hard < 0 else min(allowed, hard), hard))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _pack_one(task: Task) -> Packed:
    """Write one shard and its receipt, or return what a current receipt says."""
    params, source, target, code_sha256 = _worker
    receipt = f"{task.path}.receipt"
    science = params.model_dump(exclude={"check_md5"})  # whether archives were verified changes no byte of a shard
    told = {"code": code_sha256, "params": science, "published": source.published}
    identity = manifest.digest_of({**told, "originals": [o.identity() for o in task.originals]})
    if earlier := _earlier(target, receipt, identity):
        return earlier
    packed = Packed(task.path)
    packed.entry = target.write(task.path, lambda file: _write_tar(file, params, source, task, packed))
    packed.dali_entry = target.write(packed.dali_name, holding(packed.dali_index()))
    target.write(receipt, holding(json.dumps({"identity": identity, "packed": vars(packed)}).encode()))
    return packed


def _earlier(target: Target, receipt: str, identity: str) -> Packed | None:
    """What an earlier run made of this very task, if it is all still there."""
    try:
        found = json.loads(target.read(receipt) or b"{}")
        packed = Packed(**found["packed"])
        current = found["identity"] == identity
    except (ValueError, KeyError, TypeError):
        return None
    packed.rows = [tuple(row) for row in packed.rows]  # type: ignore[misc]
    return packed if current and target.holds(packed.entry) and target.holds(packed.dali_entry) else None


def _write_tar(file: BinaryIO, params: ShardParams, source: Source, task: Task, packed: Packed) -> None:
    sums = np.zeros(NUM_SUMS, np.int64)
    offset = 0
    for original in task.originals:
        about = {"key": original.key, "split": original.split}
        try:
            raw = source.read(original)
            found = inspect(raw, params.max_pixels, source.published)
        except BadImage as reason:
            packed.bad.append({"name": original.name, "split": original.split, "reason": str(reason)})
            continue
        if found.amended:
            packed.amended.append({**about, "reason": found.amended})
        packed.remarks += [{**about, "remark": remark} for remark in found.remarks]
        sums += found.sums
        label = str(original.label).encode()
        head = member_head(f"{original.key}.cls", len(label)) + label + padding(len(label))
        head += member_head(f"{original.key}.jpg", len(found.jpeg))
        offset += len(head)
        size, crc = len(found.jpeg), google_crc32c.value(found.jpeg)
        packed.rows.append((offset, size, original.label, found.width, found.height, crc, original.key))
        for part in (head, found.jpeg, padding(len(found.jpeg))):
            file.write(part)
        offset += len(found.jpeg) + len(padding(len(found.jpeg)))
    file.write(bytes(2 * BLOCK + -(offset + 2 * BLOCK) % RECORD))
    packed.sums = sums.tolist()


def member_head(name: str, size: int) -> bytes:
    """The header of a tar member (POSIX ustar).  No times, owners or modes of this machine.

    name: ASCII, at most 100 bytes.
    """
    # what tarfile writes with mode 0444, in a tenth of its time: it makes two headers for every image
    fields = name.encode("ascii"), b"0000444", b"0000000", b"0000000", b"%011o" % size, b"0" * 11
    header = struct.pack("100s8s8s8s12s12s8sc100s6s2s247x", *fields, b" " * 8, b"0", b"", b"ustar", b"00")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def padding(size: int) -> bytes:
    """What follows a member's data up to the next block."""
    return bytes(-size % BLOCK)


def _judge(params: ShardParams, splits: tuple[str, ...], results: dict[str, Packed]) -> None:
    """Stop on unusable images unless the parameters let that many be left out; stop on a split without images."""
    bad = [item for result in results.values() for item in result.bad]
    allowed = params.max_quarantined if params.on_bad_image == "quarantine" else 0
    listing = "\n".join(f"  {item['name']}: {item['reason']}" for item in bad)
    if len(bad) > allowed:
        raise BadData(
            f"{len(bad)} unusable image{'s' if len(bad) > 1 else ''} ({allowed} allowed):\n{listing}\n"
            "Mend or remove them, or set shard.on_bad_image: quarantine with shard.max_quarantined."
        )
    if bad:
        log.warning("%d unusable images left out (listed in the manifest):\n%s", len(bad), listing)
    for split in splits:
        if not any(result.rows for path, result in results.items() if path.startswith(split)):
            raise BadData(f"no usable image in split {split!r}")


def _reader(source: Source, splits: dict[str, list[Original]]) -> Callable[[str, str], bytes]:
    """The bytes of an original by (split, key)."""

    @functools.cache
    def by_key(split: str) -> dict[str, Original]:
        return {original.key: original for original in splits[split]}

    def read(split: str, key: str) -> bytes:
        original = by_key(split)[key]
        try:
            return source.read(original)
        except BadImage as reason:
            raise BadData(f"{original.name}: {reason}; it was whole when it was packed. Run again.") from None

    return read


def _refuse_repeated_keys(splits: dict[str, list[Original]]) -> None:
    for split, originals in splits.items():
        names: dict[str, str] = {}
        repeated = [(o.key, names[o.key], o.name) for o in originals if names.setdefault(o.key, o.name) != o.name]
        if repeated:
            listing = "\n".join(f"  {key}: {first} and {second}" for key, first, second in repeated[:10])
            raise BadData(
                f"split {split!r}: {len(repeated)} keys stand twice; remove or rename one of each:\n{listing}"
            )


def _refuse_without_room(target: Target, tasks: list[Task]) -> None:
    """Better before the work than after half of it."""
    needed, free = _bytes_needed(target, tasks), target.free_bytes()
    if free is not None and needed > free:
        raise StorageFailure(
            f"{target.name}: the shards need about {needed:,} bytes, {free:,} are free. "
            "Make room or choose another place, then run the same command again."
        )


def _bytes_needed(target: Target, tasks: list[Task]) -> int:
    """About what the shards will take that no earlier run has finished."""
    there = set(target.names())
    missing = [task for task in tasks if f"{task.path}.receipt" not in there]
    return sum(original.size + MEMBER_OVERHEAD for task in missing for original in task.originals)


OURS = re.compile(
    r"((train|val|test)(-\d{5,}\.(tar(\.receipt)?|idx)|\.index\.npy)|_info\.json|synsets\.json|cost_matrix\.npy"
    r"|manifest\.json)(\.\d+-[0-9a-f]{8}\.tmp)?"
)


def _refuse_strangers(target: Target) -> None:
    """What this stage did not write, it must not clear away: the place has to be its own."""
    strangers = [name for name in target.names() if not OURS.fullmatch(name)]
    earlier = target.read(manifest.NAME)
    if not strangers and earlier is not None:
        try:
            manifest.parse(earlier, SCHEMA, f"{target.name}/{manifest.NAME}")
        except Refused as reason:
            if "is needed here" in str(reason):
                strangers = [manifest.NAME]
    if strangers:
        raise WrongParameters(
            f"{target.name}: holds {', '.join(strangers[:5])}{' …' if len(strangers) > 5 else ''}, which is not of "
            "this stage. Shards need a place of their own."
        )


def _sweep(target: Target, keep: set[str], receipts: bool = False) -> None:
    """Remove what earlier runs left that is not part of this one: other shards, temporary files, receipts."""
    for name in target.names():
        of_shard = name.removesuffix(".receipt").removesuffix(".idx").removesuffix(".tar") + ".tar"
        beside_it = name.endswith((".receipt", ".idx")) and not receipts and of_shard in keep
        if name not in keep and not beside_it:
            target.delete(name)
