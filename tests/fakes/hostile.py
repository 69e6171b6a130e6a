"""Sharding and decoding of mutated images in child processes: a crash or a hang kills the child and names the case.

The children check VGG_HOSTILE_CASES mutations (300) of VGG_HOSTILE_SEED (1).  Neither torch nor conftest, which imports
it, may be imported at the top: the child that shards has 1 GiB of address space.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import ALWAYS_REFUSED, CLEAN, Case, make, pick
from PIL import Image
from samples import encoded, jpegs, others, pictures, put, with_size

from runtime.shards.shardset import ShardSet
from vgg.data.images import BadImage, decode, image_of
from vgg.data.windows import Window
from vgg.params.shard import ShardParams
from vgg.sharding.inspect import inspect

CASES = int(os.environ.get("VGG_HOSTILE_CASES", "300"))
SEED = int(os.environ.get("VGG_HOSTILE_SEED", "1"))
REPLAY = f"VGG_HOSTILE_SEED={SEED} VGG_HOSTILE_CASES={CASES}"
SECONDS_PER_CASE = 5  # then SIGALRM kills the child, also inside C code
GIB = 1 << 30
MAX_PIXELS = 10_000_000
CHILD_TIMEOUT = 120 + CASES * 0.5  # seconds


def peak() -> int:
    """Peak memory of this process, bytes (ru_maxrss would include pytest, from before exec)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def watched(folder: Path, numbers: range) -> Iterator[int]:
    """Yields every number, after writing it to a file for the parent in case this process is killed."""
    with open(folder / "at", "wb", buffering=0) as note:
        for number in numbers:
            os.pwrite(note.fileno(), f"{number:>9}".encode(), 0)
            signal.alarm(SECONDS_PER_CASE)
            yield number
            signal.alarm(0)


