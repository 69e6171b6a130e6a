"""Shards from afar, fetched before their images' turn: what training reads next is already on its way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from vgg.cache import Cache, Prefetcher
from vgg.index import BLOCK_SHARDS, Split


class ShardOrder(Protocol):
    """Of stream.Order: shards by their number in the index, in the order an epoch needs them."""

    def of_shards(self, epoch: int) -> np.ndarray: ...


@contextlib.contextmanager
def fetching(
    split: Split, order: ShardOrder, batch_size: int, first_step: int, num_steps: int
) -> Iterator[Callable[[int], None]]:
    """Keep the shards of the block after the one in use coming; nothing to do for shards that lie here.

    Gives the function to be told which step's images are asked for now.
    """
    cache = split.files
    largest = max(entry["size"] for entry in split.shards)
    # what is fetched ahead must not push out what is in use
    ahead = min(BLOCK_SHARDS, cache.max_bytes // largest - BLOCK_SHARDS) if isinstance(cache, Cache) else 0
    if not isinstance(cache, Cache) or ahead <= 0 or first_step >= num_steps:
        yield lambda _step: None
        return
    num_images, num_shards = len(split), len(split.shards)
    first_epoch = first_step * batch_size // num_images
    epochs = range(first_epoch, (num_steps * batch_size - 1) // num_images + 1)
    entries: list[dict[str, Any]] = [split.shards[shard] for epoch in epochs for shard in order.of_shards(epoch)]
    images_of_shard = np.bincount(split.rows["shard"], minlength=num_shards)

    def shards_begun(step: int) -> int:
        """How many of `entries`: up to the end of the block of the step's last image; a block begins as a whole."""
        epoch, position = divmod((step + 1) * batch_size - 1, num_images)
        ends = np.cumsum(images_of_shard[order.of_shards(epoch)])
        begun = int(np.searchsorted(ends, position, side="right")) // BLOCK_SHARDS * BLOCK_SHARDS + BLOCK_SHARDS
        return (epoch - first_epoch) * num_shards + min(begun, num_shards)

    with Prefetcher(cache, entries, ahead) as prefetcher:
        yield lambda step: prefetcher.advance(shards_begun(step))
