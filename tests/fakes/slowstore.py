"""A slow store that logs its downloads; as a program, a process that reads it through a cache.

python slowstore.py CACHE MAX_BYTES ROOT PAUSE ROUNDS
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from runtime.shards.cache import Cache

SIZE = 50_000  # bytes of each of its ten files


class Store:
    """Files of a folder, each written in two halves with `pause` seconds between."""

    def __init__(self, root: Path, pause: float = 0.0) -> None:
        self.root, self.pause = root, pause

    def __call__(self, entry: dict[str, Any], file: BinaryIO) -> None:
        with open(self.root / "log", "a") as log:
            log.write(entry["path"] + "\n")
        data = (self.root / entry["path"]).read_bytes()
        file.write(data[: len(data) // 2])
        time.sleep(self.pause)
        file.write(data[len(data) // 2 :])

    def downloads(self) -> Counter[str]:
        """How many downloads of each file were started, by all processes."""
        log = self.root / "log"
        return Counter(log.read_text().split() if log.exists() else [])


def fill(root: Path) -> list[dict[str, Any]]:
    """Write the store's files; returns their manifest entries."""
    root.mkdir()
    entries = []
    for i in range(10):
        data = random.Random(i).randbytes(SIZE)
        (root / f"{i}.tar").write_bytes(data)
        entries.append({"path": f"{i}.tar", "size": SIZE, "sha256": hashlib.sha256(data).hexdigest()})
    (root / "entries").write_text(json.dumps(entries))
    return entries


def main(directory: str, max_bytes: str, root: str, pause: str, rounds: str) -> None:
    """Read all files in order, or for several rounds in any order."""
    entries = json.loads((Path(root) / "entries").read_text())
    cache = Cache(Path(directory), int(max_bytes), Store(Path(root), float(pause)))
    for _ in range(int(rounds)):
        for entry in entries if rounds == "1" else random.sample(entries, len(entries)):
            assert hashlib.sha256(cache.read(entry, 0, entry["size"])).hexdigest() == entry["sha256"]
    print("read", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
