"""The competitors of benchmarks.train, taking turns: our training step and torchvision's reference loop."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models import vgg16

from benchmarks import machine
from runtime.shards.batches import PREFETCH, ROW, Crops, as_crops
from runtime.shards.loader import Feed, Loader
from runtime.shards.shardset import ShardSet
from runtime.stopping import Never
from vgg.data import roi
from vgg.data.stream import training_batches
from vgg.training.loop import update
from vgg.training.run import Run

NUM_CLASSES = 1000
PAPERS_SIZE = 224
NUM_BATCHES = 4  # of every competitor: one batch alone would be learnt by heart, and zeros multiply faster
SETTINGS = {"lr": 0.001, "momentum": 0.9, "weight_decay": 0.0005}  # a rate at which random pixels do not diverge


class Turn:
    """Steps that are timed.  lead: untimed steps at the start of every turn.  clock: in seconds."""

    lead = 1
    clock = staticmethod(time.perf_counter)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def step(self) -> None:
        raise NotImplementedError

    def seconds(self, steps: int) -> float:
        """The time that this many steps take, the device's work included."""
        for _ in range(self.lead):
            self.step()
        machine.synchronise(self.device)
        start = self.clock()
        for _ in range(steps):
            self.step()
        machine.synchronise(self.device)
        return self.clock() - start

    def close(self) -> None:
        """End what it has started."""


def on_one_core() -> None:
    """Pin this process to a core and measure its CPU time, which other processes hardly change."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    Turn.clock = staticmethod(time.process_time)


def take_turns(
    competitors: dict[str, Turn],
    rounds: int,
    steps: int,
    seconds_left: Callable[[], float],
    report: Callable[[dict[str, float]], None],
) -> None:
    """Rounds in which every competitor has a turn of some steps: at least one round, more while there is time.

    seconds_left: until no further round may start.  report: called after every turn with the median seconds of a turn
    of every competitor.
    """
    seconds: dict[str, list[float]] = {}
    longest = 0.0
    for number in range(rounds + 1):
        if number > 1 and seconds_left() < longest:
            break
        start = time.monotonic()
        for name, turn in competitors.items():
            if turn.device.type == "cuda":
                torch.cuda.empty_cache()  # the next competitor may need what this one leaves in the allocator
            taken = turn.seconds(steps if number else 2)
            if number:  # the first round warms up
                seconds.setdefault(name, []).append(taken)
                report({name: statistics.median(turns) for name, turns in seconds.items()})
        longest = max(longest, time.monotonic() - start) if number else 0.0


class Ours(Turn):
    """Our training step, on uint8 batches in the device's memory."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.group.device)
        self.run, size, batch = run, run.params.input_size, run.params.batch_size
        self.batches = []
        for _ in range(NUM_BATCHES):
            images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
            rows = np.frombuffer(np.random.bytes(batch * ROW.itemsize), ROW).copy()
            rows["label"], rows["number"] = np.random.randint(0, NUM_CLASSES, batch), np.arange(batch)
            rows["flip"], rows["colour"] = np.random.rand(batch) < 0.5, np.random.randn(batch, 3)
            crops = as_crops(images, rows)
            on_device = Crops(*(tensor.to(self.device) for tensor in crops))
            self.batches.append(on_device._replace(numbers=crops.numbers))  # the host reads these
        self._next = itertools.cycle(self.batches)

    def step(self) -> None:
        update(self.run, next(self._next))
        self.run.state.step += 1


