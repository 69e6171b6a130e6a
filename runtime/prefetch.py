"""Shards from afar, fetched before their images' turn: what training reads next is already on its way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from runtime.cache import Cache, Entry
from runtime.shardset import BLOCK_SHARDS, Split


class Prefetcher:
    """Fetches entries in the order they will be used, at most `ahead` before their use.  A context manager.

    Errors pass in silence: the reader meets them too and reports them.
    """

    def __init__(self, cache: Cache, entries: Sequence[Entry], ahead: int, num_threads: int = 4) -> None:
        self.cache, self.entries, self.ahead = cache, entries, ahead
        self._turn = threading.Condition()
        self._begun = self._next = 0
        self._stopped = False
        self._num_threads = min(num_threads, ahead)

    def __enter__(self) -> Prefetcher:
        for _ in range(self._num_threads):
            threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._turn:
            self._stopped = True  # not joined: a download that has begun is wanted later, and nobody waits for it here
            self._turn.notify_all()

    def advance(self, begun: int) -> None:
        """Say that the use of the first `begun` entries has begun.  Thread-safe; never goes back."""
        with self._turn:
            self._begun = max(self._begun, begun)
            self._next = max(self._next, self._begun)  # the reader has fetched those itself
            self._turn.notify_all()

    def _run(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._stopped or self._next < self._begun + self.ahead)
                if self._stopped or self._next >= len(self.entries):
                    return
                number = self._next
                self._next += 1
            with contextlib.suppress(Exception):
                self.cache.path(self.entries[number])


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
