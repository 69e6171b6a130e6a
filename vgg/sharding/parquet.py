"""One parquet file of images, as `datasets` of Hugging Face writes it: columns image (bytes and path) and label."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH = 64  # rows unpacked at once
STREAMED = {"pre_buffer": False, "buffer_size": 2**20, "page_checksum_verification": True}


class Damaged(ValueError):
    """The file is not parquet, truncated, or of another form; the message is the reason."""


@dataclass(frozen=True)
class Table:
    """A parquet file, without its images.

    name: as the user knows it.  labels: -1 where missing.  paths: of every image, "" where missing.
    classes: names in the schema, if any.  stamp: changes when the file changes.  size: bytes; image_bytes: of all its
    images, about.
    """

    name: str
    labels: list[int]
    paths: list[str]
    classes: list[str] | None
    stamp: str
    size: int
    image_bytes: int


def read_table(path: Path, name: str) -> Table:
    """Schema, labels and paths of a file.  Raises Damaged."""
    import pyarrow  # not at the top: only this source needs it
    import pyarrow.parquet

    try:
        status = path.stat()
        with (
            open(path, "rb") as raw,
            pyarrow.parquet.ParquetFile(raw) as file,
        ):  # pyarrow opens no path of another locale
            schema, metadata = file.schema_arrow, file.metadata
            has_path = _expect_columns(schema)
            columns = file.read(columns=["label", *(["image.path"] if has_path else [])])
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(error) from None
    labels = columns.column("label").to_pylist()
    paths = (
        [(image or {}).get("path") for image in columns.column("image").to_pylist()]
        if has_path
        else [None] * len(labels)
    )
    chunks = [
        metadata.row_group(group).column(i)
        for group in range(metadata.num_row_groups)
        for i in range(metadata.num_columns)
    ]
    return Table(
        name,
        [-1 if label is None else label for label in labels],
        [path or "" for path in paths],
        _class_names(schema.metadata or {}),
        f"{status.st_size}:{status.st_mtime_ns}",
        status.st_size,
        sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == "image.bytes"),
    )


def read_images(path: Path) -> Iterator[Any]:
    """The bytes of all images of a file in order, as buffers; None where missing.  Raises Damaged.

    Memory: two to three row groups at a time.  `datasets` writes 100 rows or 100 MB to one; other software may put the
    whole file into one.
    """
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    try:
        with (
            open(path, "rb") as raw,
            pyarrow.parquet.ParquetFile(raw, **STREAMED) as file,
        ):
            for batch in file.iter_batches(BATCH, columns=["image.bytes"], use_threads=False):
                for value in pyarrow.compute.struct_field(batch.column("image"), "bytes"):
                    yield value.as_buffer() if value.is_valid else None
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(error) from None


def _expect_columns(schema: Any) -> bool:
    """Whether images have a path.  Raises Damaged if columns are missing or of another type."""
    from pyarrow import types

    fields = {field.name: field.type for field in schema}
    image, label = fields.get("image"), fields.get("label")
    parts = {field.name: field.type for field in image} if image is not None and types.is_struct(image) else {}
    missing = []
    if "bytes" not in parts or not (types.is_binary(parts["bytes"]) or types.is_large_binary(parts["bytes"])):
        missing.append("image.bytes (binary)")
    if label is None or not types.is_integer(label):
        missing.append("label (integer)")
    if missing:
        listing = ", ".join(f"{name} ({kind})" for name, kind in fields.items())
        raise Damaged(f"has no column {' and no column '.join(missing)}; its columns: {listing}")
    return "path" in parts


def _class_names(metadata: dict[bytes, bytes]) -> list[str] | None:
    """The names that `datasets` keeps in a schema; None if there are none."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return list(map(str, names)) if isinstance(names, list) else None


def _damaged(error: Exception) -> Damaged:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return Damaged(f"not a whole parquet file: {reason}")
