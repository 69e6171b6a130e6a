"""The file per_image.json of a version: which validation images it classifies right, for the gate's paired test.

JSON in one line with its own sha256: data_digest, keys_sha256 (the images' keys, in the order of the index), and per
image a bit for top-1 and one for top-5, packed and in base64: 17 kB for the 50,000 of ImageNet.
"""

from __future__ import annotations

import base64
import hashlib

import numpy as np

from runtime import manifest
from runtime.errors import Refused
from runtime.shards.shardset import ShardSet
from vgg.evaluation.gate import Hits
from vgg.evaluation.predictions import TOP

FILE, SCHEMA = "per_image.json", "vgg.per_image/1"


def hits_of(predictions: np.ndarray, data_digest: str) -> Hits:
    """predictions: rows of vgg.evaluation.predictions.row_type, of every image; their last mode is the headline."""
    ranks = predictions["modes"][:, -1]["rank"]
    return Hits(data_digest, ranks == 0, ranks < TOP)


def keys_sha256(shards: ShardSet) -> str:
    return hashlib.sha256(b"\n".join(bytes(key) for key in shards.split("val").rows["key"])).hexdigest()


def write(hits: Hits, keys: str) -> bytes:
    """Content of the file.  keys: keys_sha256() of the images."""
    bits = {
        name: base64.b64encode(np.packbits(getattr(hits, name)).tobytes()).decode()
        for name in ("top1", "top5")
    }  # fmt: skip
    body = {"schema": SCHEMA, "data_digest": hits.data_digest, "keys_sha256": keys, "num_images": len(hits.top1)}
    return manifest.sealed({**body, **bits})


def read(raw: bytes, where: str) -> Hits:
    """Raises Refused, naming `where`, for anything but what write() gave."""
    body = manifest.unsealed(raw)
    if body is None or body.get("schema") != SCHEMA:
        raise Refused(f"{where}: damaged, or no {SCHEMA}. Restore it, or register that model again.")
    num = int(body["num_images"])
    top1, top5 = (
        np.unpackbits(np.frombuffer(base64.b64decode(body[name]), np.uint8), count=num).astype(bool)
        for name in ("top1", "top5")
    )
    return Hits(str(body["data_digest"]), top1, top5)