def sharding(folder: Path, seed: int, cases: int) -> dict[str, Any]:
    """Inspect every case in 1 GiB of address space; write accepted images to files."""
    jpegs(), [others(name) for name in ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")]
    resource.setrlimit(resource.RLIMIT_AS, (GIB, GIB))
    counts: Counter[tuple[str, str]] = Counter()
    reasons: Counter[str] = Counter()
    slowest = 0.0
    faults = []
    for number in watched(folder, range(cases)):
        kind, data = make(seed, number)
        start = time.perf_counter()
        try:
            found = inspect(data, MAX_PIXELS)
        except BadImage as reason:
            verdict = "refused"
            reasons[f"{kind}: {' '.join(w for w in str(reason).split() if not any(c.isdigit() for c in w))}"] += 1
            if not str(reason).strip() or kind == CLEAN or ALWAYS_REFUSED.get(kind, "") not in str(reason):
                faults.append(f"case {number} ({kind}): refused with {str(reason)!r}")
        except Exception as error:  # any other exception would stop the stage
            verdict = "fault"
            faults.append(f"case {number} ({kind}): {error!r} instead of BadImage")
        else:
            verdict = "kept" if found.amended is None else "re-coded"
            if kind in ALWAYS_REFUSED or (found.amended is None and found.jpeg != data):
                faults.append(f"case {number} ({kind}): accepted")
            name = f"{number}.{found.width}.{found.height}.{verdict}.accepted"
            (folder / name).write_bytes(found.jpeg)
        slowest = max(slowest, time.perf_counter() - start)
        counts[kind, verdict] += 1
    return {
        "faults": faults,
        "counts": [[*key, count] for key, count in sorted(counts.items())],
        "reasons": dict(reasons.most_common()),
        "slowest": slowest,
    }


def decoding(folder: Path, seed: int, cases: int) -> dict[str, Any]:
    """Decode accepted images with Pillow and with the crops of training, and compare."""
    from vgg.data import roi

    assert roi.nvimgcodec is not None
    faults, largest = [], 0
    files = sorted(folder.glob("*.accepted"), key=lambda path: int(path.name.split(".")[0]))
    for number in watched(folder, range(len(files))):
        case, width, height = map(int, files[number].name.split(".")[:3])
        data = files[number].read_bytes()
        files[number].unlink()
        try:
            image = decode(data, MAX_PIXELS)
        except Exception as error:
            faults.append(f"case {case} ({make(seed, case).kind}): accepted, but Pillow: {error!r}")
            continue
        if image.size != (width, height):
            faults.append(f"case {case} ({make(seed, case).kind}): {image.size} instead of {width, height}")
            continue
        windows = squares(width, height)
        into = np.full((len(windows), windows[0].height, windows[0].width, 3), 77, np.uint8)
        if bad := roi.crops([data] * len(windows), windows, into):
            faults.append(f"case {case} ({make(seed, case).kind}): accepted, but crops: {bad}")
            continue
        for window, pixels in zip(windows, into, strict=True):
            difference = int(np.abs(pixels.astype(np.int16) - np.asarray(image.crop(window.box))).max())
            largest = max(largest, difference)
            if difference > 2:
                kind = make(seed, case).kind
                faults.append(f"case {case} ({kind}): crop {window.box} differs by {difference} of Pillow's")
                break
    return {"faults": faults, "largest": largest, "decoded": len(files)}


def squares(width: int, height: int, most: int = 8) -> list[Window]:
    """The largest squares that fit, along the long side: at both ends and, up to `most`, between."""
    side, extra = min(width, height), abs(width - height)
    steps = sorted({*range(0, extra + 1, side), extra})
    steps = steps if len(steps) <= most else [*steps[: most // 2], *steps[-most // 2 :]]
    edges = [(step, 0) if width > height else (0, step) for step in steps]
    return [Window(*edge, side, side) for edge in edges]


def packing(folder: Path, seed: int, cases: int) -> dict[str, Any]:
    """Pack a folder of 50 mutated and 10 clean files for every 300 cases; every file is packed or listed.

    The memory limit applies to the workers, too.
    """
    from runtime.targets import Directory
    from vgg.sharding.pack import pack
    from vgg.sharding.sources import Folder

    resource.setrlimit(resource.RLIMIT_AS, (GIB, GIB))
    params = {
        "source": "folder",
        "check_md5": True,
        "seed": 1,
        "samples_per_shard": 20,
        "max_pixels": MAX_PIXELS,
        "on_bad_image": "quarantine",
        "max_quarantined": 10**6,
    }
    faults, totals = [], Counter[str]()
    random = np.random.default_rng([seed, cases])
    for batch in range(max(1, cases // 300)):
        root, given = folder / f"images{batch}", {}
        numbers = [n for n in range(batch * 80, batch * 80 + 80) if make(seed, n).kind != CLEAN][:50]
        content = {f"{n}": make(seed, n) for n in numbers} | {f"clean{i}": Case(CLEAN, jpegs()[i]) for i in range(10)}
        for name, case in content.items():
            of_class = pick(random, ["cat", "dog"])
            split = "val" if random.random() < 0.2 else "train"
            given[f"{split}/{of_class}/{name}.jpg"] = case
        for class_folder in ("train/cat", "train/dog", "val/cat", "val/dog"):
            given[f"{class_folder}/clean.jpg"] = Case(CLEAN, pick(random, jpegs()))
        for name, case in given.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(case.data)
        signal.alarm(SECONDS_PER_CASE * 12)
        made = pack(ShardParams(**params), Folder(root), Directory(folder / f"shards{batch}"), "c", num_workers=2)
        signal.alarm(0)
        shards = ShardSet(folder / f"shards{batch}")
        shards.verify()
        quarantined = {item["name"]: item["reason"] for item in made["quarantined"]}
        amended = {f"{item['split']}/{item['key']}": item["reason"] for item in made["amended"]}
        read = {}
        for split in (shards.split("train"), shards.split("val")):
            for number in range(len(split)):
                image_of(split, number, MAX_PIXELS)
                read[f"{split.name}/{split.key(number)}"] = split.read(number)
        for name, case in given.items():
            split_name, wnid, file = name.split("/")
            key = f"{split_name}/{wnid}_{file.removesuffix('.jpg')}"
            try:
                inspected = inspect(case.data, MAX_PIXELS)
                expected: str | bytes = inspected.jpeg
            except BadImage as reason:
                expected = str(reason)
            found = read.pop(key, None) or quarantined.pop(name, None)
            if not found or found != expected or (case.kind == CLEAN and found != case.data):
                faults.append(f"{name} ({case.kind}): differs from inspect()")
            if isinstance(found, bytes) and (found != case.data) != (key in amended):
                faults.append(f"{name} ({case.kind}): changed but not listed, or listed but not changed")
            totals["quarantined" if isinstance(found, str) else "re-coded" if key in amended else "kept"] += 1
        if read or quarantined:
            faults.append(f"without a file: {[*read, *quarantined]}")
    return {"faults": faults, "totals": totals}


def false_sizes(folder: Path, seed: int, cases: int) -> dict[str, Any]:
    """Headers with sizes far above the data; each must be refused before decoding."""
    tiny = encoded(pictures()[0].resize((8, 8)))
    given = {
        "12000 x 12000 JPEG": with_size(tiny, 12_000, 12_000),
        "65500 x 65500 JPEG": with_size(tiny, 65_500, 65_500),
        "progressive": with_size(encoded(pictures()[0].resize((8, 8)), progressive=True), 12_000, 12_000),
        "CMYK": with_size(encoded(pictures()[0].resize((8, 8)).convert("CMYK")), 12_000, 12_000),
        "PNG": encoded(Image.new("1", (12_000, 12_000)), "PNG"),
        "BMP": put(encoded(Image.new("RGB", (8, 8)), "BMP"), 18, struct.pack("<ii", 12_000, 12_000)),
    }
    inspect(tiny, MAX_PIXELS)
    found = {}
    before = peak()  # after creating the PNG
    for name, data in given.items():
        signal.alarm(SECONDS_PER_CASE)
        start = time.perf_counter()
        try:
            reason = f"accepted: {inspect(data, 50_000_000).width}"
        except BadImage as error:
            reason = str(error)
        found[name] = [reason, len(data), time.perf_counter() - start]
    return {"found": found, "grown": peak() - before}


def child(work: str, folder: str, seed: int, cases: int) -> None:
    """Main function of a child process."""
    result = {"sharding": sharding, "decoding": decoding, "packing": packing, "false_sizes": false_sizes}[work](
        Path(folder), seed, cases
    )
    print(json.dumps({**result, "peak": peak()}))


def in_child(work: str, folder: Path) -> dict[str, Any]:
    """Run `work` in a child process and return its result.  Fails the test, with the case, if it crashed or hung."""
    from conftest import ROOT, environment

    command = f"import hostile; hostile.child({work!r}, {str(folder)!r}, {SEED}, {CASES})"
    limits = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONFAULTHANDLER": "1"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/fakes")])
    done = subprocess.run(
        [sys.executable, "-c", command],
        env=environment(**limits, PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=CHILD_TIMEOUT,
    )
    if done.returncode != 0:
        at = (folder / "at").read_text().strip() if (folder / "at").exists() else "?"
        pytest.fail(f"{REPLAY}: {work} ended with {done.returncode} at number {at}:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def show(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Print although pytest captures: a passing test of 10,000 cases should report how many were refused."""
    with capsys.disabled():
        print(f"\n{text}")
