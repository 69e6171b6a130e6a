"""Names of classes and files: the same in every locale, and judged once, before any image is read.

A file system stores bytes.  A name is these bytes as UTF-8 text, whatever the locale; Python's own decoding depends on
it.  Bytes that are not UTF-8 become lone surrogates, so that every file can be opened, and are refused here: a
database, a page or a table that is written days later cannot hold them.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence

from runtime.errors import BadData
from runtime.wording import counted, listing

# they show a name in another order, or break its line; joiners (U+200C, U+200D) are part of words and emoji
INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
FORMULA = re.compile(r"[=+@-](?!\d+([.]\d+)?$)")  # at the beginning, for a spreadsheet; -1 is a number
REMEDY = "Rename them: later tables, pages and databases could not hold these names."


def text(name: str | bytes) -> str:
    """A name as the operating system gives it, as UTF-8 text: the same in every locale."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def local(name: str) -> str:
    """The inverse of text(): the name as this process's locale spells it, to open the file."""
    return os.fsdecode(encoded(name))


def encoded(name: str) -> bytes:
    """The bytes of a name from text()."""
    return name.encode("utf-8", "surrogateescape")


def escaped(name: str) -> str:
    """A name in quotes, in ASCII, as a shell's $'…' takes it."""
    return ascii(name) if _is_utf8(name) else repr(encoded(name))[1:]


def faults(paths: Iterable[str]) -> dict[str, str]:
    """Files and folders in these paths with an unusable name, and what is wrong with it."""
    checked: dict[str, None] = {}
    for path in paths:
        if not (path.isascii() and path.isprintable() and " " not in path):  # hardly ever: a million are soon checked
            parts = path.split("/")
            checked.update(dict.fromkeys("/".join(parts[:end]) for end in range(1, len(parts) + 1)))
    found = {path: _fault(path.rpartition("/")[2]) for path in checked}
    return {path: fault for path, fault in found.items() if fault}


def twins(paths: Iterable[str]) -> list[str]:
    """A line for all names in one folder that differ only in how they compose accents (Unicode normalisation)."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for path in paths:
        if not path.isascii():
            folder, _, name = path.rpartition("/")
            groups.setdefault((folder, unicodedata.normalize("NFC", name)), {})[path] = None
    return [
        f"{' and '.join(map(escaped, sorted(group, reverse=True)))}: the same name, composed differently"
        for group in groups.values()
        if len(group) > 1
    ]


def refuse(found: Sequence[str]) -> None:
    """Raises BadData that lists unusable names, if there are any."""
    if found:
        raise BadData(f"{counted(len(found), 'unusable name')}:\n{listing(found)}\n{REMEDY}", found)


def judge(classes: Iterable[str], paths: Sequence[str], words: Iterable[str] = ()) -> None:
    """Check the identifiers of all classes, the paths of all files, and other words for people.

    Raises BadData that lists every unusable name.
    """
    classes, in_files = list(dict.fromkeys(classes)), faults(paths)
    seen = {path.rpartition("/")[2] for path in in_files}
    found = [f"{escaped(path)}: {fault}" for path, fault in in_files.items()] + twins(paths)
    for name in dict.fromkeys([*classes, *words]):
        if (fault := _fault(name)) and name not in seen:
            found.append(f"class {escaped(name)}: {fault}")
    found += twins(classes)
    found += [f"class {escaped(name)}: spreadsheets take it for a formula" for name in classes if FORMULA.match(name)]
    refuse(found)


def _fault(name: str) -> str | None:
    if not _is_utf8(name):
        return "not UTF-8"
    if INVISIBLE.search(name):
        return "holds control characters"
    if not name or name != name.strip():
        return "begins or ends with a space" if name else "empty"
    return None


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
