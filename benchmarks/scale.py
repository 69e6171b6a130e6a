"""How training VGG-16 scales with GPUs, and what limits it: python -m benchmarks.scale [--json]

Computes a step, an epoch and a training of 74 epochs for numbers of GPUs and shares of the batch, names what limits
each, and the sizes from which efficiency is below 90 and 50 %.  Nothing is measured here: measured figures go in, as
other benchmarks print them (--train, --loader, --checkpoint), and whatever is known of a cluster (--inputs).  Without
them the rates of a GPU are those of a model, as ORIGIN says.  benchmarks.exchange checks the exchange with processes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.gradients import Layer, layers, num_parameters
from benchmarks.scaling import Epoch, Inputs, Plan, Step, epoch, fitted, from_json, step, traffic_seconds
from vgg.network.model import Architecture
from vgg.training.reporting import LOG_STEPS

NETWORK = Architecture("D", False, 4096, 1000, 224)
PAPERS_BATCH, PAPERS_EPOCHS = 256, 74
GPUS = (1, 2, 4, 8, 16, 32, 64, 128)
SHARES = (32, 128, 256, 512)  # images of a GPU a step; 512 is the largest that is computed at once
POINT_VALUES = 5  # numbers of a point of the curves: loss, error, rate, speed, waiting
# where the defaults come from: 8 nodes of 8 H100 SXM, each with a card of 400 Gbit/s
DEFAULTS: dict[str, tuple[Any, str]] = {
    "gpus_per_node": (8, "DGX H100"),
    "conv_flops": (600e12, "model: of the 989 TFLOP/s of the data sheet what large convolutions reach"),
    "memory_bandwidth": (0.85 * 3.35e12, "data sheet of H100 SXM, 85 %"),
    "other_share": (0.12, "model: the gap of the one published training rate of VGG-16 (timm, RTX 3090)"),
    "image_seconds": (None, "not measured on a GPU yet: from the three above; --train"),
    "step_seconds": (None, "not measured on a GPU yet: from the traffic of weights; --train"),
    "forward_rate": (13_000, "target of RESULTS.md, not measured yet"),
    "nvlink": (450e9, "data sheet: 900 GB/s in both directions; published all-reduces reach 480 with SHARP"),
    "network": (331e9, "published: bus bandwidth of all-reduce on 4 nodes with 8 cards of 400 Gbit/s each"),
    "hop": (5e-6, "assumption: a message between ranks, which NCCL's trees make cheaper"),
    "host_seconds": (0.002, "model: some 200 kernels started a step"),
    "agreement_hop": (
        1e-4,
        "assumption: two messages of 50 us over TCP for every rank; benchmarks.exchange --agreement measures it",
    ),
    "cores_per_node": (112, "DGX H100"),
    "decode_rate": (980, "measured by benchmarks.loader, 2026-11-25, AMD EPYC; --loader"),
    "loader_share": (0.93, "measured by benchmarks.loader, 2026-11-25, 2 workers; --loader"),
    "device_decode_rate": (None, "not measured yet; --loader on a GPU"),
    "image_bytes": (108e3, "138 GB of ILSVRC-2012 for 1,281,167 images"),
    "read_rate": (10e9, "assumption: NVMe of a node, or its page cache"),
    "store_rate": (10e9, "assumption: an object store or shared volume, all nodes together"),
    "copy_rate": (50e9, "model: PCIe 5 x16 to pinned memory"),
    "write_rate": (1.107e9 / 4.5, "measured by benchmarks.checkpoint, 2026-11-25: 1.107 GB in 4.5 s; --checkpoint"),
    "upload_rate": (0.0, "no object store: shards and checkpoints on a volume"),
    "train_images": (1_281_167, "ILSVRC-2012"),
    "val_images": (50_000, "ILSVRC-2012"),
    "checkpoint_steps": (2000, "recipes/imagenet-d-256.yaml"),
}
INPUTS = Inputs(**{name: value for name, (value, _) in DEFAULTS.items()})


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.scale", description=__doc__)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--json", action="store_true", help="print inputs, their origin and all rows as JSON")
    flags.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="numbers of GPUs (default 1 to 128)")
    flags.add_argument("--share", type=int, nargs="+", default=SHARES, help="images of a GPU (default 32 to 512)")
    flags.add_argument("--network-gbit", type=float, help="out of a node, all its cards (default: 331 GB/s of bus)")
    flags.add_argument("--bf16", action="store_true", help="train.gradient_compression: bf16")
    flags.add_argument("--device-decoder", action="store_true", help="train.decoder: device; needs its rate")
    flags.add_argument("--train", type=Path, nargs="+", default=(), help="of benchmarks.train --json, one for a batch")
    flags.add_argument("--loader", type=Path, help="of benchmarks.loader --json")
    flags.add_argument("--checkpoint", type=Path, help="of benchmarks.checkpoint --json")
    flags.add_argument("--inputs", type=Path, help="JSON: other values, by the names of the inputs")
    args = flags.parse_args()
    network = layers(NETWORK)
    try:
        given = inputs(network, args)
        rows = [row(network, given, plan(args, ranks, batch)) for ranks, batch in sizes(args)]
    except (ValueError, OSError) as mistake:
        flags.error(str(mistake))
    figures = {"machine": machine.describe(), "inputs": vars(given), "origin": origins(given), "rows": rows}
    print(json.dumps(figures) if args.json else report(network, given, args, rows))


def inputs(network: Sequence[Layer], args: argparse.Namespace) -> Inputs:
    """The defaults, replaced by what was measured, and that by what was given."""
    changes: dict[str, Any] = {}
    if args.train:
        rates = {(found := read(path))["batch"]: found["ours"] for path in args.train}
        changes |= fitted(rates, traffic_seconds(network, INPUTS))
    if args.loader:
        found = read(args.loader)
        names = {"decode_rate": "ours", "loader_share": "loader_efficiency", "device_decode_rate": "gpu_decode"}
        changes |= {ours: found[theirs] for ours, theirs in names.items() if theirs in found}
    if args.checkpoint:
        found = read(args.checkpoint)
        changes |= {"write_rate": found["bytes"] / found["written_seconds"]}
    if args.network_gbit:  # of the network, as of NVLink, an all-reduce gets 83 %: 331 of 400 GB/s
        changes |= {"network": INPUTS.network / 400e9 * args.network_gbit / 8 * 1e9}
    return from_json(INPUTS, changes | (read(args.inputs) if args.inputs else {}))


def read(path: Path) -> dict[str, Any]:
    """The figures of a benchmark, which may be several lines."""
    text = path.read_text(encoding="utf-8")
    try:
        found: dict[str, Any] = {}
        for line in text.splitlines() if text.count("\n{") else [text]:
            found |= json.loads(line)
    except (ValueError, TypeError):
        raise ValueError(f"{path}: not figures as a benchmark prints them with --json") from None
    return found


def sizes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(GPUs, global batch): the paper's batch, then every share of a GPU."""
    paper = [(ranks, PAPERS_BATCH) for ranks in args.gpus if ranks <= PAPERS_BATCH]
    return paper + [(ranks, share * ranks) for share in args.share for ranks in args.gpus]


