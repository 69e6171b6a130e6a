"""Batches brought to the device while it computes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from vgg.batches import Crops
from vgg.errors import Interrupted
from vgg.stopping import Stop


class Feed:
    """One batch in hand, the next one on its way: copied by a stream of its own, behind the computation.

    batches: on the host (pinned for a GPU), or already on the device.
    """

    def __init__(self, batches: Iterator[Crops], device: torch.device, stop: Stop) -> None:
        self._batches, self._device, self._stop = batches, device, stop
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._next: Crops | None = None
        self.waited_seconds = 0.0  # for batches; what of it the device spent idle is less

    def fetch(self) -> bool:
        """Get the next batch and start its copy.  False: there is none, or a stop was asked for while waiting."""
        began = time.monotonic()
        try:
            with self._stop.interrupts():
                crops = next(self._batches, None)
        except Interrupted:
            crops = None
        self.waited_seconds += time.monotonic() - began
        if crops is not None and self._stream:
            with torch.cuda.stream(self._stream):
                moved = [tensor.to(self._device, non_blocking=True) for tensor in crops]
                crops = Crops(*moved)._replace(numbers=crops.numbers)  # those the host reads
        self._next = crops
        return crops is not None

    def take(self) -> Crops:
        """The batch that fetch() brought."""
        crops, self._next = self._next, None
        assert crops is not None, "take() follows a fetch() that was true"
        if self._stream:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            for tensor in crops._replace(numbers=crops.labels):
                tensor.record_stream(computing)  # its memory is not the copying stream's to use again before that
        return crops
