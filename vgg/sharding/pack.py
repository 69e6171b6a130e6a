"""Packing: verify every image once, permute, and write byte-reproducible WebDataset shards.

First a plan (a seeded global permutation, cut into shards), then one task per shard over all cores.  A shard gets its
final name only when it is complete, with a receipt beside it.  The manifest is written last, then the receipts are
deleted.  After a kill at any point, the next run keeps finished shards and produces the same bytes as an uninterrupted
run.  Same source and parameters give the same bytes on any machine with any number of workers.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import re
import resource
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import google_crc32c
import numpy as np

from runtime import manifest
from runtime.errors import BadData, Refused, StorageFailure, WrongParameters
from runtime.shards.shardset import SCHEMA
from runtime.targets import Target, holding
from runtime.wording import counted, listing, some
from vgg import draws
from vgg.data.images import BadImage
from vgg.params.shard import ShardParams
from vgg.sharding.inspect import NUM_SUMS, inspect
from vgg.sharding.names import judge
from vgg.sharding.packed import (
    Packed,
    classes_without_images,
    describe,
    duplicates,
    index_bytes,
    refuse_unusable,
    timm_info,
)
from vgg.sharding.sources import Original, Report, Source

log = logging.getLogger("vgg.shards")

BLOCK = 512  # bytes of a tar block
RECORD = 20 * BLOCK  # tars are padded to whole records, as tar(1) does
MEMBER_OVERHEAD = 4 * BLOCK  # bytes added to each image in a shard: two headers, a label, padding
DECODER_BYTES = 24  # memory of decoding, bytes per pixel: coefficients of a progressive JPEG, planes, RGB, a copy
SPARE_BYTES = 1 << 30  # other memory of a worker

# every file that this stage writes, and its temporary files
SHARD_FILES = re.compile(
    r"((train|val|test)(-\d{5,}\.(tar(\.receipt)?|idx)|\.index\.npy)|_info\.json|synsets\.json|cost_matrix\.npy"
    r"|manifest\.json)(\.\d+-[0-9a-f]{8}\.tmp)?"
)


@dataclass(frozen=True)
class Task:
    """One shard to write: its file name, and its originals in order."""

    path: str
    originals: list[Original]


class Job(NamedTuple):
    """What all tasks of a run share.  code_sha256: digest of the code that packs."""

    params: ShardParams
    source: Source
    target: Target
    code_sha256: str


def pack(
    params: ShardParams,
    source: Source,
    target: Target,
    code_sha256: str,
    num_workers: int | None = None,
    *,
    report: Report | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write all shards of a source to a target and return the manifest.

    code_sha256: digest of the code that packs; receipts of other code are ignored.
    num_workers: processes; None: one per core.
    report: called with (images done, images in total).  check: called after every shard; may raise to stop.
    Raises BadData that lists every unusable image, StorageFailure when the disk is full, and WrongParameters if the
    target holds files of something else.
    """
    _refuse_other_files(target)
    target.delete(manifest.NAME)  # unfinished from here on
    splits = {split: source.originals(split) for split in source.splits}
    judge(
        [c.wnid for c in source.classes],
        [original.name for originals in splits.values() for original in originals] + [s.name for s in source.strays],
        [c.name for c in source.classes],
    )
    _refuse_duplicate_keys(splits)
    _warn_of_layout(source, splits)
    tasks = {split: plan(params, split, originals) for split, originals in splits.items()}
    all_tasks = [task for split in source.splits for task in tasks[split]]
    _delete_leftovers(target, {task.path for task in all_tasks})
    _require_free_space(target, all_tasks)
    try:
        results = _pack_all(Job(params, source, target, code_sha256), all_tasks, num_workers, report, check)
    except StorageFailure as failure:
        needed = _bytes_needed(target, all_tasks)
        raise StorageFailure(f"{failure}\nThe remaining shards need about {needed:,} bytes.") from None
    except BrokenProcessPool:
        raise StorageFailure(
            "a packing process was killed or crashed, perhaps for lack of memory. Finished shards are kept: run again, "
            "with fewer CPU cores (taskset) if memory is short."
        ) from None
    packed = {split: [results[task.path] for task in tasks[split]] for split in source.splits}
    strays = [stray._asdict() for stray in source.strays]
    refuse_unusable(params, source.classes, [*strays, *(i for result in results.values() for i in result.bad)], packed)
    if source.passed_over:
        kinds = ", ".join(f"{number:,} {ending}" for ending, number in sorted(source.passed_over.items()))
        log.info("%s passed over, never images: %s", counted(sum(source.passed_over.values()), "file"), kinds)

    entries = []
    for split, shards in packed.items():
        for shard in shards:
            entries += [shard.entry, shard.dali_entry]
        entries.append(target.write(f"{split}.index.npy", holding(index_bytes(shards))))
    for name, data in {**timm_info(packed), **source.tables()}.items():
        entries.append(target.write(name, holding(data)))
    body = {
        "dataset": params.source,
        "parameters": params.model_dump(),
        "classes": [asdict(c) for c in source.classes],
        "classes_sha256": manifest.digest_of([c.wnid for c in source.classes]),
        "source": source.metadata(),
        "renamed": {f"{split}/{o.key}": o.name for split, originals in splits.items() for o in originals if o.renamed},
        **describe(packed, duplicates(packed, _reader(source, splits)), strays),
    }
    finished = manifest.compose(SCHEMA, body, entries)
    check()
    target.write(manifest.NAME, holding(manifest.text(finished)))
    _delete_leftovers(target, {entry["path"] for entry in entries} | {manifest.NAME}, receipts=True)
    return finished


