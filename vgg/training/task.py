"""What is to be trained, and how a run of it begins: fresh, from a checkpoint, or finished already."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from runtime import checkpoint
from runtime.distributed import Group
from runtime.errors import Preempted, Refused
from runtime.shards.shardset import ShardSet, Split
from runtime.wording import some
from vgg.data import roi
from vgg.network.model import Architecture
from vgg.network.precision import precision_on
from vgg.network.trained import Trained, shapes_of
from vgg.params.train import TrainParams
from vgg.training.objective import Classification, Objective

log = logging.getLogger("vgg.train")


@dataclass
class State:
    """The state of a training besides tensors.  Every field is exact in JSON."""

    step: int = 0
    validated_step: int = 0  # the step of the last validation, so that a restart does not repeat it
    best_step: int = 0
    best_error: float = 1.0
    window: list[float] = field(default_factory=lambda: [0.0] * 4)  # counts since the last point of the curves
    epoch: list[float] = field(default_factory=lambda: [0.0] * 4)  # counts since the last validation
    history: list[dict[str, float]] = field(default_factory=list)  # one row per epoch
    schedule: dict[str, Any] = field(default_factory=dict)
    samples: str = "0" * 16  # hex: digest of all (step, position in the batch, image), see samples_digest
    micro_batch_size: int = 0  # that was found to fit into memory; 0: no reduction was necessary


@dataclass(frozen=True, kw_only=True)
class Task:
    """A training: parameters, data, and the directory of its checkpoints.

    initial: initial weights, for init 'shallower' and 'checkpoint'.  code: fingerprint of every file that influences
    the result; a run is not continued with other code unless accept_code_change is set.  objective: what is minimised.
    """

    params: TrainParams
    shards: ShardSet
    directory: Path
    code: dict[str, str]
    initial: Trained | None = None
    accept_code_change: bool = False
    objective: Objective = field(default_factory=Classification)

    def split(self, name: str) -> Split:
        """The images of a split that the objective uses."""
        return self.objective.split(self.shards, name)


@dataclass(frozen=True)
class Fresh:
    """A run starts at step 0."""


@dataclass(frozen=True)
class Continue:
    """A run continues from a checkpoint."""

    step: checkpoint.Step


@dataclass(frozen=True)
class Finished:
    """The run is already finished."""

    trained: Trained


FoundRun = Fresh | Continue | Finished


def describe(task: Task, device: torch.device) -> dict[str, Any]:
    """The metadata of a checkpoint: the inputs of the run, and what is needed to use the network."""
    params, shards = task.params, task.shards
    network = Architecture(
        params.configuration, params.batch_norm, params.classifier_width, task.objective.num_outputs(shards),
        params.input_size,
    )  # fmt: skip
    run = {
        "train": params.model_dump(mode="json"),
        "data": {"digest": shards.digest, "classes_sha256": shards.classes_sha256},
        "initial": task.initial.weights_sha256 if task.initial else None,
        "precision": str(precision_on(params.precision, device)).removeprefix("torch."),
        "code": task.code,
        **task.objective.described(network),
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
    """Raises Refused unless state.json is a State.  With accept_code_change fields may be missing."""
    path, known = step.path / "state.json", vars(State()).keys()
    wrong = (step.state.keys() - known) | (set() if accept_code_change else known - step.state.keys())
    try:
        TypeAdapter(State).validate_json(json.dumps(step.state), strict=True)
    except ValidationError as error:
        wrong |= {".".join(map(str, problem["loc"])) for problem in error.errors()}
    if wrong:
        fields = ", ".join(sorted(wrong))
        raise Refused(f"{path}: not the state of a training: {fields}. {checkpoint.NOT_OURS}")


def find_run(directory: Path, metadata: dict[str, Any], accept_code_change: bool, group: Group) -> FoundRun:
    """Whether the run starts at step 0, continues from a checkpoint, or is finished.  metadata: from describe().

    A finished run with other inputs is moved to <directory>.previous; checkpoints that are newer than the one to
    continue from are moved to <directory>.refused.  Raises Refused for an unfinished run with other parameters, data or
    code, so that no work is lost.  Raises Preempted if ranks find different checkpoints.
    """
    if (directory / "manifest.json").exists():
        finished = Trained.open(directory)
        changes = list(checkpoint.differences(finished.manifest["run"], metadata["run"]))
        group.barrier()  # before rank 0 moves the directory, all ranks must have read it
        if changes and group.is_first:
            target = checkpoint.move_finished(directory)
            log.warning("%s: finished run with other inputs (%s), moved to %s", directory, changes[0], target)
        elif not changes:
            expect_state(finished.step, accept_code_change=False)
        group.barrier()
        return Fresh() if changes else Finished(finished)
    if group.is_first:
        checkpoint.recover(directory)
    group.barrier()

    def differs(step: checkpoint.Step) -> list[str]:
        there, here = ({**a["run"], "network": a["network"]} for a in (step.metadata, metadata))
        if accept_code_change:
            there["code"] = here["code"]
        changes = list(checkpoint.differences(there, here))
        if not changes:
            expect_state(step, accept_code_change)
        return changes

    earlier = checkpoint.newest(directory, shapes_of, differs)
    found = group.gather(earlier.step if earlier else None)  # also a barrier before rank 0 moves checkpoints
    if len(set(found)) > 1:
        steps = some(sorted(set(map(str, found))))
        raise Preempted(  # not Refused: the storage may have been unavailable for a moment
            f"{directory}: rank {group.rank} finds another newest checkpoint than rank 0 (steps {steps}). All nodes "
            "need the same storage, a shared volume or s3://. If they have it, run again."
        )
    if earlier is None:
        return Fresh()
    if group.is_first:
        checkpoint.move_later(directory, earlier.step)
    for changed in checkpoint.differences(earlier.metadata["run"].get("code"), metadata["run"]["code"]):
        log.warning("continuing with changed code: %s", changed)
    if earlier.metadata["versions"] != metadata["versions"]:
        log.warning("versions differ from the checkpoint's (%s): results may differ", earlier.metadata["versions"])
    return Continue(earlier)


def share_of(params: TrainParams, num_ranks: int) -> int:
    """Maximum number of images of a global batch that one rank computes."""
    return -(-params.batch_size // num_ranks)
