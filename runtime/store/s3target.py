"""Shards written directly to an object store, as runtime.targets.Directory writes them to a folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from runtime.manifest import storage_errors
from runtime.store.lease import LEASE
from runtime.store.s3 import Prefix
from runtime.targets import Fill, HashingWriter


class Target:
    """A runtime.targets.Target below 's3://bucket/prefix'.  Picklable."""

    def __init__(self, address: str) -> None:
        """Raises WrongParameters for any other address."""
        self.prefix = Prefix(address)
        self.name = self.prefix.address

    def names(self) -> list[str]:
        return [name for name in self.prefix.names() if name != LEASE]

    def read(self, name: str) -> bytes | None:
        return self.prefix.get(name)

    def write(self, name: str, fill: Fill) -> dict[str, Any]:
        """See runtime.targets.Target.  The file is first written to TMPDIR, which needs room for it."""
        with storage_errors(Path(tempfile.gettempdir())), tempfile.NamedTemporaryFile() as file:
            writer = HashingWriter(file)  # type: ignore[arg-type]  # needs only write()
            fill(writer)  # type: ignore[arg-type]
            file.flush()
            entry = writer.entry(name)
            self.prefix.put_file(name, Path(file.name), entry)
        return entry

    def holds(self, entry: dict[str, Any]) -> bool:
        return self.prefix.holds(entry)

    def delete(self, name: str) -> None:
        self.prefix.delete(name)

    def free_bytes(self) -> int | None:
        return None
