"""List a tar in place: names, offsets and sizes from its headers; nothing is extracted.

Tar readers differ in how they treat links, long names, PAX headers and damaged ends.  Everything that two readers could
interpret differently is rejected here.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.errors import BadData, StorageFailure

BLOCK = 512  # bytes; headers and data start at multiples of it
CHUNK = 2**20  # bytes read at once after the end mark

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
    """A regular file.  offset: of its data, bytes from the start of the file that holds the tar; size: bytes."""

    name: str
    offset: int
    size: int


def members(fd: int, start: int, end: int, where: str) -> Iterator[Member]:
    """The regular files, in order, of the tar between two byte offsets of an open file; directories are skipped.

    where: name of this tar in messages.  Accepts POSIX ustar, GNU and v7 headers.  Raises BadData, with offset and
    name, for anything else: links, devices, long names, PAX, names outside the tar or not printable, duplicates, wrong
    checksums and sizes, a truncated tar (also between two members), data after the end.  Raises StorageFailure if the
    file cannot be read.
    """
    names: set[str] = set()
    offset, name_bytes = start, b""

    def bad(what: str, member: bool = True) -> BadData:
        shown = ascii(name_bytes.decode(errors="backslashreplace"))
        position = f"member {shown}" if member else f"after {shown}" if name_bytes else "at the beginning"
        return BadData(
            f"{where}: byte {offset}: {position}: {what}. The archive is damaged or not a plain tar; download it again "
            "and compare its checksum with the published one."
        )

    while True:
        header = _read(fd, BLOCK, offset, where) if offset + BLOCK <= end else b""
        if len(header) < BLOCK:
            raise bad("truncated: the two zero blocks at the end are missing", member=False)
        if header == ZEROS:
            if not _is_zero(fd, offset + BLOCK, end, where):
                raise bad("a zero block followed by data", member=False)
            if offset + 2 * BLOCK > end:
                raise bad("truncated: the second of the two zero blocks at the end is missing", member=False)
            return
        raw, size_field, sum_field, kind, magic, prefix, rest = HEADER.unpack(header)
        name_bytes = raw.rstrip(b"\0")
        if magic == POSIX and prefix != NO_PREFIX:
            name_bytes = prefix.rstrip(b"\0") + b"/" + name_bytes
        number = OCTAL.fullmatch(sum_field)
        if number is None or int(number[1], 8) != _checksum(header):
            raise bad("wrong header checksum")
        if magic not in (POSIX, GNU, V7):
            raise bad(f"{magic!r} is not the magic of a ustar, GNU or v7 header")
        if rest != NO_REST or (magic != POSIX and prefix != NO_PREFIX):
            raise bad("header fields that tar readers interpret differently")
        name = _name(name_bytes)
        if name is None:
            raise bad("a name that is empty, absolute, not printable, or contains '..'")
        is_folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
        if not is_folder and kind not in (b"0", b"\0"):
            raise bad(f"{REFUSED.get(kind, f'of type {kind!r}')}, not a regular file")
        number = OCTAL.fullmatch(size_field)
        if number is None:
            raise bad(f"size field {size_field!r} is not an octal number")
        size = int(number[1], 8)
        data = offset + BLOCK
        if data + size > end:
            raise bad(f"{size} bytes of data, {data + size - end} of them past the end")
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
    # The low half of Adler-32, started at 0, is the sum modulo 65,521, exact for 256 bytes.  8 times as fast as sum().
    total = (zlib.adler32(header[:256], 0) & 0xFFFF) + (zlib.adler32(header[256:], 0) & 0xFFFF)
    return total - sum(header[148:156]) + 8 * 32


def _name(name: bytes) -> str | None:
    """The name, or None if it is empty, not UTF-8, not printable, absolute, or contains '..'."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return None
    if not text.isprintable() or text[:1] in ("", "/") or (".." in text and ".." in text.split("/")):
        return None
    return text
