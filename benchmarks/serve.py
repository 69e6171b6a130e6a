"""The served model beside plain torchvision code, each in a real `mlflow models serve`: python -m benchmarks.serve

Both are VGG-16 of one size with random weights, one view of square JPEGs.  The peer is what tutorials write: decode,
Resize, CenterCrop, ToTensor, Normalize, one batch of everything in the request.  Requests are base64 JSON on loopback.
Measured: requests one after the other; 100 at once; one of 1,000 images; 44 at once to a server of 8 processes; a
photograph of 24 megapixels; two bombs (PNGs of some kilobytes that are huge, or a line).  Memory is the peak of the
server's processes above what they had before.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import requests
from PIL import Image

from benchmarks import machine

NUM_CLASSES, WIDTH = 10, 512
TIMEOUT_SECONDS = 300
CLIENT_SECONDS = TIMEOUT_SECONDS + 10  # the server's answer, also that it took too long
PIXELS = {"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}
PEER = """
import io, json, mlflow, torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision import transforms
from torchvision.models import vgg16

class Plain(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        size, width, classes, mean, std = json.load(open(context.artifacts["network"]))
        self.model = vgg16(num_classes=classes)
        self.model.avgpool = nn.Identity()
        self.model.classifier[0] = nn.Linear(512 * (size // 32) ** 2, width)
        self.model.classifier[3] = nn.Linear(width, width)
        self.model.classifier[6] = nn.Linear(width, classes)
        self.model.load_state_dict(load_file(context.artifacts["weights"]))
        self.model.eval()
        self.transform = transforms.Compose([
            transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor(),
            transforms.Normalize([m / 255 for m in mean], [s / 255 for s in std]),
        ])

    def predict(self, context, model_input, params=None):
        images = [self.transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in model_input["image"]]
        with torch.inference_mode():
            probabilities = self.model(torch.stack(images)).softmax(1)
        best = probabilities.topk(5)
        return [{"classes": c.tolist(), "probabilities": p.tolist()} for p, c in zip(best.values, best.indices)]

mlflow.models.set_model(Plain())
"""


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.serve", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--json", action="store_true", help="print figures as JSON, a line each as they are measured")
    flags.add_argument("--input-size", type=int, default=32, help="pixels (default 32)")
    flags.add_argument("--many", type=int, default=1000, help="images of the large request (default 1000)")
    args = flags.parse_args()
    figures = machine.Figures(args.json)
    figures.add(machine=machine.describe(), input_size=args.input_size, load=round(os.getloadavg()[0], 1))
    with tempfile.TemporaryDirectory() as folder:
        models = save(Path(folder), args.input_size)
        for name, model in models.items():
            figures.add(**{name: measure(model, args.input_size, args.many)})
    if not args.json:
        print(report(figures))


def save(folder: Path, size: int) -> dict[str, Path]:
    """Both models as MLflow keeps them, with the same weights."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from safetensors.torch import save_file

    from components.register.version.model import arguments
    from vgg.network.init import initialise
    from vgg.network.model import Architecture, blank
    from vgg.params.evaluate import at_one_scale

    architecture = Architecture("D", False, WIDTH, NUM_CLASSES, size)
    network = blank(architecture)
    initialise(network, "kaiming", 1)
    weights = folder / "weights.safetensors"
    save_file(network.state_dict(), weights)
    description = {
        "network": architecture.as_dict(),
        "pixels": PIXELS,
        "classes": [{"wnid": f"n{n}", "name": f"class {n}"} for n in range(NUM_CLASSES)],
        "evaluate": at_one_scale(size, flip=False).model_dump(),
        "max_pixels": 50_000_000,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }  # fmt: skip
    (folder / "network.json").write_text(json.dumps(description), encoding="utf-8")
    (folder / "plain.json").write_text(json.dumps([size, WIDTH, NUM_CLASSES, *PIXELS.values()]), encoding="utf-8")
    (folder / "plain.py").write_text(PEER, encoding="utf-8")
    ours = {"weights": str(weights), "network": str(folder / "network.json")}
    with warnings.catch_warnings(action="ignore"):
        mlflow.pyfunc.save_model(folder / "ours", **arguments(ours, jpeg(size, 0)))
        mlflow.pyfunc.save_model(
            folder / "plain",
            python_model=str(folder / "plain.py"),
            artifacts={"weights": str(weights), "network": str(folder / "plain.json")},
            signature=ModelSignature(Schema([ColSpec(DataType.binary, "image")])),
            pip_requirements=[],
        )
    return {"ours": folder / "ours", "plain": folder / "plain"}


def jpeg(size: int, seed: int, form: str = "JPEG") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise).resize((size + size // 4,) * 2, Image.Resampling.BICUBIC), form)


def encoded(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


class Server:
    """A running `mlflow models serve`."""

    def __init__(self, model: Path, workers: int, log: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local",
            "--host", "127.0.0.1", "--port", str(self.port), "--workers", str(workers),
            "--timeout", str(TIMEOUT_SECONDS),
        ]  # fmt: skip
        env = {**os.environ, "PYTHONPATH": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.child = subprocess.Popen(command, cwd=model, env=env, stdout=log, stderr=log, start_new_session=True)
        self.workers = workers

    def wait(self) -> None:
        """Until every process has loaded the model: it computes meanwhile, and would be measured too."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline and self.child.poll() is None:
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"http://127.0.0.1:{self.port}/ping", timeout=30).ok:
                    break
            time.sleep(0.2)
        time.sleep(1 if self.workers == 1 else 4 * self.workers)

    def end(self) -> None:
        if self.child.poll() is not None:
            return
        os.killpg(self.child.pid, signal.SIGTERM)
        try:
            self.child.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait(10)

    def ask(self, images: list[bytes]) -> tuple[int, float]:
        """Status and seconds of a request."""
        table = {"columns": ["image"], "data": [[base64.b64encode(image).decode()] for image in images]}
        started = time.monotonic()
        try:
            url = f"http://127.0.0.1:{self.port}/invocations"
            status = requests.post(url, json={"dataframe_split": table}, timeout=CLIENT_SECONDS).status_code
        except requests.RequestException:
            status = 0
        return status, time.monotonic() - started

    def at_once(self, requests_: list[list[bytes]]) -> dict[str, Any]:
        started = time.monotonic()
        with ThreadPoolExecutor(len(requests_)) as clients:
            answers = list(clients.map(self.ask, requests_))
        seconds = sorted(taken for _, taken in answers)
        return {
            "seconds": round(time.monotonic() - started, 2),
            "median": round(statistics.median(seconds), 2),
            "slowest": round(seconds[-1], 2),
            "failed": sum(status != 200 for status, _ in answers),
        }

    def alone(self, images: list[bytes]) -> dict[str, Any]:
        """One request: status, seconds, and MB above what the processes held before."""
        processes = [p for p in Path("/proc").iterdir() if p.name.isdecimal() and _group(p) == self.child.pid]
        for process in processes:
            with contextlib.suppress(OSError):
                (process / "clear_refs").write_text("5", encoding="ascii")
        before = sum(_memory(process, "VmRSS") for process in processes)
        status, seconds = self.ask(images)
        peak = sum(_memory(process, "VmHWM") for process in processes)
        return {"status": status, "seconds": round(seconds, 2), "mb": round(peak - before)}


def _group(process: Path) -> int | None:
    try:
        return os.getpgid(int(process.name))
    except OSError:
        return None


def _memory(process: Path, name: str) -> float:
    """MB of a process in /proc; 0 if it has ended."""
    with contextlib.suppress(OSError, StopIteration):
        lines = (process / "status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
    return 0.0


@contextlib.contextmanager
def serving(model: Path, workers: int) -> Iterator[Server]:
    with open(model.with_suffix(f".{workers}.log"), "wb") as log:
        server = Server(model, workers, log)
        try:
            server.wait()
            if server.child.poll() is not None:
                said = Path(log.name).read_text(encoding="utf-8", errors="replace")
                sys.exit(f"{model.name} cannot be served:\n{said[-4000:]}")
            yield server
        finally:
            server.end()


def measure(model: Path, size: int, many: int) -> dict[str, Any]:
    images = [jpeg(size, seed) for seed in range(100)]
    found: dict[str, Any] = {}
    with serving(model, 1) as server:
        server.at_once([[image] for image in images[:4]])
        found["one"] = round(statistics.median(server.ask([image])[1] for image in images[:20]), 3)
        found["hundred"] = server.at_once([[image] for image in images])
        found["many"] = server.alone([images[n % len(images)] for n in range(many)])
        found["photograph"] = server.alone([encoded(Image.new("RGB", (6000, 4000), "red"), "JPEG")])
        found["bomb"] = server.alone([encoded(Image.new("L", (13_000, 13_000)), "PNG")])
        found["line"] = server.alone([encoded(Image.new("L", (60_000, 1)), "PNG")])
        found["after"] = server.ask([images[0]])[0]
    with serving(model, 8) as server:
        found["eight"] = server.at_once([[image] for image in images[:44]])
    return found


def report(figures: dict[str, Any]) -> str:
    ours, plain = figures["ours"], figures["plain"]

    def ratio(key: str, field: str = "seconds") -> str:
        one, other = (found[key][field] if isinstance(found[key], dict) else found[key] for found in (plain, ours))
        return f"{one / max(other, 1e-3):.2f} ×"

    def at_once(found: dict[str, Any]) -> str:
        return f"{found['seconds']:.1f} s, slowest {found['slowest']:.1f}, {found['failed']} failed"

    def alone(found: dict[str, Any]) -> str:
        return f"{found['status']}, {found['seconds']:.2f} s, {found['mb']:,} MB"

    rows = [
        ("", "ours", "torchvision", "ours is faster by"),
        ("one image, one request after the other, s", str(ours["one"]), str(plain["one"]), ratio("one")),
        ("100 requests at once", at_once(ours["hundred"]), at_once(plain["hundred"]), ratio("hundred")),
        ("a request of many images", alone(ours["many"]), alone(plain["many"]), ratio("many")),
        ("44 at once, 8 processes", at_once(ours["eight"]), at_once(plain["eight"]), ratio("eight")),
        ("24 megapixels", alone(ours["photograph"]), alone(plain["photograph"]), ratio("photograph")),
        ("bomb: 13000 x 13000", alone(ours["bomb"]), alone(plain["bomb"]), ratio("bomb")),
        ("bomb: 60000 x 1", alone(ours["line"]), alone(plain["line"]), ratio("line")),
        ("an image afterwards", str(ours["after"]), str(plain["after"]), ""),
    ]
    return f"{figures['machine']}\nload {figures['load']}, {figures['input_size']} px\n\n{machine.table(rows)}"


if __name__ == "__main__":
    main()