def plan(args: argparse.Namespace, ranks: int, batch: int) -> Plan:
    return Plan(ranks=ranks, batch=batch, compressed=args.bf16, device_decoder=args.device_decoder)


def row(network: Sequence[Layer], given: Inputs, wanted: Plan) -> dict[str, Any]:
    """One size, and its efficiency: images/s of a GPU beside those of one GPU alone with the paper's batch."""
    one: Step = step(network, given, Plan(ranks=1, batch=PAPERS_BATCH))
    found: Step = step(network, given, wanted)
    whole: Epoch = epoch(network, given, wanted)
    rate = wanted.batch / found.seconds
    images = given.train_images / whole.seconds
    return {
        "gpus": wanted.ranks, "batch": wanted.batch, **vars(found), "seconds": found.seconds, "limit": found.limit,
        "images_per_second": rate, "efficiency": rate / wanted.ranks * one.device / PAPERS_BATCH,
        "epoch": {**vars(whole), "seconds": whole.seconds}, "hours": PAPERS_EPOCHS * whole.seconds / 3600,
        "updates": PAPERS_EPOCHS * whole.steps, "epoch_efficiency": images / wanted.ranks * one.device / PAPERS_BATCH,
        "points_per_second": POINT_VALUES / LOG_STEPS / found.seconds,
        "read_per_node": min(wanted.ranks, given.gpus_per_node) * rate / wanted.ranks * given.image_bytes,
    }  # fmt: skip


def origins(given: Inputs) -> dict[str, str]:
    return {name: where if getattr(given, name) == value else "given" for name, (value, where) in DEFAULTS.items()}


def report(network: Sequence[Layer], given: Inputs, args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    gradient = 4 * num_parameters(network) / 1e6
    sent = "bf16" if args.bf16 else "fp32"
    lines = [f"{given.train_images:,} images, {PAPERS_EPOCHS} epochs; gradients {gradient:,.1f} MB, sent as {sent}", ""]
    titles = ("images a GPU", "GPUs", "batch", "step ms", "weights", "exchange", "images/s", "%", "limit",
              "epoch s", "val s", "stall s", "hours", "%", "updates")  # fmt: skip
    shown = [titles]
    for found in rows:
        whole, ms = found["epoch"], {name: f"{1000 * found[name]:.2f}" for name in ("seconds", "weights", "exchange")}
        shown.append((
            f"{found['batch'] / found['gpus']:g}", str(found["gpus"]), f"{found['batch']:,}", ms["seconds"],
            ms["weights"], ms["exchange"], f"{found['images_per_second']:,.0f}", f"{100 * found['efficiency']:.0f}",
            found["limit"], f"{whole['seconds']:.1f}", f"{whole['validation']:.1f}", f"{whole['stalled']:.1f}",
            f"{found['hours']:.2f}", f"{100 * found['epoch_efficiency']:.0f}", f"{found['updates']:,.0f}",
        ))  # fmt: skip
    lines.append(machine.table(shown))
    for floor in (0.9, 0.5):
        lines.append("")
        lines += [f"below {floor:.0%}, {name}: {text}" for name, text in thresholds(rows, floor).items()]
    return "\n".join(lines)


def thresholds(rows: list[dict[str, Any]], floor: float) -> dict[str, str]:
    """For the paper's batch and every share: the first number of GPUs below this efficiency, of steps and of epochs."""
    series: dict[str, list[dict[str, Any]]] = {}
    for found in rows:
        paper = found["batch"] == PAPERS_BATCH and not any(
            r["gpus"] == found["gpus"] for r in series.get("batch 256", [])
        )
        name = "batch 256" if paper else f"{found['batch'] // found['gpus']} a GPU"
        series.setdefault(name, []).append(found)

    def first(members: list[dict[str, Any]], what: str) -> str:
        return next((f"{found['gpus']} GPUs" for found in members if found[what] < floor), "never")

    return {
        name: f"steps {first(members, 'efficiency')}, epochs {first(members, 'epoch_efficiency')}"
        for name, members in series.items()
    }


if __name__ == "__main__":
    main()
