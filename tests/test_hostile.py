"""Hostile bytes: mutated and cut images into sharding, mutated shards into reading.  No crash, no hang, nothing wrong.

VGG_HOSTILE_CASES mutations (300) from VGG_HOSTILE_SEED (1): case n is make(seed, n), whatever ran before it.  Images
are looked at in child processes: a crash or a hang kills the child and names the case.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from vgg import tars
from vgg.errors import BadData, Refused
from vgg.images import BadImage, Window, decode
from vgg.index import ShardSet
from vgg.inspect import inspect
from vgg.params.shard import ShardParams

# neither torch nor conftest, which imports it, up here: the child that shards has 1 GiB of addresses in all

ROOT = Path(__file__).resolve().parents[1]
CASES = int(os.environ.get("VGG_HOSTILE_CASES", "300"))
SEED = int(os.environ.get("VGG_HOSTILE_SEED", "1"))
SECONDS_A_CASE = 5  # then SIGALRM kills the child, also out of C code
GIB = 1 << 30
MAX_PIXELS = 10_000_000
CHILD_TIMEOUT = 120 + CASES * 0.5  # seconds
CLEAN_EVERY = 8  # one case of so many is not mutated
Random = np.random.Generator


class Case(NamedTuple):
    kind: str
    data: bytes


# --- what is mutated ---


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:  # noqa: A002
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@cache
def photographs() -> list[bytes]:
    """The two of test_roi.py, found without importing scikit-learn."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "datasets" / "images"
    return [(folder / name).read_bytes() for name in ("china.jpg", "flower.jpg")]


@cache
def pictures() -> list[Image.Image]:
    whole = [Image.open(io.BytesIO(data)).convert("RGB") for data in photographs()]
    return [*whole, *(p.resize(size, Image.Resampling.BICUBIC) for p in whole for size in ((161, 107), (64, 97)))]


@cache
def jpegs() -> list[bytes]:
    """Clean ones, of every kind that is kept as it is."""
    found = list(photographs())
    for picture in pictures()[2:]:
        found += [
            encoded(picture, subsampling=0, quality=95),
            encoded(picture, subsampling=1, quality=90),
            encoded(picture, subsampling=2, quality=75),
            encoded(picture, progressive=True, quality=85),
            encoded(picture, optimize=True, quality=60, restart_marker_rows=1),
            encoded(picture.convert("L"), quality=80),
            encoded(picture, exif=exif(6)),
        ]
    return found


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


@cache
def others(format: str) -> list[bytes]:  # noqa: A002
    small = pictures()[2:]
    if format == "PNG":
        return [encoded(p.convert(mode), format) for p in small for mode in ("RGB", "P", "L", "RGBA", "1")]
    if format == "WEBP":
        return [encoded(p, format, lossless=lossless) for p in small for lossless in (False, True)]
    return [encoded(p.convert(mode), format) for p in small for mode in ("RGB", "P", "1")]


def pick(random: Random, options: list[Any]) -> Any:
    return options[int(random.integers(len(options)))]


def segments(jpeg: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, end) of every segment up to the first scan's header; the scan begins where the last one ends."""
    found, at = [], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        found.append((jpeg[at + 1], at, end))
        at = end
    return [*found, (0xDA, at, at + 2 + int.from_bytes(jpeg[at + 2 : at + 4]))]


def frame_at(jpeg: bytes) -> int:
    """Where SOF begins: ff cX, length (2), precision, height (2), width (2), components, then 3 bytes for each."""
    return next(start for marker, start, _ in segments(jpeg) if marker in (0xC0, 0xC1, 0xC2))


def put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """The same JPEG whose header lies about its size."""
    return put(jpeg, frame_at(jpeg) + 5, struct.pack(">HH", height, width))


# --- how: each takes a source of randomness and returns the bytes ---


def flipped(random: Random, data: bytes, low: int, high: int) -> bytes:
    spoilt = bytearray(data)
    for at in random.integers(low, high, int(pick(random, [1, 1, 2, 8]))):
        spoilt[at] ^= int(random.integers(1, 256))
    return bytes(spoilt)


