"""Files of tensors: .pth of torch (torchvision's), and safetensors (timm's, or our own).

A .pth file is a pickle.  It is read with weights_only, which builds tensors and plain containers and refuses
everything else, so that nothing in the file runs.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open

from runtime.checkpoint import read_tensors
from vgg.network.model import Architecture
from vgg.weights import published
from vgg.weights.content import (
    LAYERS,
    MAX_BYTES,
    Content,
    Tensors,
    architecture_of,
    checked,
    complete,
    expect_finite,
    unusable,
    without_invalid_classifier,
)

EXPORT_SCHEMA = "vgg.export/1"
METADATA = "vgg"  # key of our description in the metadata of both formats
TIMM = {"pre_logits.fc1": LAYERS[0], "pre_logits.fc2": LAYERS[1], "head.fc": LAYERS[2]}
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # first bytes of torch.save before version 1.6
ARCHIVE = b"PK\x03\x04"  # since then
STATES = ("state_dict", "model", "model_state_dict")  # names of the tensors in checkpoints of trainings
WRAPPED = re.compile(r"(?<![^.])(?:(?:module|_orig_mod)\.)+")  # of DataParallel and torch.compile, in names
MAX_ENTRIES = 10_000  # of the zip archive in a .pth file
ASSUMED = (
    "the file does not say how pixels are prepared: that of torchvision was assumed (mean 0.485 0.456 0.406, standard "
    "deviation 0.229 0.224 0.225 of R, G, B in 0-1). If it was made from the Oxford release: --pixels caffe."
)


class Description(BaseModel, strict=True, extra="forbid"):
    """Our description of a network in a file that we exported."""

    schema_: str = Field(alias="schema", pattern=f"^{EXPORT_SCHEMA}$")
    network: dict[str, Any]
    pixels: dict[str, Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)]]
    classes: list[dict[str, Any]]
    weights_sha256: str
    run: dict[str, Any]


def read_pth(path: Path, sha256: str) -> Content:
    """A state_dict that torch.save has written.  Raises BadData."""
    with open(path, "rb") as file:
        archive = file.read(len(ARCHIVE)) == ARCHIVE
    if archive:
        _expect_plain_archive(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # about damaged pickles, which are refused below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes provoke: UnpicklingError, EOFError, RuntimeError, KeyError …
        raise unusable(path, _why(error)) from None
    if isinstance(loaded, dict) and not _is_state(loaded):  # the checkpoint of a training
        inside = [loaded[name] for name in STATES if _is_state(loaded.get(name))]
        loaded = inside[0] if len(inside) == 1 else loaded
    if not _is_state(loaded):
        named = isinstance(loaded, dict) and all(isinstance(name, str) for name in loaded)
        what = f"a {type(loaded).__name__}" + (f" with {', '.join(map(repr, [*loaded][:5]))}" if named else "")
        raise unusable(path, f"holds {what}, not the tensors of a network by name. Save model.state_dict().")
    metadata = getattr(loaded, "_metadata", {})
    own = metadata.get("", {}).get(METADATA) if isinstance(metadata, dict) else None
    return _content(path, dict(loaded), own, sha256)


def _is_state(loaded: Any) -> bool:
    """Whether these are tensors by name."""
    return (
        isinstance(loaded, dict)
        and bool(loaded)
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in loaded.items())
    )


def read_safetensors(path: Path, sha256: str) -> Content:
    """timm's or torchvision's tensors, or a network that we exported.  Raises BadData."""
    try:
        with safe_open(path, "pt") as opened:
            own = (opened.metadata() or {}).get(METADATA)
        tensors = read_tensors(path)
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, OSError):
            raise
        raise unusable(path, f"not a safetensors file, or damaged ({error}). Download it again.") from None
    return _content(path, tensors, own, sha256)


def _content(path: Path, tensors: Tensors, own: Any, sha256: str) -> Content:
    tensors = checked(path, tensors)
    if own is not None:
        return _exported(path, tensors, own)
    plain = {WRAPPED.sub("", name): tensor for name, tensor in tensors.items()}
    tensors = plain if len(plain) == len(tensors) else tensors
    known, notes, kind = published.by_sha256(sha256), [], "torchvision"
    if any(name.startswith("head.fc.") for name in tensors):
        kind, tensors = "timm", _from_timm(path, tensors)
    elif known is None:
        notes = [ASSUMED]
    tensors = complete(tensors if known and known.classifies else without_invalid_classifier(tensors))
    if known and not known.classifies:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
    expect_finite(path, tensors)
    pixels, name = (known.pixels, known.name) if known else (published.IMAGENET, "")
    return Content(kind, tensors, architecture_of(path, tensors), pixels, name, notes=notes)


def _from_timm(path: Path, tensors: Tensors) -> Tensors:
    """fc6 and fc7 are convolutions there."""
    found = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer in TIMM and part == "weight" and tensor.dim() == 4:
            side = tensor.shape[-1]
            if tensor.shape[-2] != side or (layer != "pre_logits.fc1" and side != 1):
                raise unusable(path, f"{name} has the shape {tuple(tensor.shape)}: not the layout of timm.")
            tensor = tensor.flatten(1)
        found[f"{TIMM.get(layer, layer)}.{part}"] = tensor
    return found


def _exported(path: Path, tensors: Tensors, own: Any) -> Content:
    """A network that we exported.  own: our description, JSON."""
    try:
        described = Description.model_validate(json.loads(str(own)))
        network = Architecture(**described.network)
    except (ValidationError, TypeError, ValueError, RecursionError) as error:
        raise unusable(path, f"its description is damaged ({str(error).splitlines()[0]}). Export it again.") from None
    expect_finite(path, tensors)
    found = architecture_of(path, tensors, network.configuration)
    if found != network or len(described.classes) != network.num_classes or {*described.pixels} != {"mean", "std"}:
        raise unusable(path, f"its description says {network}, its tensors are of {found}. Export it again.")
    return Content(
        "export", tensors, network, described.pixels, f"weights {described.weights_sha256}", described.classes,
        origin=described.run,
    )  # fmt: skip


def _expect_plain_archive(path: Path) -> None:
    """Raises BadData for a damaged archive, or one that torch does not write (compressed, it could grow)."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _expect_stored(path, entries)
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise unusable(path, f"a damaged archive ({error}). Download it again.") from None
    if damaged:
        raise unusable(path, f"damaged: {damaged} in it does not have its checksum. Download it again.")


def _expect_stored(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    if len(entries) > MAX_ENTRIES or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise unusable(path, "not an archive of torch.save: too many, or compressed, files.")
    if (size := sum(entry.file_size for entry in entries)) > MAX_BYTES:
        raise unusable(path, f"holds {size:,} bytes; a VGG has at most {MAX_BYTES:,}.")


def _why(error: Exception) -> str:
    """What torch.load says, in a line."""
    if found := re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", str(error)):
        return (
            f"holds Python objects besides tensors ({found[1] or found[2]}). Loading those could run code, so the "
            "file is refused. Save model.state_dict() instead."
        )
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    first = next(iter(text.strip().splitlines()), "") or type(error).__name__
    return f"damaged, or not a file of tensors ({first[:200]}). Download it again."
