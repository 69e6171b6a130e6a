"""The headers of a tar read in place: names, offsets and sizes; nothing is extracted, nothing is guessed.

Readers of tars differ in what they make of links, long names, PAX headers and damaged ends.  Here whatever two of them
could read differently is refused.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from vgg.errors import BadData, StorageFailure

BLOCK = 512  # bytes; headers and data begin at multiples of it
CHUNK = 2**20  # bytes read at once behind the end mark

ZEROS, NO_PREFIX, NO_REST = bytes(BLOCK), bytes(155), bytes(12)
HEADER = struct.Struct("100s24x12s12x8sc100x8s80x155s12s")  # name, size, checksum, type, magic, prefix, rest
OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
POSIX, GNU, V7 = b"ustar\x0000", b"ustar  \0", bytes(8)
REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"S": "a GNU sparse file",
    b"L": "a GNU long name",
    b"K": "a GNU long link name",
    b"x": "a PAX header",
    b"g": "a global PAX header",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file.  offset: of its data, in bytes from the beginning of the file that was read; size: bytes."""

    name: str
    offset: int
    size: int


def members(fd: int, start: int, end: int, where: str) -> Iterator[Member]:
    """The regular files of the tar between two byte offsets of an open file, in their order; directories are left out.

    where: what messages call this tar.  Takes POSIX ustar, GNU and v7 headers.  Raises BadData, with offset and name,
    for anything else: links, devices, long names, PAX, names that leave the tar or do not print, duplicates, wrong
    checksums and sizes, a tar that is cut short, even between two members, or has something behind its end.  Raises
    StorageFailure if the file cannot be read.
    """
    names: set[str] = set()
    offset, name_bytes = start, b""

    def bad(what: str, member: bool = True) -> BadData:
        shown = ascii(name_bytes.decode(errors="backslashreplace"))
        place = f"member {shown}" if member else f"after {shown}" if name_bytes else "at the beginning"
        return BadData(
            f"{where}: byte {offset}: {place}: {what}. The archive is damaged or is not a plain tar; get it again, "
            "and compare its checksum with the published one."
        )

    while True:
        header = _read(fd, BLOCK, offset, where) if offset + BLOCK <= end else b""
        if len(header) < BLOCK:
            raise bad("cut short: the two zero blocks that end a tar are missing", member=False)
        if header == ZEROS:
            if not _is_zero(fd, offset + BLOCK, end, where):
                raise bad("a zero block with data behind it", member=False)
            if offset + 2 * BLOCK > end:
                raise bad("cut short: the second of the two zero blocks that end a tar is missing", member=False)
            return
        raw, size_field, sum_field, kind, magic, prefix, rest = HEADER.unpack(header)
        name_bytes = raw.rstrip(b"\0")
        if magic == POSIX and prefix != NO_PREFIX:
            name_bytes = prefix.rstrip(b"\0") + b"/" + name_bytes
        number = OCTAL.fullmatch(sum_field)
        if number is None or int(number[1], 8) != _checksum(header):
            raise bad("the checksum of its header is wrong")
        if magic not in (POSIX, GNU, V7):
            raise bad(f"{magic!r} is not the magic of a ustar, GNU or v7 header")
        if rest != NO_REST or (magic != POSIX and prefix != NO_PREFIX):
            raise bad("its header has fields that not every tar reads alike")
        name = _name(name_bytes)
        if name is None:
            raise bad("a name that is empty, absolute, has a part '..', or does not print")
        is_folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
        if not is_folder and kind not in (b"0", b"\0"):
            raise bad(f"{REFUSED.get(kind, f'of type {kind!r}')}, not a regular file")
        number = OCTAL.fullmatch(size_field)
        if number is None:
            raise bad(f"its size field {size_field!r} is not an octal number")
        size = int(number[1], 8)
        data = offset + BLOCK
        if data + size > end:
            raise bad(f"its {size} bytes run {data + size - end} bytes past the end")
        if is_folder:
            if size:
                raise bad(f"a directory with {size} bytes of data")
        else:
            if name.endswith("/"):
                raise bad("a regular file named as a directory")
            plain = name if "/" not in name else "/".join(part for part in name.split("/") if part not in ("", "."))
            if plain in names:
                raise bad("a duplicate name")
            names.add(plain)
            yield Member(name, data, size)
        offset = data + size + -size % BLOCK


def _read(fd: int, size: int, offset: int, where: str) -> bytes:
    try:
        return os.pread(fd, size, offset)
    except OSError as error:
        raise StorageFailure(f"{where}: byte {offset}: cannot be read: {error.strerror}. Check the disk.") from None


def _is_zero(fd: int, start: int, end: int, where: str) -> bool:
    return not any(_read(fd, min(CHUNK, end - at), at, where).strip(b"\0") for at in range(start, end, CHUNK))


def _checksum(header: bytes) -> int:
    """The sum of a header's bytes, its checksum field counted as spaces."""
    # The low half of Adler-32 begun at 0 is the sum modulo 65,521, exact for 256 bytes; sum() takes 8 times as long.
    total = (zlib.adler32(header[:256], 0) & 0xFFFF) + (zlib.adler32(header[256:], 0) & 0xFFFF)
    return total - sum(header[148:156]) + 8 * 32


def _name(name: bytes) -> str | None:
    """A member's name, or None if it is empty, not UTF-8, not printable, absolute, or has a part '..'."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return None
    if not text.isprintable() or text[:1] in ("", "/") or (".." in text and ".." in text.split("/")):
        return None
    return text
