"""A checkpoint directory made of other people's weights, which evaluation, registration and training take like ours.

Nothing is made up: it has no parameters of a training, no curves, no momentum.  Its run record says "imported", and
from what.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from runtime import checkpoint, manifest
from runtime.errors import BadData, WrongParameters
from runtime.shards.shardset import ShardSet
from vgg.network.init import initialise
from vgg.network.model import VGG, Architecture, blank
from vgg.network.trained import Trained, shapes_of
from vgg.weights import published
from vgg.weights.content import FIRST
from vgg.weights.recognise import Source
from vgg.weights.torch_files import ASSUMED
from vgg.weights.wnids import ILSVRC2012

STEP = 0  # no updates were made here
SEED = 0  # of a new classifier
NEW_CLASSIFIER = "drawn: N(0, 0.01), biases 0; initial weights, not a classifier"
Classes = list[dict[str, Any]]


def read_classes(path: Path) -> Classes:
    """From a text file: a line for every output, the WNID and, after a space, the name.  Raises BadData."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BadData(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    rows = [line.split(maxsplit=1) for line in lines]
    if not rows or not all(rows):
        raise BadData(f"{path}: {'is empty' if not rows else 'has an empty line'}. Write a WNID and a name a line.")
    if len({row[0] for row in rows}) < len(rows):
        raise BadData(f"{path}: a WNID is there twice. Write one line for every output of the network.")
    return [{"wnid": row[0], "name": row[-1].strip()} for row in rows]


def classes_of(source: Source, given: Classes | None, shards: ShardSet | None, new_classifier: bool) -> Classes:
    """The classes of the outputs.

    given: by the user.  shards: those the network will be used with.  Networks with 1000 outputs are taken for those
    of ILSVRC-2012, unless the file or the user says otherwise.
    Raises WrongParameters if nobody says which they are; BadData if their number, or those of the shards, differ.
    """
    outputs = source.content.architecture.num_classes
    classes = given
    if classes is None and not new_classifier:
        classes = source.content.classes or (ilsvrc2012() if outputs == len(ILSVRC2012) else None)
    if classes is None and shards:
        classes = list(shards.manifest["classes"])
    if classes is None:
        what = "gets a new classifier" if new_classifier else f"has {outputs:,} outputs and does not say which"
        raise WrongParameters(
            f"{source.path}: {what}. Give the classes: --shards data/shards, or --classes FILE with a WNID a line."
        )
    if not new_classifier and len(classes) != outputs:
        raise BadData(
            f"{source.path}: has {outputs:,} outputs, but there are {len(classes):,} classes. For other classes import "
            "it as initial weights: --new-classifier."
        )
    if shards and [c["wnid"] for c in classes] != shards.wnids:
        raise BadData(
            f"{source.path}: its outputs are other classes than those of {shards.address} "
            f"({classes[0]['wnid']} …, {shards.wnids[0]} …). Shard its classes; if its outputs are in another order, "
            "give them: --classes FILE; or import it as initial weights: --new-classifier."
        )
    return classes


def ilsvrc2012() -> Classes:
    return [{"wnid": wnid, "name": name} for wnid, name in zip(ILSVRC2012, published.class_names(), strict=True)]


def with_pixels(source: Source, pixels: str) -> Source:
    """A file that does not say how pixels are prepared, with what the user says: "torchvision" or "caffe".

    Raises WrongParameters if the file is known to be prepared in one way.
    """
    content = source.content
    if ASSUMED not in content.notes:
        raise WrongParameters(f"{source.path}: how its pixels are prepared is known; leave --pixels out.")
    content = replace(content, notes=[note for note in content.notes if note != ASSUMED])
    if pixels == "caffe":
        first = {FIRST: published.reversed_channels(source.path, content.tensors)}
        content = replace(content, tensors={**content.tensors, **first}, pixels=published.OXFORD)
    return replace(source, content=content)


def without_classifier(source: Source) -> Source:
    """The convolutions alone."""
    content = source.content
    kept = {name: tensor for name, tensor in content.tensors.items() if name.startswith("features.")}
    features = replace(content.architecture, num_classes=0)
    return replace(source, content=replace(content, tensors=kept, architecture=features, origin=None))


def write(directory: Path, source: Source, classes: Classes) -> Trained:
    """Write the checkpoint directory; without a classifier in the source, a new one is drawn.

    Raises StorageFailure when the disk is full.
    """
    content = source.content
    metadata = describe(source, classes)
    tensors = dict(content.tensors)
    if not content.has_classifier:
        tensors = {**_new_classifier(Architecture(**metadata["network"])), **tensors}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    checkpoint.save(directory, STEP, tensors, {}, {"step": STEP}, metadata)
    return Trained.finish(directory, STEP, STEP, metadata)


def describe(source: Source, classes: Classes) -> dict[str, Any]:
    """The metadata of the checkpoint."""
    content = source.content
    network = replace(content.architecture, num_classes=len(classes))
    record = {
        "file": source.path.name,
        "size": source.size,
        "sha256": source.sha256,
        "kind": content.kind,
        "weights": content.name,
        "classifier": "as in the file" if content.has_classifier else NEW_CLASSIFIER,
        "notes": content.notes,
        "ceil_pooling": content.ceil_pooling,
    }
    if content.origin is not None:
        record["origin"] = content.origin
    return {
        "run": {
            "source": "imported",
            "imported": record,
            "data": {"classes_sha256": manifest.digest_of([c["wnid"] for c in classes])},
        },
        "network": network.as_dict(),
        "pixels": content.pixels,
        "classes": classes,
        "versions": {"torch": torch.__version__},
    }


def expect_place(directory: Path, metadata: dict[str, Any], address: str) -> Trained | None:
    """The checkpoint there, if it is the same import; None if the directory is free.

    address: of the directory, for the message.  Raises WrongParameters if it holds anything else.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    if (directory / manifest.NAME).is_file():
        found = Trained.open(directory)
        same = {name: found.manifest[name] for name in ("run", "network", "pixels", "classes")}
        if same == {name: metadata[name] for name in same}:
            return found
    elif directory.is_dir() and _is_unfinished_import(directory):
        return None
    raise WrongParameters(f"--as {address}: is there already, and holds something else. Name a new folder.")


def _is_unfinished_import(directory: Path) -> bool:
    """Whether it holds what a killed import leaves."""
    names = {path.name for path in directory.iterdir()}
    step = checkpoint.step_name(STEP)
    if not names <= {step, f"{step}.tmp", f"{step}.old"}:
        return False
    if step not in names:
        return True
    return bool(checkpoint.open_step(directory, STEP, shapes_of).metadata["run"].get("source") == "imported")


def _new_classifier(architecture: Architecture) -> dict[str, torch.Tensor]:
    model: VGG = blank(architecture)
    initialise(model, "normal", SEED)
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith("classifier.")}