class FromShards(Turn):
    """The same run, fed from shards as in training: decoding processes, copies while the device computes.

    waits: for data, a share of every turn's time.
    """

    def __init__(self, run: Run, shards: ShardSet) -> None:
        super().__init__(run.group.device)
        on_device = run.params.decoder == "device"
        loader = Loader.of(run.group, roi.DeviceDecoder(self.device) if on_device else None)
        # the processes fill their queues during the other competitors' turns: use those batches up before timing
        self.lead = 1 + (0 if on_device else loader.workers * (PREFETCH + 1))
        self.run = run
        self.waits: list[float] = []
        self._batches: Any = training_batches(loader, shards.split("train"), run.params, range(10**9))
        self._feed = Feed(self._batches, self.device, Never())
        self._feed.fetch()

    def step(self) -> None:
        update(self.run, self._feed.take())
        self.run.state.step += 1
        start = self.clock()
        self._feed.fetch()
        self._waited.append(self.clock() - start)

    def seconds(self, steps: int) -> float:
        self._waited: list[float] = []
        taken = super().seconds(steps)
        self.waits.append(sum(self._waited[-steps:]) / taken)
        return taken

    def close(self) -> None:
        self._batches.close()


class Forward(Turn):
    """Centre crops as in validation: no gradient, no dropout."""

    def __init__(self, run: Run, batches: list[Crops]) -> None:
        super().__init__(run.group.device)
        self.run, self._next = run, itertools.cycle(batches)

    @torch.no_grad()
    def step(self) -> None:
        run = self.run
        inputs = run.prepare(next(self._next).images)
        with torch.autocast(self.device.type, run.precision, enabled=run.precision != torch.float32):
            run.model(inputs)

    def seconds(self, steps: int) -> float:
        self.run.model.eval()
        try:
            return super().seconds(steps)
        finally:
            self.run.model.train()


class Reference(Turn):
    """torchvision's vgg16 and the step of its references/classification/train.py.

    same_shapes: without the pooling to 7 x 7, which makes its classifier larger than ours below 224 pixels.
    """

    def __init__(
        self,
        device: torch.device,
        size: int,
        batch: int,
        precision: torch.dtype,
        channels_last: bool = False,
        same_shapes: bool = False,
    ) -> None:
        super().__init__(device)
        self.precision = precision
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = vgg16()
        if same_shapes:
            model.avgpool, model.classifier[0] = nn.Identity(), nn.Linear(512 * (size // 32) ** 2, 4096)
        self.model = model.to(self.device, memory_format=layout)
        self.criterion = nn.CrossEntropyLoss()
        self.optimiser = torch.optim.SGD(self.model.parameters(), **SETTINGS)
        batches = []
        for _ in range(NUM_BATCHES):
            images = torch.randn(batch, 3, size, size).to(self.device).contiguous(memory_format=layout)
            batches.append((images, torch.randint(0, NUM_CLASSES, (batch,)).to(self.device)))
        self._next = itertools.cycle(batches)

    def step(self) -> None:
        images, labels = next(self._next)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            scores = self.model(images)
            loss = self.criterion(scores, labels)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        with torch.inference_mode():  # top-1 and top-5, each read from the device, as is the loss
            hits = scores.topk(5)[1].t() == labels[None]
            for count in (1, 5):
                (hits[:count].flatten().sum(dtype=torch.float32) * (100 / len(labels))).item()
        loss.item()


class ReferenceProcess(Turn):
    """A Reference in a separate process: on a CPU, the state of a process's allocator changes its speed."""

    def __init__(self, one_core: bool, reference: tuple[Any, ...]) -> None:
        super().__init__(torch.device("cpu"))
        spawn = multiprocessing.get_context("spawn")
        self._pipe, child_end = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(child_end, one_core, reference), daemon=True)
        self._process.start()

    def seconds(self, steps: int) -> float:
        self._pipe.send(steps)
        taken: float = self._pipe.recv()
        return taken

    def close(self) -> None:
        self._pipe.send(0)
        self._process.join()


def _serve(pipe: Connection, one_core: bool, reference: tuple[Any, ...]) -> None:
    if one_core:
        on_one_core()
    turn = Reference(torch.device("cpu"), *reference)
    while steps := pipe.recv():
        pipe.send(turn.seconds(steps))
