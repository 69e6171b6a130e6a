"""The finished evaluations in VGG_STORE, verified by their manifests.

Prints a list of {evaluate: parameters, inputs: digests, metrics}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from runtime import environment, manifest
from runtime.store import storage

FOLDER = "predictions"


def manifests(store: str) -> Iterator[tuple[str, bytes]]:
    """Address and content of every manifest of predictions."""
    if not storage.is_remote(store):
        for path in sorted(Path(store, FOLDER).glob(f"*/{manifest.NAME}")):
            yield str(path), path.read_bytes()
        return
    from runtime.store.s3 import Prefix

    prefix = Prefix(store)
    pages = prefix.client.get_paginator("list_objects_v2").paginate(
        Bucket=prefix.bucket, Prefix=prefix.key(f"{FOLDER}/")
    )
    for item in (item for page in pages for item in page.get("Contents", [])):
        name = item["Key"].removeprefix(prefix.key(""))
        if name.count("/") == 2 and name.endswith(f"/{manifest.NAME}") and (raw := prefix.get(name)):
            yield name, raw


found = []
for address, raw in manifests(environment.STORE.get()):
    content = manifest.parse(raw, manifest.schema_of(raw), address)
    found.append({name: content[name] for name in ("evaluate", "inputs", "metrics")})
print(json.dumps(found))
