"""The source of shards, compared with them image by image: archives, folders of images, the digits."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from components.lineage.places import Place
from runtime.errors import Problem
from runtime.store import storage
from runtime.wording import counted, some

NUM_READERS = 4


def compare(images: Path, place: Place, report: Callable[[int, int], None]) -> tuple[int, list[str]]:
    """Number of images compared, and a line for every difference between a source and its shards.

    images: folder of the source.  place: the shards, verified.  report: called with (images done, in total).
    The bytes of an image are compared by the index's checksum; one that was re-coded is re-coded again.
    """
    import google_crc32c

    from vgg.data.images import BadImage
    from vgg.sharding.inspect import inspect
    from vgg.sharding.open import open_source

    parameters, content = place.manifest["parameters"], place.manifest
    try:
        source = open_source(parameters["source"], images, storage.cache_folder)
    except Problem as reason:  # a part of it is missing, or an archive is damaged
        return 0, [str(reason)]
    amended = {(item["split"], item["key"]) for item in content["amended"]}
    left_out = {(item["split"], item["name"]) for item in content["quarantined"]}
    expected, findings = _rows(place), list[str]()
    total = sum(len(rows) for rows in expected.values())

    def difference(split: str, original: Any) -> str:
        crc = expected[split].pop(original.key, None)
        if crc is None:
            return "" if (split, original.name) in left_out else f"{split}/{original.name}: is not in the shards"
        try:
            data = source.read(original)
            if (split, original.key) in amended:
                data = inspect(data, parameters["max_pixels"]).jpeg
        except BadImage as reason:
            return f"{split}/{original.name}: {reason}"
        return "" if google_crc32c.value(data) == crc else f"{split}/{original.name}: is not the image in the shards"

    done = 0
    for split in expected:
        originals = source.originals(split)
        with ThreadPoolExecutor(NUM_READERS) as readers:
            for finding in readers.map(lambda original, split=split: difference(split, original), originals):
                done += 1
                report(done, total)
                findings += [finding] if finding else []
        if missing := sorted(expected[split]):
            findings.append(f"{split}: {counted(len(missing), 'image')} of the shards missing: {some(missing)}")
    return done, findings


def _rows(place: Place) -> dict[str, dict[str, int]]:
    """crc32c of every image in the index, by split and key."""
    found = {}
    for split, entry in place.manifest["splits"].items():
        rows = np.load(io.BytesIO(place.location.get(entry["index"]) or b""), allow_pickle=False)
        found[split] = {bytes(row["key"]).decode(): int(row["crc32c"]) for row in rows}
    return found
