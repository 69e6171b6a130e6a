"""Files that run code when the loader of their format reads them, to test that checkpoints are never read that way.

python tests/fakes/payloads.py DIRECTORY     writes and loads each kind; the sentinel it creates proves that it works
"""

import base64
import bz2
import functools
import gzip
import importlib.machinery
import importlib.util
import io
import json
import marshal
import os
import pickle
import runpy
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import joblib
import numpy as np
import torch
import torch.distributed.checkpoint
import yaml
from safetensors import safe_open
from safetensors.torch import save


@dataclass(frozen=True)
class Payload:
    """name: usual file name.  make(sentinel): the bytes.  load(path): the usual loader, which creates the sentinel."""

    name: str
    make: Callable[[Path], bytes]
    load: Callable[[Path], Any]


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def system(sentinel: Path) -> Call:
    return Call(os.system, f"touch {sentinel}")


def source(sentinel: Path) -> str:
    return f"import pathlib; pathlib.Path({str(sentinel)!r}).touch()"


def written(write: Callable[[io.BytesIO], Any]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def unpickle(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def persistent(sentinel: Path) -> bytes:
    """The call is in the name of an externally stored object; torch names its storages in this way."""

    class Elsewhere(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", system(sentinel)) if value == "tensor" else None

    return written(lambda file: Elsewhere(file, 2).dump(["tensor"]))


def load_persistent(path: Path) -> Any:
    class Elsewhere(pickle.Unpickler):
        def persistent_load(self, name: Any) -> Any:
            return name

    with open(path, "rb") as file:
        return Elsewhere(file).load()


def torchscript(sentinel: Path) -> bytes:
    class Restores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.path, self.size = str(sentinel), 0

        @torch.jit.export
        def __getstate__(self) -> tuple[str, bool]:
            return (self.path, self.training)

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]) -> None:
            self.path, self.training = state
            self.size = torch.from_file(state[0], True, 1).numel()  # creates the file

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images

    with warnings.catch_warnings(action="ignore"):  # deprecated, but still readable
        return written(lambda file: torch.jit.save(torch.jit.script(Restores()), file))


def tar(members: dict[str, bytes]) -> bytes:
    def write(file: io.BytesIO) -> None:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    return written(write)


def extract(path: Path) -> None:
    inside = path.parent / "a" / "b"
    inside.mkdir(parents=True)
    with tarfile.open(path) as archive:
        archive.extractall(inside, filter="fully_trusted")


def zipped(members: dict[str, bytes]) -> bytes:
    def write(file: io.BytesIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)

    return written(write)


def unzip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return pickle.loads(archive.read("data.pkl"))


def bytecode(sentinel: Path) -> bytes:
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(compile(source(sentinel), "module", "exec"))


def metadata(sentinel: Path) -> bytes:
    text = base64.b64encode(pickle.dumps(system(sentinel))).decode()
    return save({"features.0.weight": torch.zeros(1)}, {"optimizer": text})


def read_metadata(path: Path) -> Any:
    with safe_open(path, "pt") as file:
        return pickle.loads(base64.b64decode(file.metadata()["optimizer"]))


def torch_load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def read_folder(path: Path) -> Any:
    """Read .metadata, the first file that torch.distributed reads of a sharded checkpoint."""
    return torch.distributed.checkpoint.FileSystemReader(path.parent).read_metadata()


PAYLOADS = {
    "pickle protocol 0": Payload("a.pkl", lambda s: pickle.dumps(system(s), 0), unpickle),
    "pickle protocol 2, exec": Payload("a.pkl", lambda s: pickle.dumps(Call(exec, source(s)), 2), unpickle),
    "pickle protocol 4, eval": Payload(
        "a.pickle", lambda s: pickle.dumps(Call(eval, f"open({str(s)!r}, 'w').close()"), 4), unpickle
    ),
    "pickle protocol 5, subprocess": Payload(
        "a.bin", lambda s: pickle.dumps(Call(subprocess.check_call, ["touch", str(s)]), 5), unpickle
    ),
    "pickle by the instruction INST": Payload("a.p", lambda s: f"(S'touch {s}'\nios\nsystem\n.".encode(), unpickle),
    "pickle with persistent names": Payload("a.pkl", persistent, load_persistent),
    "torch.save": Payload("a.pt", lambda s: written(lambda f: torch.save({"model": system(s)}, f)), torch_load),
    "torch.save before 1.6": Payload(
        "a.pth",
        lambda s: written(lambda f: torch.save(system(s), f, _use_new_zipfile_serialization=False)),
        torch_load,
    ),
    "torch.save before 0.1.10": Payload(
        "a.pth.tar",
        lambda s: tar(dict.fromkeys(("storages", "tensors", "pickle"), pickle.dumps(system(s), 2))),
        torch_load,
    ),
    "TorchScript": Payload("a.ts", torchscript, torch.jit.load),
    "torch.distributed.checkpoint": Payload(".metadata", lambda s: pickle.dumps(system(s)), read_folder),
    "numpy objects": Payload(
        "a.npy",
        lambda s: written(lambda f: np.save(f, np.array([system(s)], dtype=object), allow_pickle=True)),
        functools.partial(np.load, allow_pickle=True),
    ),
    "numpy archive": Payload(
        "a.npz",
        lambda s: written(lambda f: np.savez(f, momentum=np.array([system(s)], dtype=object))),
        lambda path: np.load(path, allow_pickle=True)["momentum"],
    ),
    "joblib": Payload("a.joblib", lambda s: written(lambda f: joblib.dump({"weights": system(s)}, f)), joblib.load),
    "cloudpickle": Payload("a.pkl", lambda s: cloudpickle.dumps(Call(lambda: os.system(f"touch {s}"))), unpickle),
    "marshal": Payload(
        "a.marshal",
        lambda s: marshal.dumps(compile(source(s), "state", "exec")),
        lambda path: exec(marshal.loads(path.read_bytes())),
    ),
    "bytecode": Payload(
        "a.pyc",
        bytecode,
        lambda path: exec(importlib.machinery.SourcelessFileLoader("a", str(path)).get_code("a")),
    ),
    "gzip of pickle": Payload(
        "a.pkl.gz",
        lambda s: gzip.compress(pickle.dumps(system(s))),
        lambda path: pickle.loads(gzip.decompress(path.read_bytes())),
    ),
    "bzip2 of pickle": Payload(
        "a.pkl.bz2",
        lambda s: bz2.compress(pickle.dumps(system(s))),
        lambda path: pickle.loads(bz2.decompress(path.read_bytes())),
    ),
    "zip of pickle": Payload("a.zip", lambda s: zipped({"data.pkl": pickle.dumps(system(s))}), unzip),
    "tar with names outside the folder": Payload("a.tar", lambda s: tar({f"../../{s.name}": b""}), extract),
    "YAML with Python's tags": Payload(
        "a.yaml",
        lambda s: f"!!python/object/apply:os.system ['touch {s}']\n".encode(),
        lambda path: yaml.unsafe_load(path.read_text()),
    ),
    "Python": Payload("conftest.py", lambda s: source(s).encode(), lambda path: runpy.run_path(str(path))),
    "pickle in the header of safetensors": Payload("a.safetensors", metadata, read_metadata),
}


def main(directory: Path) -> None:
    """Print a JSON list of the kinds that work."""
    working = []
    for number, (kind, payload) in enumerate(PAYLOADS.items()):
        folder = directory / str(number)
        folder.mkdir(parents=True)
        sentinel = folder / "sentinel"
        (folder / payload.name).write_bytes(payload.make(sentinel))
        assert not sentinel.exists(), f"{kind}: it ran before it was loaded"
        try:
            payload.load(folder / payload.name)
        except Exception as error:  # most loaders fail, but only after the call
            print(f"{kind}: {error!r}", file=sys.stderr)
        if sentinel.exists():
            working.append(kind)
    print(json.dumps(working))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
