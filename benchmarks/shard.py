"""Sharding beside a plain decode and other writers: python -m benchmarks.shard --images TAR_OR_FOLDER

Images per CPU-second of packing (strict decode, sums, checksums, index, tar) on one core, without and with the start of
the process; the decode alone; webdataset.ShardWriter and MosaicML's MDSWriter, which decode nothing.  Then the time for
the 1,281,167 images of ILSVRC-2012 on 16 such cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import simplejpeg

from benchmarks import machine
from runtime.targets import Directory
from vgg.params.shard import ShardParams
from vgg.sharding import pack
from vgg.sharding.sources import Folder

NUM_IMAGENET = 1_281_167
GOAL = 0.65  # of the plain full decode
SHARD = {
    "source": "folder", "check_md5": True, "seed": 1, "samples_per_shard": 250, "max_pixels": 50_000_000,
    "on_bad_image": "fail", "max_quarantined": 0,
}  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.shard", description=__doc__)
    flags.add_argument("--images", type=Path, required=True, help="a tar or folder of JPEGs, <class>/<image>")
    flags.add_argument("--json", action="store_true", help="print the figures as JSON")
    flags.add_argument("--rounds", type=int, default=5, help="turns of every competitor (default 5)")
    args = flags.parse_args()
    images = machine.read_images(args.images)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(images, Path(folder), args.rounds)
    figures["machine"] = machine.describe()
    print(json.dumps(figures) if args.json else report(figures, len(images)))


def measure(images: dict[str, bytes], folder: Path, rounds: int) -> dict[str, Any]:
    once, many = folder / "once", folder / "many"
    lay_out(images, once, 1)
    lay_out(images, many, 4)
    # the work of a worker process, in this process, so that its CPU time is measured
    params, source, target = ShardParams(**SHARD), Folder(once), Directory(folder / "shards")  # type: ignore[arg-type]
    tasks = [task for split in source.splits for task in pack.plan(params, split, source.originals(split))]
    data = list(images.values())
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    pack._worker = pack.Job(params, source, target, "benchmark")

    def ours() -> int:
        for task in tasks:
            target.delete(f"{task.path}.receipt")
            pack._pack_one(task)
        return sum(len(task.originals) for task in tasks)

    def full_decode() -> int:
        for jpeg in data:
            simplejpeg.decode_jpeg(jpeg, "RGB")
        return len(data)

    import webdataset  # here, so that a worker process does not import it

    def shard_writer() -> int:
        (folder / "wds").mkdir(exist_ok=True)
        with webdataset.ShardWriter(str(folder / "wds/%05d.tar"), maxcount=250, verbose=0) as writer:
            for number, jpeg in enumerate(data):
                writer.write({"__key__": f"{number:08d}", "jpg": jpeg, "cls": 0})
        return len(data)

    competitors = {"ours": ours, "full_decode": full_decode, "shard_writer": shard_writer}
    if machine.installed("mosaicml-streaming"):
        from streaming import MDSWriter

        def mds_writer() -> int:
            columns = {"image": "bytes", "label": "int"}
            with MDSWriter(out=str(folder / "mds"), columns=columns, hashes=["sha256"], exist_ok=True) as writer:
                for jpeg in data:
                    writer.write({"image": jpeg, "label": 0})
            return len(data)

        competitors["mds_writer"] = mds_writer
    rates = machine.rates(competitors, rounds)
    os.sched_setaffinity(0, allowed)
    once_more, four_times = (worker_process(images, folder / "worker") for images in (once, many))
    return {
        **{name: round(rate, 1) for name, rate in rates.items()},
        "ratio_full_decode": round(rates["ours"] / rates["full_decode"], 3),
        "projected_minutes_16_cores": round(NUM_IMAGENET / rates["ours"] / 16 / 60, 2),
        "with_start": round(once_more["rate"], 1),
        "peak_rss_mb": [once_more["peak_mb"], four_times["peak_mb"]],
    }


def lay_out(images: dict[str, bytes], root: Path, times: int) -> None:
    """<root>/{train,val}/<class>/<image>: half of the images each, `times` copies of them."""
    for number, (name, jpeg) in enumerate(images.items()):
        for copy in range(times):
            # one class in both splits: both must have the same classes
            path = root / ("train", "val")[number % 2] / "class" / f"{copy}-{Path(name).name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg)
    for split in ("train", "val"):
        path = root / split / "other" / "one.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(next(iter(images.values())))


def worker_process(images: Path, output: Path) -> dict[str, float]:
    """Pack in a new process: images per CPU-second, imports included, and its peak memory in MB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_pack_here, (images, output))


def _pack_here(images: Path, output: Path) -> dict[str, float]:
    params, source, target = ShardParams(**SHARD), Folder(images), Directory(output)  # type: ignore[arg-type]
    pack._start_worker(params, source, target, "benchmark")
    count = 0
    for split in source.splits:
        for task in pack.plan(params, split, source.originals(split)):
            count += len(pack._pack_one(task).rows)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))  # kB
    return {"rate": count / time.process_time(), "peak_mb": round(peak / 1024, 1)}


def report(figures: dict[str, Any], num_images: int) -> str:
    names = {
        "ours": "ours: decode, checks, checksums, index, tar",
        "full_decode": "plain full decode: simplejpeg, nothing written",
        "shard_writer": "webdataset.ShardWriter, decodes nothing",
        "mds_writer": "MosaicML MDSWriter, decodes nothing",
    }
    rows = [("", "images per CPU-second", "ours is")]
    for name, text in names.items():
        rate = figures.get(name)
        rows.append((text, f"{rate:,.0f}", f"{figures['ours'] / rate:.2f} x") if rate else (text, "not installed", ""))
    met = "met" if figures["ratio_full_decode"] >= GOAL else "NOT MET"
    once, four_times = figures["peak_rss_mb"]
    return "\n".join([
        f"{figures['machine']}; {num_images} images", "", machine.table(rows), "",
        f"start included: {figures['with_start']:,.0f} images per CPU-second",
        f"peak memory of a worker {once} MB, with four times the images {four_times} MB",
        f"{NUM_IMAGENET:,} images on 16 such cores: {figures['projected_minutes_16_cores']} minutes",
        f"ratio_full_decode {figures['ratio_full_decode']} (at least {GOAL}: {met})",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