def _warn_of_layout(source: Source, splits: dict[str, list[Original]]) -> None:
    """What the names alone show is said before hours of decoding, and again with all that decoding finds."""
    labels = {split: {original.label for original in originals} for split, originals in splits.items()}
    strays = [f"{stray.name}: {stray.reason}" for stray in source.strays]
    if found := [*classes_without_images(source.classes, labels), *strays]:
        log.warning("faults of the layout, before images are checked:\n%s", listing(found))


def plan(params: ShardParams, split: str, originals: list[Original]) -> list[Task]:
    """Permute all images of a split, then cut them into shards that differ by at most one image."""
    order = draws.permutation("shards/" + split, len(originals), params.seed)
    num_shards = -(-len(originals) // params.samples_per_shard)
    return [
        Task(f"{split}-{number:05d}.tar", [originals[i] for i in part])
        for number, part in enumerate(np.array_split(order, num_shards))
    ]


def _pack_all(
    job: Job, tasks: list[Task], num_workers: int | None, report: Report | None, check: Callable[[], None]
) -> dict[str, Packed]:
    """The result of every task, by path, in the order of the tasks.  Tasks with a current receipt are not repeated."""
    total, done, results = sum(len(task.originals) for task in tasks), 0, {}
    num_workers = min(num_workers or len(os.sched_getaffinity(0)), len(tasks))
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(num_workers, context, _start_worker, job) as workers:
        try:
            running = {_submit(workers, task): task for task in tasks}
            for finished in as_completed(running):
                results[running[finished].path] = finished.result()
                done += len(running[finished].originals)
                check()
                if report:
                    report(done, total)
        finally:
            workers.shutdown(cancel_futures=True)
    return {task.path: results[task.path] for task in tasks}


def _submit(workers: ProcessPoolExecutor, task: Task) -> Future[Packed]:
    """Submit a task, which may start a process.  Raises BrokenProcessPool if the server that starts them has died."""
    try:
        return workers.submit(_pack_one, task)
    except (ConnectionError, EOFError):
        raise BrokenProcessPool from None


_worker: Job  # of this worker process


def _start_worker(params: ShardParams, source: Source, target: Target, code_sha256: str) -> None:
    global _worker
    _worker = Job(params, source, target, code_sha256)
    # a worker that survives a killed parent would write at the same time as the next run
    threading.Thread(target=_die_with_parent, daemon=True).start()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    allowed = pages * resource.getpagesize() + SPARE_BYTES + DECODER_BYTES * params.max_pixels
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (allowed if hard < 0 else min(allowed, hard), hard))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _pack_one(task: Task) -> Packed:
    """Write one shard and its receipt, or return the result in a current receipt."""
    params, source, target, code_sha256 = _worker
    receipt = f"{task.path}.receipt"
    relevant = params.model_dump(exclude={"check_md5"})  # which does not change any byte of a shard
    inputs = {"code": code_sha256, "params": relevant}
    identity = manifest.digest_of({**inputs, "originals": [o.identity() for o in task.originals]})
    if earlier := _from_receipt(target, receipt, identity):
        return earlier
    packed = Packed(task.path)
    packed.entry = target.write(task.path, lambda file: _write_tar(file, params, source, task, packed))
    packed.dali_entry = target.write(packed.dali_name, holding(packed.dali_index()))
    target.write(receipt, holding(manifest.sealed({"identity": identity, "packed": vars(packed)})))
    return packed


