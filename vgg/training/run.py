"""One training run: what it is made from, how it starts, is continued, and is saved."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from runtime import checkpoint
from runtime.batches import Crops
from runtime.distributed import Group
from runtime.errors import Preempted, Problem, Refused
from runtime.saver import Saver
from runtime.shardset import ShardSet
from vgg import draws
from vgg.data import roi
from vgg.data.augment import Prepare
from vgg.evaluation.metrics import Counts
from vgg.network.init import initialise, transplant
from vgg.network.model import VGG, Architecture, blank
from vgg.network.trained import Trained, shapes_of
from vgg.params.train import TrainParams
from vgg.training.schedule import Schedule

log = logging.getLogger("vgg.train")

# torch 2.15 gave it a better name
_DDP = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP else "broadcast_buffers"

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


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
    samples: str = "0" * 16  # hex: the sum over all (step, position in the batch, image) trained on, see `seen`
    micro_batch_size: int = 0  # what was found to fit; 0: whatever was tried


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, on what, and where checkpoints go.

    initial: first weights, for init 'shallower' and 'checkpoint'.  code: fingerprint of every file that has a say in
    the result; a run is not continued with other code unless accept_code_change.
    """

    params: TrainParams
    shards: ShardSet
    directory: Path
    code: dict[str, str]
    initial: Trained | None = None
    accept_code_change: bool = False


@dataclass(frozen=True)
class Fresh:
    """A run begins at step 0."""


@dataclass(frozen=True)
class Continue:
    """A run continues from a checkpoint."""

    step: checkpoint.Step


@dataclass(frozen=True)
class Finished:
    """This very run is finished already."""

    trained: Trained


Beginning = Fresh | Continue | Finished


@dataclass(kw_only=True)
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
    trouble_step: torch.Tensor  # float64 (): the step of it, or -1
    micro_batch_size: int  # images that this rank computes at once, at most
    samples: int = 0  # this rank's part of State.samples, modulo 2^64

    def parts(self, crops: Crops) -> list[Crops]:
        """A share of a batch as micro-batches on the device."""
        size, device = self.micro_batch_size, self.group.device
        columns = [tensor.to(device, non_blocking=True).split(size) for tensor in crops]  # type: ignore[no-untyped-call]
        return [Crops(*part) for part in zip(*columns, strict=True)]


