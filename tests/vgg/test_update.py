"""One step of training: the gradient is that of the whole batch, however it is shared and cut."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment, started, train_params
from torch import nn
from trainings import run

from runtime import checkpoint
from runtime.distributed import Group
from runtime.errors import Preempted, WrongParameters
from runtime.shards.loader import Loader
from runtime.shards.shardset import ShardSet
from runtime.stopping import Never, StopSignal
from vgg.data.stream import training_batches
from vgg.network.model import VGG
from vgg.network.trained import shapes_of
from vgg.training.agenda import ends_epoch
from vgg.training.loop import losses, update
from vgg.training.reporting import without_effect
from vgg.training.run import restore
from vgg.training.task import State
from vgg.training.warmup import fit, warm_up


def test_an_update_equals_the_formula_of_sgd(narrow: None, shards: ShardSet) -> None:
    """Two steps with an explicit formula: gradient plus decay, momentum, rate; no autocast, no dropout."""
    params = train_params(dropout=0.0, weight_decay=0.01)
    split = shards.split("train")
    ours = started(shards, dropout=0.0, weight_decay=0.01)
    theirs = started(shards, dropout=0.0, weight_decay=0.01).model
    velocity = [torch.zeros_like(p) for p in theirs.parameters()]
    for crops in training_batches(Loader(), split, params, range(2)):
        theirs.zero_grad()
        scores = theirs(ours.prepare(crops.images, crops.flip, crops.colour))
        nn.functional.cross_entropy(scores, crops.labels).backward()
        with torch.no_grad():
            for p, v in zip(theirs.parameters(), velocity, strict=True):
                v.mul_(0.9).add_(p.grad + 0.01 * p)
                p.sub_(0.01 * v)
        update(ours, crops)
        ours.state.step += 1
    for a, b in zip(ours.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.faults
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_an_update_is_the_one_of_torchs_fused_sgd_bit_for_bit(momentum: float) -> None:
    """Also with a skipped update and a continued training.  In a process of its own: torch's class loads much."""
    script = f"""
import sys, torch
from vgg.training.sgd import SGD
torch.manual_seed(1)
ours, theirs = ([torch.nn.Parameter(torch.ones(5, 3, 4, 4).to(memory_format=f)), torch.nn.Parameter(torch.ones(7))]
                for f in (torch.channels_last, torch.channels_last))
skip = torch.zeros(())
sgd = SGD(ours, {momentum}, 0.01, skip)
grads = [[torch.randn_like(p) for p in ours] for _ in range(5)]
def step(parameters, number, update):
    skip.fill_(number == 2)
    for p, g in zip(parameters, grads[number]):
        p.grad = g.clone()
    update(0.1 / (1 + number))
for number in range(5):
    if number == 3:  # as restore() does
        earlier, sgd = sgd.momentum, SGD(ours, {momentum}, 0.01, skip)
        sgd.momentum |= {{p: torch.empty_like(p).copy_(earlier[p]) for p in ours if p in earlier}}
    step(ours, number, sgd.step)
assert "torch._dynamo" not in sys.modules
reference = torch.optim.SGD(theirs, 0.1, {momentum}, weight_decay=0.01, fused=True)
reference.found_inf = skip
def update(rate):
    reference.param_groups[0]["lr"] = rate
    reference.step()
for number in range(5):
    step(theirs, number, update)
assert all(torch.equal(a, b) and not torch.equal(a, torch.ones_like(a)) for a, b in zip(ours, theirs))
sgd.forget_gradients()
assert all(p.grad is None for p in ours)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_no_update_is_made_with_a_gradient_that_is_not_finite(narrow: None, shards: ShardSet) -> None:
    split = shards.split("train")
    state = started(shards)
    batches = training_batches(Loader(), split, train_params(), range(3))
    update(state, next(batches))
    before = [p.detach().clone() for p in state.model.parameters()]
    state.state.step = 1
    state.prepare.std.fill_(float("nan"))
    update(state, next(batches))
    assert int(state.trouble_step) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))


def test_ends_epoch() -> None:
    ends = [step for step in range(12) if ends_epoch(step, 8, 30)]
    assert ends == [4, 8]  # after 32 and 64 images: the steps that use the 30th and the 60th
    assert [step for step in range(5) if ends_epoch(step, 30, 30)] == [1, 2, 3, 4]
    assert State(step=3, best_error=0.25) == State(**json.loads(json.dumps(vars(State(step=3, best_error=0.25)))))


@pytest.mark.parametrize("world_size", [1, 3, 5, 6, 7])
@pytest.mark.parametrize("micro_batch_size", ["auto", 1, 2])
def test_shares_and_micro_batches_add_up_to_the_whole_batch(
    world_size: int, micro_batch_size: int | str, narrow: None, shards: ShardSet
) -> None:
    """Also for numbers of ranks that do not divide the batch of 8; dropout of an image is the same on every rank."""
    split = shards.split("train")

    def gradients(world_size: int, **changes: object) -> list[torch.Tensor]:
        params, total = train_params(**changes), []
        for rank in range(world_size):
            ours = started(shards, Group(rank, world_size, 0, 1, torch.device("cpu")), **changes)
            crops = next(training_batches(Loader(rank=rank, world_size=world_size), split, params, range(1)))
            for part in ours.parts(crops):
                losses(ours, part)[0].backward()
            total.append([p.grad for p in ours.model.parameters()])
        return [sum(parts) / world_size for parts in zip(*total, strict=True)]  # what DDP does

    for ours, whole in zip(gradients(world_size, micro_batch_size=micro_batch_size), gradients(1), strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-4)


def test_a_micro_batch_is_halved_until_it_fits(narrow: None, shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = started(shards, batch_norm=True)
    before = {name: tensor.clone() for name, tensor in ours.model.state_dict().items()}
    forward = VGG.forward

    def small(self: VGG, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images, keys)

    monkeypatch.setattr(VGG, "forward", small)
    fit(ours)
    assert ours.micro_batch_size == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.model.state_dict().items())
    assert all(p.grad is None for p in ours.model.parameters())
    fixed = started(shards, micro_batch_size=4)
    with pytest.raises(WrongParameters, match=r"train\.micro_batch_size: 4 images of 32 pixels do not fit"):
        fit(fixed)


def test_sigterm_interrupts_the_compiler(narrow: None, shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler may replace the exception by one of its own."""
    ours = started(shards)

    def compiled(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        except BaseException as error:
            raise RuntimeError("the compiler failed") from error

    monkeypatch.setattr(VGG, "forward", compiled)
    stop, start = StopSignal(), time.monotonic()
    warm_up(ours, stop)
    assert stop()
    assert time.monotonic() - start < 10
    assert ours.state.step == 0
    with pytest.raises(RuntimeError, match="the compiler failed"):
        monkeypatch.setattr("time.sleep", lambda _: 1 / 0)
        monkeypatch.setattr("os.kill", lambda *_: None)
        warm_up(ours, Never())


def test_a_restart_uses_the_micro_batch_size_of_the_checkpoint(narrow: None, shards: ShardSet, tmp_path: Path) -> None:
    """Even if a larger one would fit now."""
    with pytest.raises(Preempted):
        run(shards, tmp_path / "model", 3, micro_batch_size="auto")
    newest = checkpoint.newest(tmp_path / "model", shapes_of)
    assert newest is not None
    ours = started(shards)
    restore(ours, dataclasses.replace(newest, state={**newest.state, "micro_batch_size": 3}))
    assert ours.micro_batch_size == 3


def test_an_update_does_not_wait_for_the_device(narrow: None, shards: ShardSet) -> None:
    """Reading a tensor on the host always calls aten::_local_scalar_dense or item; an update does not."""
    split, params = shards.split("train"), train_params()
    ours = started(shards)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for crops in training_batches(Loader(), split, params, range(2)):
            update(ours, crops)
            ours.state.step += 1
    names = {event.key for event in profile.key_averages()}
    assert "aten::convolution" in names
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"batch_size": 31}, ["batch_size: 31 is more than the 30 images"]),
        ({"micro_batch_size": 9}, ["micro_batch_size: 9 has no effect; a rank computes 8 images"]),
        ({"micro_batch_size": 8}, []),
        ({"gradient_compression": "bf16"}, ["gradient_compression: has no effect on one rank"]),
        (
            {"decoder": "device", "deterministic": True},
            ["decoder: 'device' has no", "deterministic: has no"],
        ),
    ],
)
def test_a_parameter_without_effect_is_reported(changes: dict, expected: list[str]) -> None:
    found = list(without_effect(train_params(**changes), "cpu", 1, 30))
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))
    on_gpus = list(without_effect(train_params(**changes), "cuda", 2, 30))
    assert not any(line.startswith(("decoder", "deterministic", "gradient")) for line in on_gpus)
