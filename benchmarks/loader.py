"""The VGG crop on one core beside its peers, then the whole loader: python -m benchmarks.loader --images TAR_OR_FOLDER

The crop: short side S from [256; 512], a random 224 x 224 window of the rescaled image.  Every competitor cuts the same
windows of the same images; 'plain full decode' does not crop.  Images per CPU-second, all on one pinned core.
Exits with 1 if a crop differs from Pillow's by more than 2 grey levels, or by 0.2 on average.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from benchmarks import machine
from runtime.shards.loader import Loader, num_workers
from runtime.shards.shardset import ShardSet
from runtime.targets import Directory
from vgg import draws
from vgg.data import roi
from vgg.data.stream import training_batches
from vgg.data.windows import Window, crop_window
from vgg.params.shard import ShardParams
from vgg.params.train import TrainParams
from vgg.sharding.pack import pack
from vgg.sharding.sources import Folder

SIZE = 224
RATIOS = {"ratio_torchvision": "torchvision", "ratio_full_decode": "full_decode"}
TARGETS = {"ratio_torchvision": 1.8, "ratio_full_decode": 1.1, "loader_efficiency": 0.85}
SHARD = {
    "source": "folder", "check_md5": True, "seed": 1, "samples_per_shard": 100, "max_pixels": 50_000_000,
    "on_bad_image": "fail", "max_quarantined": 0,
}  # fmt: skip
TRAIN = {
    "configuration": "D", "batch_norm": False, "classifier_width": 4096, "input_size": SIZE, "init": "glorot",
    "crop": "scale", "train_scale": [256, 512], "decoder": "cpu", "flip": True, "colour_shift": 0.1,
    "standardise": False, "dropout": 0.5, "epochs": 1, "batch_size": 64, "micro_batch_size": "auto",
    "gradient_compression": "none", "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0005,
    "schedule": {"rule": "steps", "warmup_epochs": 0, "drop_factor": 10, "drop_epochs": []}, "precision": "auto",
    "deterministic": False, "seed": 1, "checkpoint_steps": 1000, "keep_checkpoints": 2,
}  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.loader", description=__doc__)
    flags.add_argument("--images", type=Path, required=True, help="a tar or folder of JPEGs, <class>/<image>")
    flags.add_argument("--json", action="store_true", help="print figures as JSON, a line each as they are measured")
    flags.add_argument("--rounds", type=int, default=5, help="turns of every competitor (default 5)")
    flags.add_argument(
        "--seconds", type=float, default=30, help="how long the loader runs, and the GPU decodes (default 30)"
    )
    flags.add_argument("--batches", type=int, default=0, help="also load this many batches of 8 and measure the memory")
    args = flags.parse_args()
    images = machine.read_images(args.images)
    data = list(images.values())
    windows = windows_of(data)
    crops = np.empty((len(data), SIZE, SIZE, 3), np.uint8)
    assert not roi.crops(data, windows, crops)
    largest, mean = differences(crops, data, windows)
    figures = machine.Figures(args.json)
    figures.add(machine=machine.describe(), max_difference=largest, mean_difference=mean)
    with tempfile.TemporaryDirectory() as folder:
        shards = shard(images, Path(folder))
        figures.add(**one_core(data, windows, shards, Path(folder), args.rounds))
        for name, other in RATIOS.items():
            figures.add(**{name: round(figures["ours"] / figures[other], 3)})
        figures.add(**(on_gpu(data, windows, args.seconds) if torch.cuda.is_available() else {}))
        # in a process without imported competitors: a worker's memory includes its parent's
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            figures.add(**fresh.submit(whole_loader, shards, figures["ours"], args.seconds).result())
            if args.batches:
                figures.add(**fresh.submit(memory, shards, args.batches).result())
    if not args.json:
        print(report(figures, len(data)))
    sys.exit(largest > 2 or mean >= 0.2)


def windows_of(data: list[bytes]) -> list[Window]:
    """A random window of every image, as training draws them."""
    scale, x, y = (draws.uniform(f"benchmark/{name}", np.arange(len(data))) for name in ("scale", "x", "y"))
    windows = []
    for i, jpeg in enumerate(data):
        height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
        windows.append(crop_window(width, height, 256 + int(scale[i] * 257), SIZE, float(x[i]), float(y[i])))
    return windows


def with_pillow(jpeg: bytes, window: Window) -> np.ndarray:
    """Decode, crop, resize, as torchvision does with an image of ImageFolder."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB").crop(window.box)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def differences(crops: np.ndarray, data: list[bytes], windows: list[Window]) -> tuple[int, float]:
    """Largest difference from Pillow's crops, and the worst image's mean difference, grey levels."""
    found = [np.abs(c.astype(int) - with_pillow(d, w)) for c, d, w in zip(crops, data, windows, strict=True)]
    return int(max(d.max() for d in found)), round(float(max(d.mean() for d in found)), 4)


def shard(images: dict[str, bytes], folder: Path) -> ShardSet:
    """Pack the images into shards, the same ones for training and validation."""
    for split in ("train", "val"):
        for name, jpeg in images.items():
            path = folder / "images" / split / Path(name).parent.name / Path(name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg)
    pack(ShardParams(**SHARD), Folder(folder / "images"), Directory(folder / "shards"), "benchmark")  # type: ignore[arg-type]
    return ShardSet(folder / "shards")