def describe(task: Task, device: torch.device) -> dict[str, Any]:
    """The metadata of a checkpoint: what it was made from, and what is needed to use it."""
    params, shards = task.params, task.shards
    network = Architecture(
        params.configuration, params.batch_norm, params.classifier_width, len(shards.wnids), params.input_size
    )
    run = {
        "train": params.model_dump(mode="json"),
        "data": {"digest": shards.digest, "classes_sha256": shards.classes_sha256},
        "initial": task.initial.weights_sha256 if task.initial else None,
        "precision": str(precision_on(params, device)).removeprefix("torch."),
        "code": task.code,
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


def expect_state(step: checkpoint.Step, accept_code_change: bool) -> None:
    """Raises Refused unless state.json is a State.  What other code did not know yet may be missing, and is begun."""
    path, known = step.path / "state.json", vars(State()).keys()
    strange = (step.state.keys() - known) | (set() if accept_code_change else known - step.state.keys())
    try:
        TypeAdapter(State).validate_json(json.dumps(step.state), strict=True)
    except ValidationError as error:
        strange |= {".".join(map(str, problem["loc"])) for problem in error.errors()}
    if strange:
        raise Refused(f"{path}: not the state of a training: {', '.join(sorted(strange))}. No training wrote it.")


def find_run(directory: Path, about: dict[str, Any], accept_code_change: bool, group: Group) -> Beginning:
    """How a run begins.

    An unfinished run of other parameters, data or code is refused: nobody's work is thrown away.  A finished one is
    moved to <directory>.previous; checkpoints that were passed over for an older one, to <directory>.refused.
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
        elif not changes:
            expect_state(finished.step, accept_code_change=False)
        group.barrier()
        return Fresh() if changes else Finished(finished)
    if group.is_first:
        checkpoint.recover(directory)
    group.barrier()

    def differs(step: checkpoint.Step) -> list[str]:
        there, here = ({**a["run"], "network": a["network"]} for a in (step.about, about))
        if accept_code_change:
            there["code"] = here["code"]
        changes = list(checkpoint.differences(there, here))
        if not changes:
            expect_state(step, accept_code_change)
        return changes

    earlier = checkpoint.newest(directory, shapes_of, differs)
    found = group.gather(earlier.step if earlier else None)  # all have read before one moves
    if len(set(found)) > 1:
        raise Preempted(  # a store that was away for a moment may be the reason
            f"{directory}: rank {group.rank} finds another newest checkpoint there than rank 0 (steps {found}). All "
            "nodes need one and the same store, a shared volume or s3://; if they have, run again."
        )
    if earlier is None:
        return Fresh()
    if group.is_first:
        checkpoint.set_later_aside(directory, earlier.step)
    for changed in checkpoint.differences(earlier.about["run"].get("code"), about["run"]["code"]):
        log.warning("continuing with changed code: %s", changed)
    if earlier.about["versions"] != about["versions"]:
        log.warning("versions differ from the checkpoint's (%s): results may too", earlier.about["versions"])
    return Continue(earlier)


def precision_on(params: TrainParams, device: torch.device) -> torch.dtype:
    """bfloat16 or float32.  A CPU without bf16 instructions would emulate them, slower than fp32."""
    if params.precision != "auto":
        return torch.bfloat16 if params.precision == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


def start(task: Task, about: dict[str, Any], group: Group) -> Run:
    """A run at step 0, of this rank alone; connect() joins it with the others.  about: of describe()."""
    params = task.params
    if group.device.type == "cuda" and params.deterministic:  # what runs here on a CPU always is
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    precision = precision_on(params, group.device)
    model = blank(Architecture(**about["network"]), params.dropout)
    if params.init == "checkpoint":
        model.load_state_dict(same_network(given_initial(task), model).step.weights())
    elif params.init == "shallower":
        initialise(model, "normal", params.seed)
        transplant(model, given_initial(task).network())
    else:
        initialise(model, params.init, params.seed)
    model = model.to(group.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels = about["pixels"]
    prepare = Prepare(pixels["mean"], pixels["std"], params.colour_shift, precision).to(group.device)
    if group.device.type == "cuda":
        torch.backends.cudnn.benchmark = not params.deterministic
        # two regions, so that the classifier's gradients (89 % of the bytes) travel while the convolutions compute
        model.features.compile(dynamic=False)
        model.classifier.compile(dynamic=False)
        prepare.compile(dynamic=False)
    else:
        keep_memory()
    optimiser = torch.optim.SGD(
        model.parameters(), params.learning_rate, params.momentum, weight_decay=params.weight_decay, fused=True
    )
    steps_per_epoch = len(task.shards.split("train")) / params.batch_size
    trouble = torch.zeros((), device=group.device)
    share = -(-params.batch_size // group.world_size)
    run = Run(
        params=params,
        group=group,
        model=model,
        replica=model,
        optimiser=optimiser,
        prepare=prepare,
        schedule=Schedule(params.schedule, params.learning_rate, steps_per_epoch),
        precision=precision,
        state=State(),
        window=Counts.zeros(group.device),
        epoch=Counts.zeros(group.device),
        trouble=trouble,
        trouble_step=torch.full((), -1.0, dtype=torch.float64, device=group.device),
        micro_batch_size=share if params.micro_batch_size == "auto" else min(share, params.micro_batch_size),
    )
    optimiser.found_inf = trouble  # type: ignore[attr-defined]  # fused SGD makes no update while this is 1
    return run


def given_initial(task: Task) -> Trained:
    assert task.initial is not None, "init 'shallower' and 'checkpoint' need first weights"
    return task.initial


def keep_memory() -> None:
    """Have glibc keep large blocks: it gives them back at every step, and the kernel clears new pages for the next."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def connect(run: Run) -> None:
    """From here on the ranks average their gradients."""
    group, params = run.group, run.params
    if group.world_size == 1:
        return
    in_parts = any(group.gather(run.micro_batch_size < -(-params.batch_size // group.world_size)))
    options: dict[str, Any] = {
        "device_ids": [group.device] if group.device.type == "cuda" else None,
        "gradient_as_bucket_view": True,
        _SYNC_BUFFERS: False,  # validate() does it, once an epoch
        "static_graph": not in_parts,  # it cannot be told of backward passes that send nothing
    }
    replica = nn.parallel.DistributedDataParallel(run.model, **options)
    if params.gradient_compression == "bf16":
        replica.register_comm_hook(None, bf16_compress_hook)
    run.replica = replica


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
    run.micro_batch_size = min(run.micro_batch_size, run.state.micro_batch_size or run.micro_batch_size)
    if run.group.is_first:  # the sums are of all ranks; one of them carries them on
        run.window.total += torch.tensor(run.state.window, dtype=torch.float64, device=run.group.device)
        run.epoch.total += torch.tensor(run.state.epoch, dtype=torch.float64, device=run.group.device)
        run.samples = int(run.state.samples, 16)


def seen(step: int, positions: NDArray[np.int64], numbers: NDArray[np.int64]) -> int:
    """What a step adds to State.samples: images `numbers`, that stood at `positions` of its global batch.

    A sum modulo 2^64 of random bits, so any number of ranks add up to the same; an image that is lost, repeated or out
    of its place changes it.
    """
    return int(draws.bits("samples", step, positions, numbers).sum(dtype=np.uint64))


def save(run: Run, saver: Saver) -> None:
    """Begin a checkpoint of this moment; rank 0 writes it while all go on."""
    state, group = run.state, run.group
    state.window = group.sum_(run.window.total.clone()).tolist()
    state.epoch = group.sum_(run.epoch.total.clone()).tolist()
    state.schedule = run.schedule.state()
    state.samples = f"{sum(group.gather(run.samples)) % 2**64:016x}"
    if group.is_first:
        named = dict(run.model.named_parameters())
        buffers = {name: run.optimiser.state[parameter].get("momentum_buffer") for name, parameter in named.items()}
        momentum = {name: buffer for name, buffer in buffers.items() if buffer is not None}
        saver.save(run.model.state_dict(), momentum, vars(state))


def settle(run: Run, saver: Saver) -> None:
    """Wait until what was saved is on disk.  Raises StorageFailure on rank 0 if it is not, Preempted on the others."""
    failure: Exception | None = None
    try:
        saver.settle()
    except (Problem, OSError) as problem:
        failure = problem
    if run.group.any(failure is not None):
        raise failure or Preempted("rank 0 could not save its checkpoint")