def cut(random: Random) -> bytes:
    data = pick(random, jpegs())
    return data[: int(random.integers(1, len(data)))]


def header_flip(random: Random) -> bytes:
    data = pick(random, jpegs())
    return flipped(random, data, 2, segments(data)[-1][2])


def scan_flip(random: Random) -> bytes:
    data = pick(random, jpegs())
    return flipped(random, data, segments(data)[-1][2], len(data))


def zeroed(random: Random) -> bytes:
    data = pick(random, jpegs())
    at = int(random.integers(2, len(data)))
    return put(data, at, bytes(min(int(pick(random, [1, 16, 512, 4096])), len(data) - at)))


def garbage(random: Random) -> bytes:
    start = pick(random, [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0\x00\x10JFIF\0", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF"])
    return start + random.bytes(int(pick(random, [1, 2, 3, 20, 511, 10_000, 300_000])))


def empty(random: Random) -> bytes:
    return b""


def marker_swapped(random: Random) -> bytes:
    data = pick(random, jpegs())
    _, start, _ = pick(random, segments(data))
    new = pick(random, [0x00, 0x01, *range(0xC0, 0xD0), 0xD0, *range(0xD8, 0xF0), 0xFE, 0xFF])
    return put(data, start + 1, bytes([new]))


def size_huge(random: Random) -> bytes:
    sizes = [(65500, 65500), (65535, 65535), (12000, 12000), (65500, 640), (200, 65500)]
    return with_size(pick(random, jpegs()), *pick(random, sizes))


def size_zero(random: Random) -> bytes:
    return with_size(pick(random, jpegs()), *pick(random, [(0, 0), (0, 64), (64, 0)]))


