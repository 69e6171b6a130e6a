"""A file of weights, recognised by its content."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from vgg.network.trained import Trained
from vgg.weights import caffe, hdf5, keras, torch_files
from vgg.weights.content import MAX_BYTES, Content, unusable

KNOWN = "torch's .pth (torchvision), .safetensors (timm, ours), .h5 (Keras), .caffemodel (Oxford), a checkpoint of ours"
FOREIGN = {  # first bytes of what people take for a file of weights: what to do
    rb"version https://git-lfs": "a pointer of Git LFS, not the file. Fetch it: git lfs pull",
    rb"\s*<(!DOCTYPE|html|\?xml)": "a page of text, perhaps of an error. Download the file again.",
    rb"\x80[\x02-\x05]": "a pickle, which could run code. Save the tensors: torch.save(model.state_dict(), …).",
    # ir_version, then a field of ModelProto; a .caffemodel begins with field 1 as text
    rb"\x08[\x01-\x0f][\x12\x1a\x22\x2a\x32\x3a\x42]": "ONNX, which is not read. Import what it was made from.",
    rb"\x93NUMPY": f"a NumPy array, not the tensors of a network by name. Known are {KNOWN}.",
}


@dataclass(frozen=True)
class Source:
    """A file, or a folder of one of our checkpoints.  size: bytes.  sha256: of a checkpoint, that of its weights."""

    path: Path
    size: int
    sha256: str
    content: Content


def read(path: Path) -> Source:
    """Raises BadData if the file is none of KNOWN, damaged, not finite or not a VGG.

    Raises Refused for a damaged checkpoint.
    """
    if path.is_dir():
        return _checkpoint(path)
    with open(path, "rb") as file:
        start = file.read(64)
        size = file.seek(0, 2)
        if not size:
            raise unusable(path, "is empty. Download it again.")
        if size > MAX_BYTES:
            raise unusable(path, f"has {size:,} bytes; a VGG has at most {MAX_BYTES:,}. This is another file.")
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    # the names of files of torch.hub contain the first digits of their sha256
    if (digits := re.search(r"-([0-9a-f]{8})\.pth$", path.name)) and not sha256.startswith(digits[1]):
        raise unusable(path, f"damaged: its name says sha256 {digits[1]}…, it has {sha256[:8]}…. Download it again.")
    return Source(path, size, sha256, _content(path, start, size, sha256))


def _content(path: Path, start: bytes, size: int, sha256: str) -> Content:
    if hdf5.is_hdf5(start):
        return keras.read(path)
    if start.startswith((torch_files.ARCHIVE, torch_files.LEGACY)):
        return torch_files.read_pth(path, sha256)
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        return torch_files.read_safetensors(path, sha256)
    if caffe.is_network(start):
        return caffe.read(path)
    for kind, reason in FOREIGN.items():
        if re.match(kind, start):
            raise unusable(path, reason)
    raise unusable(path, f"not recognised: begins with {start[:8].hex(' ')}. Known are {KNOWN}.")


def _checkpoint(path: Path) -> Source:
    trained = Trained.open(path)
    metadata = trained.manifest
    network = trained.network()
    content = Content(
        "checkpoint", network.state_dict(), network.architecture, metadata["pixels"], trained.directory.name,
        metadata["classes"], origin=metadata["run"],
    )  # fmt: skip
    return Source(path, sum(entry["size"] for entry in metadata["files"]), trained.weights_sha256, content)