def _from_receipt(target: Target, receipt: str, identity: str) -> Packed | None:
    """The result of an earlier run of the same task, if its files are still complete."""
    found = manifest.unsealed(target.read(receipt) or b"")
    if found is None or found.get("identity") != identity:
        return None
    packed = Packed(**found["packed"])
    packed.rows = [tuple(row) for row in packed.rows]  # type: ignore[misc]
    return packed if target.holds(packed.entry) and target.holds(packed.dali_entry) else None


def _write_tar(file: BinaryIO, params: ShardParams, source: Source, task: Task, packed: Packed) -> None:
    sums = np.zeros(NUM_SUMS, np.int64)
    offset = 0
    for original in task.originals:
        image = {"key": original.key, "split": original.split}
        try:
            raw = source.read(original)
            found = inspect(raw, params.max_pixels)
        except BadImage as reason:
            packed.bad.append({"name": original.name, "split": original.split, "reason": str(reason)})
            continue
        if found.amended:
            packed.amended.append({**image, "reason": found.amended})
        packed.remarks += [{**image, "remark": remark} for remark in found.remarks]
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
    """The header of a tar member (POSIX ustar), without times, owners and modes of this machine.

    name: ASCII, at most 100 bytes.
    """
    # same bytes as tarfile with mode 0444 in a tenth of the time: every image needs two headers
    fields = name.encode("ascii"), b"0000444", b"0000000", b"0000000", b"%011o" % size, b"0" * 11
    header = struct.pack("100s8s8s8s12s12s8sc100s6s2s247x", *fields, b" " * 8, b"0", b"", b"ustar", b"00")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def padding(size: int) -> bytes:
    """Zeros between a member's data and the next block."""
    return bytes(-size % BLOCK)


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
            raise BadData(f"{original.name}: {reason}; it was readable when it was packed. Run again.") from None

    return read


def _refuse_duplicate_keys(splits: dict[str, list[Original]]) -> None:
    for split, originals in splits.items():
        names: dict[str, str] = {}
        repeated = [(o.key, names[o.key], o.name) for o in originals if names.setdefault(o.key, o.name) != o.name]
        if repeated:
            pairs = [f"{key}: {first} and {second}" for key, first, second in repeated]
            raise BadData(
                f"split {split!r}: {counted(len(pairs), 'duplicate key')}; remove or rename one of each pair:\n"
                f"{listing(pairs)}",
                pairs,
            )


def _require_free_space(target: Target, tasks: list[Task]) -> None:
    """Raises StorageFailure before any work if the shards will not fit."""
    needed, free = _bytes_needed(target, tasks), target.free_bytes()
    if free is not None and needed > free:
        raise StorageFailure(
            f"{target.name}: the shards need about {needed:,} bytes, {free:,} are free. "
            "Free some space or choose another location, then run the same command again."
        )


def _bytes_needed(target: Target, tasks: list[Task]) -> int:
    """Estimated size of the shards that are not finished yet."""
    existing = set(target.names())
    missing = [task for task in tasks if f"{task.path}.receipt" not in existing]
    return sum(original.size + MEMBER_OVERHEAD for task in missing for original in task.originals)


def _refuse_other_files(target: Target) -> None:
    """Raises WrongParameters if the target holds files that this stage does not write: it would delete them."""
    others = [name for name in target.names() if not SHARD_FILES.fullmatch(name)]
    earlier = target.read(manifest.NAME)
    if not others and earlier is not None:
        try:
            manifest.parse(earlier, SCHEMA, f"{target.name}/{manifest.NAME}")
        except manifest.OtherSchema:
            others = [manifest.NAME]
        except Refused:
            pass  # damaged: it is written again
    if others:
        raise WrongParameters(
            f"{target.name}: holds {some(others)}, which is not written by this stage. Choose an empty location for "
            "the shards.",
            others,
        )


def _delete_leftovers(target: Target, keep: set[str], receipts: bool = False) -> None:
    """Delete files of earlier runs that are not part of this one: other shards, temporary files.

    receipts: whether to delete receipts as well.
    """
    for name in target.names():
        shard = name.removesuffix(".receipt").removesuffix(".idx").removesuffix(".tar") + ".tar"
        belongs = name.endswith((".receipt", ".idx")) and not receipts and shard in keep
        if name not in keep and not belongs:
            target.delete(name)
