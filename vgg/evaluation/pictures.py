"""The forms in which people and requests give images to the served model, brought into one: a list of pictures.

Text is base64 and never a path, because text may come from a request: a server must not open files for its clients.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vgg.evaluation.classifier import BadPicture, Picture

COLUMN = "image"
WANTED = (
    "wanted: the bytes of an image file, base64 text of them, a pathlib.Path, an image of Pillow, or an array uint8 "
    "(height, width, 3) or (height, width)"
)


def pictures(given: Any) -> list[Picture]:
    """The pictures in what was given to predict: one, a list of them, or a table with the column "image".

    A table may be a DataFrame, a dict of columns, or a list of dicts; a single column may have any name.
    Raises BadPicture, with the number of the row, for anything else.
    """
    return [_picture(number, item) for number, item in enumerate(_items(given))]


def _items(given: Any) -> Sequence[Any]:
    if isinstance(given, Mapping) or hasattr(given, "columns"):
        return _items(_column(given))
    if isinstance(given, np.ndarray):
        if given.dtype.kind in "OUS":  # requests with "inputs"
            return list(given.reshape(-1))
        return list(given) if given.ndim == 4 else [given]
    if isinstance(given, list | tuple):
        return given
    return given.tolist() if hasattr(given, "index") and hasattr(given, "tolist") else [given]  # a Series


def _column(table: Any) -> Any:
    names = list(table.columns) if hasattr(table, "columns") else list(table)
    name = COLUMN if COLUMN in names else names[0] if len(names) == 1 else None
    if name is None:
        raise BadPicture(0, f"no column {COLUMN!r}, but {', '.join(map(repr, names[:5])) or 'none at all'}; {WANTED}")
    return table[name]


def _picture(number: int, item: Any) -> Picture:
    if isinstance(item, Mapping) and COLUMN in item:
        item = item[COLUMN]
    if isinstance(item, np.ndarray) and item.dtype.kind in "US" and item.size == 1:
        item = item.reshape(-1)[0]
    if isinstance(item, list) and len(item) == 1:  # a row of a table with one column
        item = item[0]
    if isinstance(item, bytes | bytearray | memoryview):
        return bytes(item)
    if isinstance(item, str):
        return _from_base64(number, str(item))  # NumPy's text has another repr
    if isinstance(item, os.PathLike):
        try:
            return Path(item).read_bytes()
        except OSError as error:
            raise BadPicture(number, f"{os.fspath(item)}: {error.strerror}") from None
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, np.ndarray) and item.dtype == np.uint8 and (item.ndim == 2 or item.shape[2:] == (3,)):
        return item
    what = f"array {item.dtype} {item.shape}" if isinstance(item, np.ndarray) else type(item).__name__
    raise BadPicture(number, f"found {what}; {WANTED}")


def _from_base64(number: int, text: str) -> bytes:
    """The bytes behind base64, also of a data: URL or with line breaks."""
    try:
        return base64.b64decode(re.sub(r"^data:[\w/+.-]*;base64,|\s", "", text), validate=True)
    except (binascii.Error, ValueError):
        if len(text) > 200:  # no path
            raise BadPicture(number, f"text of {len(text):,} characters that is not base64 ({text[:20]}…)") from None
        raise BadPicture(number, f"{text!r} is not base64; for a file, pass pathlib.Path({text!r})") from None
