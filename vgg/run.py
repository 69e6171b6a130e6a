"""One training run: what it is made from, how it starts, is continued, and is saved."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vgg import checkpoint, roi
from vgg.augment import Prepare
from vgg.checkpoint import Trained
from vgg.distributed import Group
from vgg.errors import Preempted, Problem, Refused
from vgg.index import ShardSet
from vgg.metrics import Counts
from vgg.model import VGG, Architecture, blank, initialise, transplant
from vgg.params.train import TrainParams
from vgg.schedule import Schedule

log = logging.getLogger("vgg.train")


@dataclass
class State:
    """All that a checkpoint holds besides tensors.  Every field is exact in JSON."""

    step: int = 0
    validated_step: int = 0  # the step of the last validation, so that a restart does not repeat it
    best_step: int = 0
    best_error: float = 1.0
    window: list[float] = field(default_factory=lambda: [0.0] * 4)  # counts since the last point of the curves
    epoch: list[float] = field(default_factory=lambda: [0.0] * 4)  # counts since the last validation
    history: list[dict[str, float]] = field(default_factory=list)  # a row an epoch
    schedule: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """One training run in memory."""

    params: TrainParams
    group: Group
    model: VGG
    replica: nn.Module  # the model, or the model inside DistributedDataParallel
    optimiser: torch.optim.SGD
    prepare: Prepare
    schedule: Schedule
    precision: torch.dtype
    state: State
    window: Counts
    epoch: Counts
    trouble: torch.Tensor  # float32 (): 1 from the first non-finite loss or gradient on; updates are no-ops then
    trouble_step: torch.Tensor  # int64 (): the step of it, or -1


def describe(
    params: TrainParams, shards: ShardSet, initial: Path, code: dict[str, str], device: torch.device
) -> dict[str, Any]:
    """What a checkpoint says of itself: what it was made from, and what is needed to use it."""
    network = Architecture(
        params.configuration, params.batch_norm, params.classifier_width, len(shards.wnids), params.input_size
    )
    run = {
        "train": params.model_dump(mode="json"),
        "data": {"digest": shards.digest, "classes_sha256": shards.classes_sha256},
        "initial": Trained.open(initial).weights_sha256 if params.init in ("shallower", "checkpoint") else None,
        "precision": str(precision_on(params, device)).removeprefix("torch."),
        "code": code,
    }
    std = shards.std if params.standardise else [1.0, 1.0, 1.0]
    decoder = roi.decoder_name(device if params.decoder == "device" else None)
    return {
        "run": run,
        "network": network.as_dict(),
        "pixels": {"mean": shards.mean, "std": std},
        "classes": shards.manifest["classes"],
        "versions": {
            "torch": torch.__version__,
            "decoder": decoder,
        },
    }


def find_run(directory: Path, about: dict[str, Any], accept_code_change: bool, group: Group) -> checkpoint.Step | None:
    """The checkpoint to continue from, or None to begin, or (with the directory's manifest in place) None for finished.

    An unfinished run of other parameters, data or code is refused: nobody's work is thrown away.  A finished one is
    moved to <directory>.previous.
    """
    if (directory / "manifest.json").exists():
        finished = Trained.open(directory)
        changes = list(checkpoint.differences(finished.manifest["run"], about["run"]))
        group.barrier()  # all have read before one moves
        if changes and group.is_first:
            aside = checkpoint.set_aside(directory)
            log.warning(
                "%s held a finished run with other inputs (%s); it lies in %s now", directory, changes[0], aside
            )
        group.barrier()
        return None
    if group.is_first:
        checkpoint.recover(directory)
    group.barrier()
    earlier = checkpoint.newest(directory)
    if earlier is None:
        return None
    there, here = dict(earlier.about["run"]), dict(about["run"])
    if accept_code_change:
        for changed in checkpoint.differences(there.pop("code"), here.pop("code")):
            log.warning("continuing with changed code: %s", changed)
    if earlier.about["network"] != about["network"]:
        there["network"], here["network"] = earlier.about["network"], about["network"]
    if changes := list(checkpoint.differences(there, here)):
        listing = "\n".join(f"  {change}" for change in changes)
        raise Refused(
            f"{directory}: holds an unfinished run (step {earlier.step}) that differs:\n{listing}\n"
            "To continue it, restore these (for code alone: --accept-code-change). "
            f"To start anew: rm -r {directory}"
        )
    if earlier.about["versions"] != about["versions"]:
        log.warning("versions differ from the checkpoint's (%s): results may too", earlier.about["versions"])
    return earlier


def precision_on(params: TrainParams, device: torch.device) -> torch.dtype:
    """bfloat16 or float32.  A CPU without bf16 instructions would emulate them, slower than fp32."""
    if params.precision != "auto":
        return torch.bfloat16 if params.precision == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


def start(params: TrainParams, shards: ShardSet, initial: Path, group: Group, num_images: int) -> Run:
    """A run at step 0."""
    if group.device.type == "cuda" and params.deterministic:  # what runs here on a CPU always is
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    about = describe(params, shards, initial, {}, group.device)
    model = blank(Architecture(**about["network"]), params.dropout)
    if params.init == "checkpoint":
        model.load_state_dict(same_network(Trained.open(initial), model).step.weights())
    else:
        initialise(model, "normal" if params.init == "shallower" else params.init, params.seed)
        if params.init == "shallower":
            transplant(model, Trained.open(initial).network())
    model = model.to(group.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if group.device.type == "cuda":
        torch.backends.cudnn.benchmark = not params.deterministic
        # two regions, so that the classifier's gradients (89 % of the bytes) travel while the convolutions compute
        model.features.compile(dynamic=False)
        model.classifier.compile(dynamic=False)
    replica: nn.Module = model
    if group.world_size > 1:
        devices = [group.device] if group.device.type == "cuda" else None
        replica = nn.parallel.DistributedDataParallel(model, devices, gradient_as_bucket_view=True, static_graph=True)
    optimiser = torch.optim.SGD(
        model.parameters(), params.learning_rate, params.momentum, weight_decay=params.weight_decay, fused=True
    )
    prepare = Prepare(about["pixels"]["mean"], about["pixels"]["std"], params.colour_shift).to(group.device)
    schedule = Schedule(params.schedule, params.learning_rate, num_images / params.batch_size)
    trouble = torch.zeros((), device=group.device)
    run = Run(
        params, group, model, replica, optimiser, prepare, schedule, precision_on(params, group.device), State(),
        Counts.zeros(group.device), Counts.zeros(group.device), trouble, torch.full((), -1, device=group.device),
    )  # fmt: skip
    optimiser.found_inf = trouble  # type: ignore[attr-defined]  # fused SGD makes no update while this is 1
    return run


def same_network(trained: Trained, model: VGG) -> Trained:
    """Raises Refused unless the trained network has the shapes of the model."""
    changes = list(checkpoint.differences(trained.manifest["network"], model.architecture.as_dict()))
    if changes:
        raise Refused(f"{trained.directory}: init 'checkpoint' needs the same network; {'; '.join(changes)}")
    return trained


def restore(run: Run, earlier: checkpoint.Step) -> None:
    run.state = State(**earlier.state)
    run.schedule.restore(run.state.schedule)
    run.model.load_state_dict(earlier.weights())
    momentum = earlier.momentum()
    for name, parameter in run.model.named_parameters():
        if name in momentum:
            buffer = torch.empty_like(parameter)  # keeps channels_last
            run.optimiser.state[parameter]["momentum_buffer"] = buffer.copy_(momentum[name])
    if run.group.is_first:  # the sums are of all ranks; one of them carries them on
        run.window.total += torch.tensor(run.state.window, dtype=torch.float64, device=run.group.device)
        run.epoch.total += torch.tensor(run.state.epoch, dtype=torch.float64, device=run.group.device)


def save(run: Run, directory: Path, about: dict[str, Any]) -> None:
    """A checkpoint of this moment; rank 0 writes, the others wait."""
    state, group = run.state, run.group
    state.window = group.sum_(run.window.total.clone()).tolist()
    state.epoch = group.sum_(run.epoch.total.clone()).tolist()
    state.schedule = run.schedule.state()
    failure: Problem | None = None
    if group.is_first:
        try:
            named = dict(run.model.named_parameters())
            momentum = {
                name: run.optimiser.state[parameter]["momentum_buffer"].contiguous().cpu()
                for name, parameter in named.items()
                if run.optimiser.state[parameter].get("momentum_buffer") is not None
            }
            weights = {name: tensor.contiguous().cpu() for name, tensor in run.model.state_dict().items()}
            checkpoint.save(directory, state.step, weights, momentum, vars(state), about)
            until_now = [step for step in checkpoint.steps(directory) if step <= state.step]  # later ones are damaged
            checkpoint.prune(directory, {*until_now[-run.params.keep_checkpoints :], state.best_step})
        except Problem as problem:
            failure = problem
    if any(group.gather(failure is not None)):
        raise failure or Preempted("rank 0 could not save its checkpoint")
