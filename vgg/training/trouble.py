"""Saves a batch whose loss or gradient was not finite, with the weights, and analyses it.

python -m vgg.training.trouble FOLDER reports the first layer with values that are not finite, in the precision of the
run and in fp32.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from runtime import manifest
from runtime.checkpoint import read_tensors
from runtime.commandline import Parser
from runtime.errors import Problem, Refused
from runtime.shards.batches import Crops
from runtime.shards.loader import Loader
from runtime.shards.shardset import Split
from runtime.wording import counted, listing, print_in_every_locale
from vgg.data.augment import Prepare
from vgg.data.stream import training_batches
from vgg.network.model import Architecture, blank
from vgg.training.run import Run

SCHEMA = "vgg.trouble/1"


def save_batch(run: Run, split: Split, step: int, directory: Path) -> tuple[str, list[str]]:
    """Write the global batch, weights and momentum before its update to <directory>.trouble/step-….

    The batch is loaded again; it is a function of (seed, step) for any number of ranks.
    Returns the folder, or a message if it could not be written, and the images.
    """
    params = run.params
    crops = next(training_batches(Loader(), split, params, range(step, step + 1), run.objective.training_crops))
    images = [split.where(int(number)) for number in crops.numbers]
    folder = manifest.sibling(directory, ".trouble") / f"step-{step:08d}"
    metadata = {
        "step": step,
        "learning_rate": run.schedule.rate(step),
        "train": params.model_dump(mode="json"),
        "network": run.model.architecture.as_dict(),
        "pixels": {"mean": run.prepare.mean.tolist(), "std": run.prepare.std.tolist()},
        "precision": str(run.precision).removeprefix("torch."),
        "images": images,
    }
    tensors = {
        "batch": crops._asdict(),
        "weights": dict(run.model.state_dict()),
        "momentum": run.momentum(),
    }
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, named in tensors.items():
            save_file({key: t.detach().cpu().contiguous() for key, t in named.items()}, folder / f"{name}.safetensors")
        entries = [manifest.file_entry(folder, f"{name}.safetensors", md5=False) for name in tensors]
        manifest.write(folder, SCHEMA, metadata, entries)
    except Exception as error:  # the caller reports a more important error
        return f"({folder} could not be written: {error})", images
    return str(folder), images


def stop_if_not_finite(run: Run, split: Split, directory: Path) -> None:
    """Raises Refused if a loss or gradient was not finite, naming step, learning rate and images.

    No rank has made that update.  The batch and the weights are saved in <directory>.trouble.
    """
    step = int(run.trouble_step)
    if step < 0:
        return
    saved = save_batch(run, split, step, directory) if run.group.is_first else None
    folder, images = next(found for found in run.group.gather(saved) if found)
    raise Refused(
        f"step {step}: loss or gradient is not finite (learning rate {run.schedule.rate(step):g}). No update was made; "
        f"the last checkpoint is good. Lower train.learning_rate or lengthen the warm-up. {folder} contains the batch "
        f"and the weights (analyse it with: python -m vgg.training.trouble {folder}). The batch:\n{listing(images)}",
        images,
    )


def replay(folder: Path) -> str:
    """Repeat the forward and backward pass of a saved batch on the CPU.

    Returns a report: the loss and the first layer whose output or gradient is not finite.  Raises Refused if the folder
    is damaged.
    """
    metadata = manifest.read(folder, SCHEMA)
    for entry in metadata["files"]:
        manifest.verify_file(folder, entry)
    crops = Crops(**read_tensors(folder / "batch.safetensors"))
    precisions = dict.fromkeys((metadata["precision"], "float32"))
    lines = [
        f"step {metadata['step']}, learning rate {metadata['learning_rate']:g}, {counted(len(crops.images), 'image')}"
    ]
    lines += [f"{name}: {_pass(folder, metadata, crops, getattr(torch, name))}" for name in precisions]
    return "\n".join(lines)


def _pass(folder: Path, metadata: dict[str, Any], crops: Crops, precision: torch.dtype) -> str:
    model = blank(Architecture(**metadata["network"]), metadata["train"]["dropout"])
    weights = read_tensors(folder / "weights.safetensors")
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            return f"weights are not finite, first {name}"
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise Refused(f"{folder}: the weights do not fit the network: {str(error).splitlines()[-1].strip()}") from None
    found: list[str] = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(_watch(name, found))
    prepare = Prepare(metadata["pixels"]["mean"], metadata["pixels"]["std"], metadata["train"]["colour_shift"])
    inputs = prepare(crops.images, crops.flip, crops.colour)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        scores = model(inputs, crops.dropout).float()
    loss = functional.cross_entropy(scores, crops.labels)
    loss.backward()  # type: ignore[no-untyped-call]
    if found:
        return f"loss {loss.item():g}; first output that is not finite: {found[0]}"
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, gradient in reversed(gradients.items()) if not torch.isfinite(gradient).all()]
    largest = max(gradients, key=lambda name: float(gradients[name].abs().nan_to_num(torch.inf).max()))
    if bad:
        what = f"all outputs are finite; first gradient that is not finite: {bad[0]}"
    elif not torch.isfinite(nn.utils.get_total_norm(list(gradients.values()))):
        what = f"all values are finite, but the norm of the gradient is not; largest gradient: {largest}"
    else:
        what = "all outputs and gradients are finite"
    return f"loss {loss.item():g}; {what}"


def _watch(name: str, found: list[str]) -> Any:
    def look(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if not torch.isfinite(output).all():
            found.append(name)

    return look


if __name__ == "__main__":
    print_in_every_locale()
    what = "Report the first layer with values that are not finite, in the precision of the run and in fp32."
    flags = Parser("vgg.training.trouble", what)
    flags.add_argument("folder", type=Path, help="saved by a training that stopped, which names it")
    try:
        print(replay(flags.parse_args().folder))
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
