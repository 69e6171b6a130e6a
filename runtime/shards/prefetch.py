"""Download remote shards before training needs them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from runtime.shards.cache import Cache, Entry
from runtime.shards.shardset import BLOCK_SHARDS, Split


class Prefetcher:
    """Downloads entries in the order of their use, at most `ahead` before it.  A context manager.

    Errors are ignored: the reader gets the same ones and reports them.
    """

    def __init__(self, cache: Cache, entries: Sequence[Entry], ahead: int, num_threads: int = 4) -> None:
        self.cache, self.entries, self.ahead = cache, entries, ahead
        self._turn = threading.Condition()
        self._num_started = self._next = 0
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
            self._stopped = True  # threads are not joined: a running download is still useful
            self._turn.notify_all()

    def advance(self, num_started: int) -> None:
        """Report that the first `num_started` entries are in use.  Thread-safe; a lower number has no effect."""
        with self._turn:
            self._num_started = max(self._num_started, num_started)
            self._next = max(self._next, self._num_started)  # the reader downloads those
            self._turn.notify_all()

    def _run(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._stopped or self._next < self._num_started + self.ahead)
                if self._stopped or self._next >= len(self.entries):
                    return
                number = self._next
                self._next += 1
            with contextlib.suppress(Exception):
                self.cache.path(self.entries[number])


class ShardOrder(Protocol):
    """See vgg.data.stream.Order: the shard numbers in the order of their use in an epoch."""

    def of_shards(self, epoch: int) -> np.ndarray: ...


@contextlib.contextmanager
def fetching(
    split: Split, order: ShardOrder, batch_size: int, first_step: int, num_steps: int
) -> Iterator[Callable[[int], None]]:
    """Download the shards of the block after the one in use; does nothing for local shards.

    Yields a function to call with every step whose images are requested.
    """
    cache = split.files
    largest = max(entry["size"] for entry in split.shards)
    # downloads must not evict shards in use
    ahead = min(BLOCK_SHARDS, cache.max_bytes // largest - BLOCK_SHARDS) if isinstance(cache, Cache) else 0
    if not isinstance(cache, Cache) or ahead <= 0 or first_step >= num_steps:
        yield lambda _step: None
        return
    num_images, num_shards = len(split), len(split.shards)
    first_epoch = first_step * batch_size // num_images
    epochs = range(first_epoch, (num_steps * batch_size - 1) // num_images + 1)
    entries: list[dict[str, Any]] = [split.shards[shard] for epoch in epochs for shard in order.of_shards(epoch)]
    images_of_shard = np.bincount(split.rows["shard"], minlength=num_shards)

    def num_started(step: int) -> int:
        """The number of `entries` up to the end of the block that has the step's last image."""
        epoch, position = divmod((step + 1) * batch_size - 1, num_images)
        ends = np.cumsum(images_of_shard[order.of_shards(epoch)])
        started = int(np.searchsorted(ends, position, side="right")) // BLOCK_SHARDS * BLOCK_SHARDS + BLOCK_SHARDS
        return (epoch - first_epoch) * num_shards + min(started, num_shards)

    with Prefetcher(cache, entries, ahead) as prefetcher:
        yield lambda step: prefetcher.advance(num_started(step))
