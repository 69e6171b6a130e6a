"""The datasets of an HDF5 file, as h5py writes them by default and Keras therefore does: a small, bounded reader.

Known: superblock 0, groups as symbol tables, object headers 1, contiguous or compact data of floating point.  Not
known, and refused by name: newer forms, chunks, compression.  Attributes are not read.  (h5py would read everything,
but is a C library that damaged files can crash; pure Python readers bring compiled codecs along.)

Sections of the HDF5 File Format Specification 3.0 are named where their structures are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

SIGNATURE = b"\x89HDF\r\n\x1a\n"
UNDEFINED = 2**64 - 1
DATASPACE, DATATYPE, LAYOUT, FILTERS, CONTINUATION, SYMBOLS = 1, 3, 8, 11, 16, 17  # types of messages
FLOAT_TYPES = {(1, size): f"<f{size}" for size in (2, 4, 8)}  # (class, bytes): numpy's name
MAX_OBJECTS = 10_000  # groups and datasets; Keras' VGG-19 has 73
MAX_DEPTH = 16


class Malformed(ValueError):
    """Damaged, or a form of HDF5 that is not known here."""


def is_hdf5(start: bytes) -> bool:
    return start.startswith(SIGNATURE)


class File:
    """data: all bytes of a file, for example memory-mapped.  Raises Malformed."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.objects = data, 0
        if bytes(self._bytes(0, 8)) != SIGNATURE:
            raise Malformed("no HDF5 signature")
        versions = bytes(self._bytes(8, 8))  # II.A: versions; sizes of offsets and lengths
        if versions[0] == 0 and versions[5:7] != b"\x08\x08":
            raise Malformed("its first bytes are not those of h5py")
        if versions[0] != 0:
            raise Malformed(f"superblock {versions[0]}: write it with h5py.File(name, 'w'), without libver")
        base, _, end, _ = self._unpack("<4Q", 24)
        if base != 0 or end > len(data):
            raise Malformed(f"ends early: has {len(data):,} bytes instead of {end:,}")
        self.root = self._unpack("<Q", 64)[0]  # II.A, III.C: object header address of the root's symbol table entry

    def datasets(self) -> Iterator[tuple[str, np.ndarray]]:
        """(path, values) of every dataset of floating point: float16, float32 or float64, as stored."""
        yield from self._object("", self.root, 0)

    def _object(self, path: str, address: int, depth: int) -> Iterator[tuple[str, np.ndarray]]:
        self.objects += 1
        if self.objects > MAX_OBJECTS or depth > MAX_DEPTH:
            raise Malformed("too many objects, or a group contains itself")
        messages = dict(self._messages(address))
        if SYMBOLS in messages:
            tree, heap = struct.unpack_from("<2Q", self._expect(messages[SYMBOLS], 16))
            for name, child in self._members(tree, self._heap(heap), 0):
                yield from self._object(f"{path}/{name}", child, depth + 1)
        elif LAYOUT in messages:
            values = self._values(path, messages)
            if values is not None:
                yield path, values

    def _messages(self, address: int) -> Iterator[tuple[int, memoryview]]:
        """IV.A.1.a: the messages of a version 1 object header, (type, content)."""
        version, count, size = self._unpack("<BxHxxxxI", address)
        if version != 1:
            raise Malformed(f"object header {version}: write it with h5py.File(name, 'w'), without libver")
        blocks = [(address + 16, size)]
        for start, length in blocks:  # grows
            position = start
            while count and position + 8 <= start + length:
                kind, bytes_, _ = self._unpack("<HHB3x", position)
                content = self._bytes(position + 8, bytes_)
                if kind == CONTINUATION:
                    blocks.append(struct.unpack_from("<2Q", self._expect(content, 16)))
                yield kind, content
                position, count = position + 8 + bytes_, count - 1

    def _members(self, address: int, heap: memoryview, depth: int) -> Iterator[tuple[str, int]]:
        """III.A.1, III.B: (name, object header address) of the members of a group."""
        signature, kind, level, used = self._unpack("<4sBBH", address)
        if signature == b"SNOD":
            for number in range(self._unpack("<H", address + 6)[0]):
                name, child = self._unpack("<2Q", address + 8 + 40 * number)
                text = bytes(heap[name : name + 256]).partition(b"\0")[0]
                yield text.decode("utf-8", "replace"), child
            return
        if signature != b"TREE" or kind != 0 or depth > MAX_DEPTH:
            raise Malformed("a group's index is damaged")
        self.objects += used
        if self.objects > MAX_OBJECTS:
            raise Malformed("too many objects")
        for number in range(used):
            child = self._unpack("<Q", address + 24 + 8 + 16 * number)[0]
            expected = b"TREE" if level else b"SNOD"
            if bytes(self._bytes(child, 4)) != expected:
                raise Malformed("a group's index is damaged")
            yield from self._members(child, heap, depth + 1)

    def _heap(self, address: int) -> memoryview:
        """III.D: the local heap, with the names of a group's members."""
        signature, size, _, data = self._unpack("<4s4x3Q", address)
        if signature != b"HEAP":
            raise Malformed("a group's names are damaged")
        return self._bytes(data, size)

    def _values(self, path: str, messages: dict[int, memoryview]) -> np.ndarray | None:
        """The values of a dataset; None if they are no floating point."""
        if not {DATASPACE, DATATYPE} <= messages.keys():
            raise Malformed(f"{path}: has no shape or type")
        kind = self._type(messages[DATATYPE])
        if kind is None:
            return None
        if FILTERS in messages:
            raise Malformed(f"{path}: is compressed; write it without compression")
        shape = self._shape(path, messages[DATASPACE])
        size = prod(shape) * np.dtype(kind).itemsize
        layout = self._expect(messages[LAYOUT], 2)
        if layout[0] != 3 or layout[1] not in (0, 1):  # IV.A.2.i: version; compact or contiguous
            raise Malformed(f"{path}: is stored in chunks; write it without chunks")
        if layout[1] == 0:
            data = layout[4 : 4 + struct.unpack_from("<H", self._expect(layout, 4), 2)[0]]
        else:
            address, length = struct.unpack_from("<2Q", self._expect(layout, 18), 2)
            if size and address == UNDEFINED:
                raise Malformed(f"{path}: was never written")
            data = self._bytes(address, length) if size else layout[:0]
        if len(data) < size:
            raise Malformed(f"{path}: has {len(data):,} bytes instead of {size:,}")
        return np.frombuffer(data[:size], kind).reshape(shape)

    def _type(self, message: memoryview) -> str | None:
        """IV.A.2.d: little-endian floating point of IEEE 754, by its size."""
        first, flags, _, _, size = struct.unpack_from("<4BI", self._expect(message, 8))
        return None if flags & 1 else FLOAT_TYPES.get((first & 15, size))

    def _shape(self, path: str, message: memoryview) -> list[int]:
        """IV.A.2.b"""
        version, rank = struct.unpack_from("<2B", self._expect(message, 4))
        if version not in (1, 2) or rank > 8:
            raise Malformed(f"{path}: its shape is damaged")
        start = 8 if version == 1 else 4
        return list(struct.unpack_from(f"<{rank}Q", self._expect(message, start + 8 * rank), start))

    def _unpack(self, format_: str, address: int) -> tuple[Any, ...]:
        return struct.unpack(format_, self._bytes(address, struct.calcsize(format_)))

    def _bytes(self, address: int, size: int) -> memoryview:
        if address > len(self.data) or size > len(self.data) - address:
            raise Malformed(f"refers to bytes after its end ({address:,} + {size:,} of {len(self.data):,})")
        return self.data[address : address + size]

    @staticmethod
    def _expect(message: memoryview, size: int) -> memoryview:
        if len(message) < size:
            raise Malformed("a message is too short")
        return message