def one_core(data: list[bytes], windows: list[Window], shards: ShardSet, folder: Path, rounds: int) -> dict[str, Any]:
    """Images per CPU-second of every competitor."""
    from benchmarks import peers

    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    torch.set_num_threads(1)
    into = np.empty((len(data), SIZE, SIZE, 3), np.uint8)

    def ours() -> int:
        roi.crops(data, windows, into)
        return len(data)

    def full_decode() -> int:
        for jpeg in data:
            simplejpeg.decode_jpeg(jpeg, "RGB")
        return len(data)

    competitors: dict[str, Callable[[], int]] = {
        "ours": ours,
        "torchvision": peers.torchvision_folder(folder / "images" / "train", windows),
        "full_decode": full_decode,
        "webdataset": peers.webdataset_pillow(shards, windows),
    }
    optional = {"dali": peers.dali(data, windows), "streaming": peers.streaming(data, windows, folder / "mds")}
    competitors |= {name: work for name, work in optional.items() if work}
    rates = machine.rates(competitors, rounds)
    os.sched_setaffinity(0, allowed)
    return {name: round(rate, 1) for name, rate in rates.items()}


def on_gpu(data: list[bytes], windows: list[Window], seconds: float) -> dict[str, Any]:
    """The GPU's JPEG decoders: images per second of one process, and the difference from Pillow's crops."""
    device = torch.device("cuda")
    decoder = roi.DeviceDecoder(device)
    into = torch.empty((len(data), SIZE, SIZE, 3), dtype=torch.uint8, device=device)
    assert not decoder.crops(data, windows, into)  # the first call creates the decoders
    largest, mean = differences(into.cpu().numpy(), data, windows)
    start, count = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        for first in range(0, len(data), 64):
            part = slice(first, first + 64)
            decoder.crops(data[part], windows[part], into[part])
        torch.cuda.synchronize()
        count += len(data)
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_decode": round(count / (time.monotonic() - start), 1),
        "gpu_max_difference": largest,
        "gpu_mean_difference": mean,
    }


def loop(shards: ShardSet, batch_size: int, num_steps: int, workers: int) -> Any:
    """The iterator of batches that training reads."""
    params = TrainParams.model_validate_json(json.dumps({**TRAIN, "batch_size": batch_size}))
    return training_batches(Loader(workers=workers), shards.split("train"), params, range(num_steps))


def children() -> dict[int, dict[str, int]]:
    """Resident memory of this process's children, kB: current (VmRSS) and peak (VmHWM)."""
    found = {}
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split():
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        values = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmHWM", "VmRSS"))}
        if values:
            found[int(pid)] = values
    return found


def whole_loader(shards: ShardSet, rate: float, seconds: float) -> dict[str, Any]:
    """Batches of 64 from two workers (with a GPU, as many as training uses), beside what those cores can decode."""
    wanted = num_workers(torch.device("cuda"), 1) if torch.cuda.is_available() else 2
    workers = min(wanted, len(os.sched_getaffinity(0)))
    batches = loop(shards, 64, 10**6, workers)
    for _ in range(4 * workers):
        next(batches)
    start, count = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        count += len(next(batches).images)
    taken = time.monotonic() - start
    peak = max(values["VmHWM"] for values in children().values()) / 1024
    batches.close()
    return {
        "loader": round(count / taken, 1),
        "loader_workers": workers,
        "loader_efficiency": round(count / taken / (rate * workers), 3),
        "peak_rss_mb": round(peak, 1),
    }


def memory(shards: ShardSet, num_batches: int) -> dict[str, Any]:
    """Resident memory of the largest worker after a tenth of many small batches, and after all."""
    batches, found = loop(shards, 8, num_batches, 2), []
    for number in range(num_batches):
        next(batches)
        if number in (num_batches // 10, num_batches - 10):
            found.append(round(max(values["VmRSS"] for values in children().values()) / 1024, 1))
    batches.close()
    return {"memory_batches": num_batches, "memory_tenth_mb": found[0], "memory_end_mb": found[1]}


def report(figures: dict[str, Any], num_images: int) -> str:
    names = {
        "ours": "ours: region of interest, antialiased resize",
        "torchvision": "torchvision-style: ImageFolder, Pillow",
        "full_decode": "plain full decode: simplejpeg, no crop",
        "webdataset": "webdataset, Pillow",
        "dali": "DALI on the CPU: image_slice, resize",
        "streaming": "MosaicML streaming, Pillow",
    }
    rows = [("", "images per CPU-second", "ours is")]
    for name, text in names.items():
        rate = figures.get(name)
        rows.append((text, f"{rate:,.0f}", f"{figures['ours'] / rate:.2f} x") if rate else (text, "not installed", ""))
    exact = (
        f"{num_images} images; crops at most {figures['max_difference']} grey levels from Pillow's, "
        f"{figures['mean_difference']} on average in the worst image"
    )
    lines = [figures["machine"], exact, "", machine.table(rows), ""]
    lines.append(
        f"whole loader, {figures['loader_workers']} workers: {figures['loader']:,.0f} images/s, "
        f"{100 * figures['loader_efficiency']:.0f} % of what the cores decode; {figures['peak_rss_mb']:.0f} MB a worker"
    )
    if "memory_batches" in figures:
        lines.append(
            f"memory of a worker after a tenth and all of {figures['memory_batches']:,} batches: "
            f"{figures['memory_tenth_mb']} and {figures['memory_end_mb']} MB"
        )
    if "gpu" in figures:
        lines.append(
            f"decoded by the {figures['gpu']}: {figures['gpu_decode']:,.0f} images/s; at most "
            f"{figures['gpu_max_difference']} grey levels from Pillow's, {figures['gpu_mean_difference']} on average"
        )
    for name, goal in TARGETS.items():
        lines.append(f"{name} {figures[name]} (at least {goal}: {'met' if figures[name] >= goal else 'NOT MET'})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
