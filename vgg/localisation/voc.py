"""The box annotation of one image: VOC XML, as ILSVRC has it, or a line of Kaggle's tables.

Files are untrusted: sizes are bounded; document types, and with them entities, are refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple
from xml.parsers import expat

from vgg.sharding.names import escaped

MAX_XML_BYTES = 2**20  # of an annotation; ILSVRC's have less than 64 KiB
MAX_COORDINATE = 10**6  # pixels

NUMBER = re.compile(r"[+-]?[0-9]{1,12}(\.[0-9]{0,20})?(e[+-]?[0-9]{1,2})?", re.IGNORECASE)


class Box(NamedTuple):
    """An object.  wnid: its class.  Coordinates as in the file: pixels, the last ones belong to the box."""

    wnid: str
    xmin: int
    ymin: int
    xmax: int
    ymax: int


@dataclass(frozen=True, slots=True)
class Annotation:
    """The boxes of one image.

    path: of the annotation in its source, without ending, with '/'.  size: width and height of the image that was
    annotated, None if not told.  is_rounded: coordinates were no whole numbers; halves were rounded up.
    """

    path: str
    size: tuple[int, int] | None
    boxes: tuple[Box, ...]
    is_rounded: bool = False


class Malformed(ValueError):
    """An annotation that cannot be read; the message is the reason."""


def parse(xml: bytes, path: str) -> Annotation:
    """Read a VOC XML.  An annotation without objects is legal.  Raises Malformed."""
    if len(xml) > MAX_XML_BYTES:
        raise Malformed(f"more than {MAX_XML_BYTES:,} bytes")
    document = _Document()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = _refuse_document_type
    parser.StartElementHandler, parser.EndElementHandler = document.start, document.end
    parser.CharacterDataHandler = document.characters
    try:
        parser.Parse(xml, True)
    except (expat.ExpatError, LookupError, UnicodeError) as error:  # unknown encodings raise the latter two
        raise Malformed(f"not XML: {error}") from None
    return document.annotation(path)


def parse_row(line: str) -> Annotation:
    """Read ILSVRC2012_val_00000001,n01440764 85 1 499 272 n01440764 …: an image and its boxes.  Raises Malformed."""
    key, comma, rest = line.partition(",")
    words = rest.split()
    if not key or not comma or len(words) % 5:
        raise Malformed(f"{escaped(line[:60])} is not an image and five words a box")
    found = [_box(words[i], words[i + 1 : i + 5]) for i in range(0, len(words), 5)]
    return Annotation(key, None, tuple(box for box, _ in found), any(rounded for _, rounded in found))


def _refuse_document_type(*_: object) -> None:
    raise Malformed("has a document type, whose entities could grow without limit")


class _Document:
    """Collects the few elements that are used, by their paths: parts of an object have boxes, too."""

    FIELDS = ("object/name", *(f"object/bndbox/{side}" for side in Box._fields[1:]), "size/width", "size/height")

    def __init__(self) -> None:
        self._path: list[str] = []
        self._text: list[str] = []
        self._size: dict[str, str] = {}
        self._objects: list[dict[str, str]] = []

    def start(self, name: str, _: object) -> None:
        if not self._path and name != "annotation":
            raise Malformed(f"its root is <{name[:60]}>, not <annotation>")
        self._path.append(name)
        self._text = []
        if self._path == ["annotation", "object"]:
            self._objects.append({})

    def characters(self, data: str) -> None:
        self._text.append(data)

    def end(self, name: str) -> None:
        place = "/".join(self._path[1:])
        self._path.pop()
        if place in self.FIELDS:
            fields = self._objects[-1] if place.startswith("object/") else self._size
            if name in fields:
                raise Malformed(f"<{name}> twice in one place")
            fields[name] = "".join(self._text).strip()
        self._text = []

    def annotation(self, path: str) -> Annotation:
        boxes, is_rounded = [], False
        for number, fields in enumerate(self._objects, 1):
            if missing := [name for name in ("name", *Box._fields[1:]) if not fields.get(name)]:
                raise Malformed(f"object {number} has no {', '.join(missing)}")
            box, rounded = _box(fields["name"], [fields[side] for side in Box._fields[1:]])
            boxes.append(box)
            is_rounded |= rounded
        sides = [_coordinate(self._size[side])[0] if self._size.get(side) else 0 for side in ("width", "height")]
        return Annotation(path, (sides[0], sides[1]) if min(sides) > 0 else None, tuple(boxes), is_rounded)


def _box(wnid: str, sides: list[str]) -> tuple[Box, bool]:
    """The box, and whether it had to be rounded."""
    numbers, rounded = zip(*map(_coordinate, sides), strict=True)
    return Box(wnid, *numbers), any(rounded)


def _coordinate(number: str) -> tuple[int, bool]:
    if not NUMBER.fullmatch(number) or abs(float(number)) > MAX_COORDINATE:
        raise Malformed(f"{number[:40]!r} is not a coordinate")
    whole = math.floor(float(number) + 0.5)
    return whole, whole != float(number)
