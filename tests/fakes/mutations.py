"""Mutated images: cut, flipped, zeroed, rearranged, with false headers.

make(seed, number) returns a case: its bytes depend only on the seed and the number.  Neither torch nor conftest, which
imports it, may be imported here: the child process that shards has 1 GiB of address space.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from samples import encoded, frame_at, jpegs, others, pictures, put, segments, with_size

Random = np.random.Generator
CLEAN_EVERY = 8  # one case in so many is not mutated


class Case(NamedTuple):
    kind: str
    data: bytes


def pick(random: Random, options: list[Any]) -> Any:
    return options[int(random.integers(len(options)))]


def flipped(random: Random, data: bytes, low: int, high: int) -> bytes:
    damaged = bytearray(data)
    for at in random.integers(low, high, int(pick(random, [1, 1, 2, 8]))):
        damaged[at] ^= int(random.integers(1, 256))
    return bytes(damaged)


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
    """EXIF, MPF, ICC, Adobe and JFIF blocks with random content."""
    data = pick(random, jpegs())
    kinds = [(0xE1, b"Exif\0\0"), (0xE2, b"MPF\0"), (0xE2, b"ICC_PROFILE\0"), (0xEE, b"Adobe"), (0xE0, b"JFIF\0")]
    marker, name = pick(random, kinds)
    if name in (b"Exif\0\0", b"MPF\0") and random.random() < 0.7:  # a valid block: entries of random types
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
    """Few bytes that unpack to many: huge sizes in headers, text of 64 MiB."""
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
    """Images of another format: truncated, flipped near the start or anywhere, zeroed, with random bytes inserted."""

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
        damaged = flipped(random, data, 8, len(data) if how == 3 else min(len(data), 80))
        return with_checksums(damaged) if format == "PNG" else damaged

    return mutate


def with_checksums(png: bytes) -> bytes:
    """The same PNG with correct checksums, so that readers parse its chunks."""
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


def harmless(random: Random) -> bytes:
    """Bytes left over before a segment or the end, and another revision of JFIF; half of them are cut, too."""
    data = pick(random, jpegs())
    places = [start for _, start, _ in segments(data)[1:]] + [len(data) - 2]
    at = int(pick(random, places))
    data = data[:at] + bytes(int(n) for n in random.integers(0, 255, int(pick(random, [1, 5, 300])))) + data[at:]
    if data[6:11] == b"JFIF\0":
        data = put(data, 11, bytes([int(pick(random, [0, 1, 3]))]))
    return data if random.random() < 0.5 else data[: -int(random.integers(3, 2000))]


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
    "mutated GIF": mutated("GIF"),
    "mutated TIFF": mutated("TIFF"),
    "mutated PPM": mutated("PPM"),
    "harmless warnings": harmless,
    "trailing garbage": trailing,
    "two concatenated": concatenated,
    "CMYK": cmyk,
}
ALWAYS_REFUSED = {"cut": "", "empty": "empty file", "SOF huge": "", "SOF zero": ""}  # kind: part of the reason
CLEAN = "clean"


def make(seed: int, number: int) -> Case:
    """A case; depends only on seed and number."""
    random = np.random.default_rng([seed, number])
    if number % CLEAN_EVERY == CLEAN_EVERY - 1:
        return Case(CLEAN, pick(random, jpegs()))
    kind = list(KINDS)[int(random.permutation(len(KINDS))[0]) if number >= 2 * len(KINDS) else number % len(KINDS)]
    return Case(kind, KINDS[kind](random))