def size_other(random: Random) -> bytes:
    data = pick(random, jpegs())
    at = frame_at(data) + 5
    height, width = struct.unpack(">HH", data[at : at + 4])
    changes = [(width * 2, height), (width, height * 2), (width // 2, height), (width, height // 2), (height, width)]
    return with_size(data, *pick(random, [*changes, (width, height + 40), (1, 1), (3100, 3100)]))


def components(random: Random) -> bytes:
    data = pick(random, jpegs())
    at = frame_at(data) + 9
    if random.random() < 0.5:
        return put(data, at, bytes([int(pick(random, [0, 1, 2, 3, 4, 10, 255]))]))
    at += 1 + int(random.integers(3 * data[at]))  # an id, sampling factors or a table number
    return put(data, at, random.bytes(1))


def duplicated_segment(random: Random) -> bytes:
    data = pick(random, jpegs())
    _, start, end = pick(random, segments(data))
    _, at, _ = pick(random, segments(data))
    return data[:at] + data[start:end] * int(pick(random, [1, 2, 50])) + data[at:]


def removed(random: Random) -> bytes:
    data = pick(random, jpegs())
    if random.random() < 0.5:
        _, start, end = pick(random, segments(data))
    else:
        start = int(random.integers(2, len(data) - 1))
        end = start + int(pick(random, [1, 2, 100]))
    return data[:start] + data[end:]


def inserted(random: Random) -> bytes:
    data = pick(random, jpegs())
    at = int(random.integers(2, len(data)))
    return data[:at] + random.bytes(int(pick(random, [1, 2, 100, 5000]))) + data[at:]


def application_garbage(random: Random) -> bytes:
    """EXIF, MPF, ICC, Adobe and JFIF blocks that hold anything."""
    data = pick(random, jpegs())
    kinds = [(0xE1, b"Exif\0\0"), (0xE2, b"MPF\0"), (0xE2, b"ICC_PROFILE\0"), (0xEE, b"Adobe"), (0xE0, b"JFIF\0")]
    marker, name = pick(random, kinds)
    if name in (b"Exif\0\0", b"MPF\0") and random.random() < 0.7:  # a block that can be parsed: entries of any type
        count = int(random.integers(1, 40))
        tags = [0x0112, 0x011A, 0x0128, 0x8769, 0x8825, 0xB000, 0xB001, 0xB002, int(random.integers(1 << 16))]
        body = b"".join(
            struct.pack(">HHI", pick(random, tags), int(random.integers(14)), int(pick(random, [0, 1, 2, 1 << 31])))
            + random.bytes(4)
            for _ in range(count)
        )
        body = b"MM\0*\0\0\0\x08" + struct.pack(">H", count) + body + random.bytes(int(random.integers(8)))
    else:
        body = random.bytes(int(pick(random, [0, 1, 7, 12, 300, 60_000])))
    length = len(name) + len(body) + 2
    if random.random() < 0.1:
        length = int(pick(random, [0, 1, 2, 65535]))
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", length) + name + body + data[2:]


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bomb(random: Random) -> bytes:
    """Few bytes that would become many: headers of huge sizes, text that unpacks to 64 MiB."""
    side = int(pick(random, [12_000, 60_000, (1 << 31) - 1]))
    what = pick(random, ["png", "text", "webp", "bmp"])
    if what == "bmp":
        return put(pick(random, others("BMP")), 18, struct.pack("<ii", min(side, 1 << 30), side))
    if what == "webp":
        size = struct.pack("<I", 16_382)[:3] * 2
        return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size
    if what == "png":
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")
    data, packed = pick(random, others("PNG")), zlib.compress(bytes(64 << 20), 1)
    text = pick(random, [(b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")])
    return data[:33] + chunk(text[0], text[1] + packed) + data[33:]


def mutated(format: str) -> Callable[[Random], bytes]:  # noqa: A002
    """Another format under the name of a JPEG: cut, flipped at its beginning or anywhere, zeroed, with noise inside."""

    def mutate(random: Random) -> bytes:
        data = pick(random, others(format))
        at = int(random.integers(1, len(data)))
        how = int(random.integers(6))
        if how == 0:
            return data[:at]
        if how == 1:
            return data[:at] + random.bytes(int(pick(random, [1, 30, 1000]))) + data[at:]
        if how == 2:
            return put(data, at, bytes(min(30, len(data) - at)))
        spoilt = flipped(random, data, 8, len(data) if how == 3 else min(len(data), 80))
        return mended(spoilt) if format == "PNG" else spoilt

    return mutate


def mended(png: bytes) -> bytes:
    """With checksums that are right, so that what the chunks say is believed."""
    at, parts = 8, [png[:8]]
    while at + 12 <= len(png) and at + 12 + (size := int.from_bytes(png[at : at + 4])) <= len(png):
        parts.append(chunk(png[at + 4 : at + 8], png[at + 8 : at + 8 + size]))
        at += 12 + size
    return b"".join(parts) + png[at:]


def trailing(random: Random) -> bytes:
    return pick(random, jpegs()) + random.bytes(int(pick(random, [1, 2, 1000, 100_000])))


def concatenated(random: Random) -> bytes:
    first, second = pick(random, jpegs()), pick(random, jpegs() + others("PNG"))
    if random.random() < 0.5:
        first = first[: int(random.integers(2, len(first)))]
    return first + second


def cmyk(random: Random) -> bytes:
    data = encoded(pick(random, pictures()[2:]).convert("CMYK"))
    return data if random.random() < 0.5 else flipped(random, data, 2, len(data))


KINDS: dict[str, Callable[[Random], bytes]] = {
    "cut": cut,
    "byte flips in the header": header_flip,
    "byte flips in the scan": scan_flip,
    "zeroed range": zeroed,
    "garbage": garbage,
    "empty": empty,
    "marker swapped": marker_swapped,
    "SOF huge": size_huge,
    "SOF zero": size_zero,
    "SOF of another size": size_other,
    "SOF components": components,
    "duplicated segment": duplicated_segment,
    "removed bytes": removed,
    "inserted bytes": inserted,
    "garbage in EXIF & Co.": application_garbage,
    "bomb": bomb,
    "mutated PNG": mutated("PNG"),
    "mutated WebP": mutated("WEBP"),
    "mutated BMP": mutated("BMP"),
    "trailing garbage": trailing,
    "two concatenated": concatenated,
    "CMYK": cmyk,
}
ALWAYS_REFUSED = {"cut": "", "empty": "empty file", "SOF huge": "", "SOF zero": ""}  # kind: what the reason says
CLEAN = "clean"


def make(seed: int, number: int) -> Case:
    """The bytes of a case: of its seed and number only."""
    random = np.random.default_rng([seed, number])
    if number % CLEAN_EVERY == CLEAN_EVERY - 1:
        return Case(CLEAN, pick(random, jpegs()))
    kind = list(KINDS)[int(random.permutation(len(KINDS))[0]) if number >= 2 * len(KINDS) else number % len(KINDS)]
    return Case(kind, KINDS[kind](random))


# --- the children ---


def peak() -> int:
    """Bytes of memory this process has had at most (ru_maxrss would count pytest's, from before exec)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def watched(folder: Path, numbers: range) -> Iterator[int]:
    """Each case's number, noted where the parent finds it if this process is killed while it is looked at."""
    with open(folder / "at", "wb", buffering=0) as note:
        for number in numbers:
            os.pwrite(note.fileno(), f"{number:>9}".encode(), 0)
            signal.alarm(SECONDS_A_CASE)
            yield number
            signal.alarm(0)


def sharding(folder: Path, seed: int, cases: int) -> dict[str, Any]:
    """Inspects every case, in 1 GiB of addresses; what is accepted goes into files."""
    jpegs(), [others(name) for name in ("PNG", "WEBP", "BMP")]
    resource.setrlimit(resource.RLIMIT_AS, (GIB, GIB))
    counts: Counter[tuple[str, str]] = Counter()
    reasons: Counter[str] = Counter()
    slowest = 0.0
    faults = []
    for number in watched(folder, range(cases)):
        kind, data = make(seed, number)
        began = time.perf_counter()
        try:
            found = inspect(data, MAX_PIXELS, published=False)
        except BadImage as reason:
            verdict = "refused"
            reasons[f"{kind}: {' '.join(w for w in str(reason).split() if not any(c.isdigit() for c in w))}"] += 1
            if not str(reason).strip() or kind == CLEAN or ALWAYS_REFUSED.get(kind, "") not in str(reason):
                faults.append(f"case {number} ({kind}): refused with {str(reason)!r}")
        except Exception as error:  # anything else would end the stage
            verdict = "fault"
            faults.append(f"case {number} ({kind}): {error!r} instead of BadImage")
        else:
            verdict = "kept" if found.amended is None else "re-coded"
            if kind in ALWAYS_REFUSED or (found.amended is None and found.jpeg != data):
                faults.append(f"case {number} ({kind}): accepted")
            name = f"{number}.{found.width}.{found.height}.{verdict}.accepted"
            (folder / name).write_bytes(found.jpeg)
        try:  # as if it came from an official archive, where a JPEG that decodes with warnings is kept
            found = inspect(data, MAX_PIXELS, published=True)
            if found.amended is None and found.jpeg != data:
                faults.append(f"case {number} ({kind}): published, kept and changed")
        except BadImage as reason:
            if not str(reason).strip() or verdict != "refused":
                faults.append(f"case {number} ({kind}): published, refused with {str(reason)!r}")
        except Exception as error:
            faults.append(f"case {number} ({kind}): published, {error!r} instead of BadImage")
        slowest = max(slowest, time.perf_counter() - began)
        counts[kind, verdict] += 1
    return {
        "faults": faults,
        "counts": [[*key, count] for key, count in sorted(counts.items())],
        "reasons": dict(reasons.most_common()),
        "slowest": slowest,
    }


def decoding(folder: Path, seed: int, cases: int) -> dict[str, Any]:
    """Decodes what was accepted with all three readers: Pillow, crops of our decoder, and crops without it."""
    from vgg import roi

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
    """Squares as large as they fit: both ends of the long side and, unless it is very long, all between."""
    side, extra = min(width, height), abs(width - height)
    steps = sorted({*range(0, extra + 1, side), extra})
    steps = steps if len(steps) <= most else [*steps[: most // 2], *steps[-most // 2 :]]
    edges = [(step, 0) if width > height else (0, step) for step in steps]
    return [Window(*edge, side, side) for edge in edges]


def packing(folder: Path, seed: int, cases: int) -> dict[str, Any]:
    """Packs a folder of 50 mutated and 10 clean files for every 300 cases; every file is somewhere, as it should be.

    The limit holds for the workers too.
    """
    from vgg.shards import pack
    from vgg.sources import Folder
    from vgg.targets import Directory

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
        for place in ("train/cat", "train/dog", "val/cat", "val/dog"):
            given[f"{place}/clean.jpg"] = Case(CLEAN, pick(random, jpegs()))
        for name, case in given.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(case.data)
        signal.alarm(SECONDS_A_CASE * 12)
        made = pack(ShardParams(**params), Folder(root), Directory(folder / f"shards{batch}"), "c", num_workers=2)
        signal.alarm(0)
        shards = ShardSet(folder / f"shards{batch}")
        shards.verify()
        quarantined = {item["name"]: item["reason"] for item in made["quarantined"]}
        amended = {f"{item['split']}/{item['key']}": item["reason"] for item in made["amended"]}
        read = {}
        for split in (shards.split("train"), shards.split("val")):
            for number in range(len(split)):
                split.image(number, MAX_PIXELS)
                read[f"{split.name}/{split.key(number)}"] = split.read(number)
        for name, case in given.items():
            split_name, wnid, file = name.split("/")
            key = f"{split_name}/{wnid}_{file.removesuffix('.jpg')}"
            try:
                inspected = inspect(case.data, MAX_PIXELS, published=False)
                expected: str | bytes = inspected.jpeg
            except BadImage as reason:
                expected = str(reason)
            found = read.pop(key, None) or quarantined.pop(name, None)
            if not found or found != expected or (case.kind == CLEAN and found != case.data):
                faults.append(f"{name} ({case.kind}): not what inspect() makes of it")
            if isinstance(found, bytes) and (found != case.data) != (key in amended):
                faults.append(f"{name} ({case.kind}): changed and not listed, or the reverse")
            totals["quarantined" if isinstance(found, str) else "re-coded" if key in amended else "kept"] += 1
        if read or quarantined:
            faults.append(f"of no file: {[*read, *quarantined]}")
    return {"faults": faults, "totals": totals}


def hollow(folder: Path, seed: int, cases: int) -> dict[str, Any]:
    """Headers that promise far more than there is, each refused before anything is decoded."""
    tiny = encoded(pictures()[0].resize((8, 8)))
    given = {
        "12000 x 12000 JPEG": with_size(tiny, 12_000, 12_000),
        "65500 x 65500 JPEG": with_size(tiny, 65_500, 65_500),
        "progressive": with_size(encoded(pictures()[0].resize((8, 8)), progressive=True), 12_000, 12_000),
        "CMYK": with_size(encoded(pictures()[0].resize((8, 8)).convert("CMYK")), 12_000, 12_000),
        "PNG": encoded(Image.new("1", (12_000, 12_000)), "PNG"),
        "BMP": put(encoded(Image.new("RGB", (8, 8)), "BMP"), 18, struct.pack("<ii", 12_000, 12_000)),
    }
    inspect(tiny, MAX_PIXELS, published=False)
    found = {}
    before = peak()  # after the PNG was made
    for name, data in given.items():
        signal.alarm(SECONDS_A_CASE)
        began = time.perf_counter()
        try:
            reason = f"accepted: {inspect(data, 50_000_000, published=False).width}"
        except BadImage as error:
            reason = str(error)
        found[name] = [reason, len(data), time.perf_counter() - began]
    return {"found": found, "grown": peak() - before}


def child(work: str, folder: str, seed: int, cases: int) -> None:
    """What a child process runs."""
    result = {"sharding": sharding, "decoding": decoding, "packing": packing, "hollow": hollow}[work](
        Path(folder), seed, cases
    )
    print(json.dumps({**result, "peak": peak()}))


def in_child(work: str, folder: Path) -> dict[str, Any]:
    """Run work in a child; its result.  Fails the test if the child crashed or hung, naming the case."""
    from conftest import environment

    command = f"import test_hostile; test_hostile.child({work!r}, {str(folder)!r}, {SEED}, {CASES})"
    limits = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONFAULTHANDLER": "1"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
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


REPLAY = f"VGG_HOSTILE_SEED={SEED} VGG_HOSTILE_CASES={CASES}"
child_timeout = pytest.mark.timeout(2 * CHILD_TIMEOUT + 60)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints what was counted, captured or not: a green test of 10,000 cases should say how many were refused."""

    def print_it(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")

    return print_it


# --- sharding ---


@child_timeout
def test_every_mutated_image_is_refused_with_a_reason_or_decodes_alike(
    say: Callable[[str], None], tmp_path: Path
) -> None:
    began = time.monotonic()
    found = in_child("sharding", tmp_path)
    counts = {(kind, verdict): count for kind, verdict, count in found["counts"]}
    decoded = in_child("decoding", tmp_path)
    verdicts = ("kept", "re-coded", "refused")
    total = {verdict: sum(n for (_, v), n in counts.items() if v == verdict) for verdict in verdicts}
    table = [f"  {kind:26}" + "".join(f"{counts.get((kind, v), 0):6}" for v in verdicts) for kind in [*KINDS, CLEAN]]
    say(
        f"{REPLAY}: {total}; sharding {found['peak'] >> 20} MiB, slowest {found['slowest']:.2f} s; decoding "
        f"{decoded['peak'] >> 20} MiB, differs by {decoded['largest']} at most; {time.monotonic() - began:.0f} s\n"
        f"  {'':26}{'kept':>6}{'re-c.':>6}{'ref.':>6}\n" + "\n".join(table)
    )
    faults = found["faults"] + decoded["faults"]
    assert not faults, f"{REPLAY}: {len(faults)} faults:\n" + "\n".join(faults[:60])
    assert sum(total.values()) == CASES
    assert decoded["decoded"] == total["kept"] + total["re-coded"]
    assert counts[CLEAN, "kept"] == CASES // CLEAN_EVERY
    assert found["peak"] < GIB
    assert decoded["peak"] < GIB  # torch and all


@child_timeout
def test_packing_a_folder_of_them_names_what_it_leaves_out(say: Callable[[str], None], tmp_path: Path) -> None:
    found = in_child("packing", tmp_path)
    say(f"{REPLAY}: packed {found['totals']}, {found['peak'] >> 20} MiB")
    assert not found["faults"], f"{REPLAY}:\n" + "\n".join(found["faults"][:40])
    assert sum(found["totals"].values()) == 64 * max(1, CASES // 300)
    assert found["peak"] < GIB


def test_hollow_images_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    """A decoded 12000 x 12000 image would take 432 MB."""
    result = in_child("hollow", tmp_path)
    for name, (reason, size, seconds) in result["found"].items():
        assert "pixels" in reason, (name, reason)
        assert seconds < 1, name
        assert size < (20_000 if name == "PNG" else 2_000), name
    assert result["found"]["12000 x 12000 JPEG"][0] == "12000 x 12000 is more than 50,000,000 pixels"
    assert result["grown"] < 50 * 10**6, result


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999])
def test_a_cut_jpeg_is_refused_wherever_it_was_cut(fraction: float) -> None:
    for data in jpegs():
        with pytest.raises(BadImage) as caught:
            inspect(data[: int(len(data) * fraction)], MAX_PIXELS, published=False)
        assert str(caught.value)
        assert fraction < 0.5 or "remature end" in str(caught.value), caught.value


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_even_the_last_bytes_are_missed(missing: int) -> None:
    for data in jpegs():
        with pytest.raises(BadImage, match="damaged"):
            inspect(data[:-missing], MAX_PIXELS, published=False)


def test_cmyk_becomes_rgb_and_a_cut_one_is_refused() -> None:
    data = encoded(pictures()[2].convert("CMYK"))
    found = inspect(data, MAX_PIXELS, published=False)
    assert found.amended == "CMYK JPEG re-coded as RGB"
    assert Image.open(io.BytesIO(found.jpeg)).mode == "RGB"
    with pytest.raises(BadImage):
        inspect(data[:-200], MAX_PIXELS, published=False)


def test_a_flipped_scan_byte_is_heard_or_kept_as_it_is() -> None:
    """Some flips give another JPEG without fault, which nothing can tell from the original: it is kept unchanged."""
    data, verdicts = photographs()[0], Counter[str]()
    begin = segments(data)[-1][2]
    for at in np.random.default_rng(SEED).integers(begin, len(data) - 2, 40):
        spoilt = put(data, int(at), bytes([data[at] ^ 0x55]))
        try:
            found = inspect(spoilt, MAX_PIXELS, published=False)
        except BadImage as reason:
            verdicts["refused"] += 1
            assert str(reason).startswith("damaged: "), reason
            published = inspect(spoilt, MAX_PIXELS, published=True)  # of an official archive: kept, and remarked on
            assert published.jpeg == spoilt
            assert published.remarks[0].startswith("decodes with a warning: ")
        else:
            verdicts["kept"] += 1
            assert found.jpeg == spoilt
    assert verdicts["refused"] > 0, verdicts


# --- reading ---


def spoilt_file(random: Random, data: bytes) -> bytes:
    """Flipped at some places, cut, zeroed, longer, or with a part in another place; never the same."""
    while True:
        at, length = int(random.integers(len(data))), int(pick(random, [1, 100, 512, 4096]))
        changed: bytes = pick(
            random,
            [
                flipped(random, data, 0, len(data)),
                data[:at],
                put(data, at, bytes(min(length, len(data) - at))),
                data + random.bytes(length),
                data[:at] + data[at + length :],
                data[:at] + random.bytes(length) + data[at:],
                data[:at] + data[at + length : at + 2 * length] + data[at : at + length] + data[at + 2 * length :],
            ],
        )
        if changed != data:
            return changed


def test_a_mutated_shard_gives_right_bytes_or_is_refused_by_name(
    say: Callable[[str], None], shards: ShardSet, tmp_path: Path
) -> None:
    whole = {name: [shards.split(name).read(n) for n in range(len(shards.split(name)))] for name in ("train", "val")}
    paths = sorted(shards.directory.glob("*.tar"))
    counts = Counter[str]()
    for number in range(max(100, CASES // 3)):
        replay = f"VGG_HOSTILE_SEED={SEED}, shard case {number}"
        random = np.random.default_rng([SEED, 1, number])
        path = pick(random, paths)
        data = path.read_bytes()
        path.write_bytes(spoilt_file(random, data))
        opened = ShardSet(shards.directory)
        with pytest.raises(Refused, match=path.name):
            opened.verify()
        for name in ("train", "val"):
            split = opened.split(name)
            for row in range(len(split)):
                try:
                    assert split.read(row) == whole[name][row], f"{replay}: wrong bytes, {split.where(row)}"
                    counts["right"] += 1
                except Refused as reason:
                    counts["refused"] += 1
                    assert f"{path.name}: {split.key(row)}: " in str(reason), f"{replay}: {reason}"
                    assert split.where(row).startswith(f"{path.name}:"), f"{replay}: another shard was spoilt"
        path.write_bytes(data)
    say(f"VGG_HOSTILE_SEED={SEED}: {max(100, CASES // 3)} shards; images read: {dict(counts)}")
    assert counts["refused"] > 0
    ShardSet(shards.directory).verify()


def test_a_mutated_index_or_manifest_is_refused_by_name(shards: ShardSet) -> None:
    for number in range(max(50, CASES // 10)):
        random = np.random.default_rng([SEED, 2, number])
        path = shards.directory / pick(random, ["manifest.json", "train.index.npy", "val.index.npy"])
        data = path.read_bytes()
        path.write_bytes(spoilt_file(random, data))
        with pytest.raises(Refused, match=path.name):
            ShardSet(shards.directory)
        path.write_bytes(data)
    ShardSet(shards.directory).verify()


def test_a_mutated_archive_is_listed_as_tar_lists_it_or_refused_by_name(
    say: Callable[[str], None], shards: ShardSet, tmp_path: Path
) -> None:
    """Of the archives that sharding reads; half of the mutations hit a member's header."""
    data = sorted(shards.directory.glob("train*.tar"))[0].read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        headers = [member.offset for member in tar]
    path, counts = tmp_path / "hostile.tar", Counter[str]()
    for number in range(max(100, CASES // 3)):
        random = np.random.default_rng([SEED, 3, number])
        at = pick(random, headers)
        spoilt = flipped(random, data, at, at + 512) if random.random() < 0.5 else spoilt_file(random, data)
        path.write_bytes(spoilt)
        with open(path, "rb") as file:
            try:
                found = [(m.name, m.offset, m.size) for m in tars.members(file.fileno(), 0, len(spoilt), path.name)]
            except BadData as reason:
                assert str(reason).startswith("hostile.tar: byte ")
                counts["refused"] += 1
                continue
        with tarfile.open(path) as tar:
            assert found == [(m.name, m.offset_data, m.size) for m in tar], f"VGG_HOSTILE_SEED={SEED}, archive {number}"
        counts["listed alike"] += 1
    say(f"VGG_HOSTILE_SEED={SEED}: archives {dict(counts)}")
    assert counts["refused"] > 0


# --- what the code may not do ---

UNPICKLERS = {"pickle", "_pickle", "cPickle", "shelve", "marshal", "dill", "cloudpickle", "joblib", "jsonpickle"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pandas.read_pickle"}


def findings(source: str, reading: bool) -> list[str]:
    """What of a module could run what it reads.  reading: a module of vgg/, which reads without WebDataset too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [*module, *(f"{'.'.join([*module, alias.name])}" for alias in node.names)]
            for name in names:
                package = name.split(".")[0]
                if package in UNPICKLERS | {"pipes", "pty"} or name in SHELLS or (reading and package == "webdataset"):
                    found.append(f"line {node.lineno}: imports {name}")
        elif isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            last = name.split(".")[-1]
            if name in {"eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"} | SHELLS:
                found.append(f"line {node.lineno}: calls {name}")
            if name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
                found.append(f"line {node.lineno}: {name} without allow_pickle=False")
            if name == "torch.load" and options.get("weights_only") != "True":
                found.append(f"line {node.lineno}: {name} without weights_only=True")
            if options.get("shell", "False") != "False" or last == "create_subprocess_shell":
                found.append(f"line {node.lineno}: {name} with a shell")
            if last in ("unsafe_load", "full_load", "read_pickle") or (
                name == "YAML" and options.get("typ") == "'unsafe'"
            ):
                found.append(f"line {node.lineno}: calls {name}")
    return found


def test_nothing_that_reads_can_run_what_it_reads() -> None:
    files = [path for folder in ("vgg", "components") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 40
    found = {
        str(path.relative_to(ROOT)): findings(path.read_text(), path.is_relative_to(ROOT / "vgg")) for path in files
    }
    assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from marshal import loads",
        "import webdataset.tariterators",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
        "exec(text)",
        "os.system(command)",
        "from os import popen",
    ],
)
def test_and_the_search_would_find_it(code: str) -> None:
    assert findings(code, reading=True)
    assert not findings("model.eval(); np.load(path, allow_pickle=False); subprocess.run(['git'])", reading=True)
