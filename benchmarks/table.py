"""What benchmarks/gpu.sh has measured, as a section of RESULTS.md: python -m benchmarks.table DIRECTORY"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from pathlib import Path
from typing import Any

from benchmarks import machine, train

Row = tuple[str, str, str]


def main() -> None:
    flags = argparse.ArgumentParser("python -m benchmarks.table", description=__doc__)
    flags.add_argument("directory", type=Path)
    directory = flags.parse_args().directory
    print(f"{datetime.date.today()}, {machine.describe()}. `benchmarks/gpu.sh`\n")
    print("| | measured | target |\n|---|---|---|")
    for row in rows(directory):
        print("| " + " | ".join(row) + " |")
    shares = read(directory, "train").get("shares")
    if shares:
        print("\nA training step's time: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()) + ".")


def read(directory: Path, name: str) -> dict[str, Any]:
    """A step's figures; nothing if it has not run or said none."""
    try:
        found: dict[str, Any] = json.loads((directory / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def rows(directory: Path) -> list[Row]:
    found: list[Row] = []
    for name in ("decoders", "correct", "repeat", "train", "loader", "cifar10", "cifar10-bn"):
        code = directory / f"{name}.rc"
        if code.exists() and code.read_text().strip() != "0":
            found.append((f"`{name}`", f"FAILED, exit {code.read_text().strip()}", "exit 0"))
        elif code.exists() and name == "decoders":
            # where there is no GPU all are skipped, which pytest calls a success
            passed = re.search(r"\d+ passed", (directory / "decoders.json").read_text())
            shown = passed[0] if passed else "not tested: skipped"
            found.append(("crops of the GPU's decoders, tests/test_roi.py", shown, "≤ 2 grey levels from Pillow's"))
    found += of_correctness(read(directory, "correct") | read(directory, "repeat"))
    if figures := read(directory, "train"):
        found += of_training(figures)
    if figures := read(directory, "loader"):
        found += of_decoding(figures)
    for name in ("cifar10", "cifar10-bn"):
        if figures := read(directory, name):
            top1 = f"{figures['top1']:.2%} after {figures['epochs']} epochs"
            found.append((f"recipes/{name}.yaml, top-1, {figures['mode']}", top1, f"≥ {figures['goal']:.0%}"))
            time = f"{figures['train_minutes']} minutes, {figures['images_per_second']:,.0f} images/s"
            found.append((f"recipes/{name}.yaml, training with all validations", time, ""))
    return found


def of_correctness(figures: dict[str, Any]) -> list[Row]:
    names = {
        "step": "one step beside torchvision's vgg16 in float64: gradient's relative distance",
        "repeated": "two deterministic trainings",
        "resumed": "a training stopped half-way and resumed",
        "learns": "loss of one batch, at first and after 60 steps",
    }
    targets = {"step": "≤ 1.5 × plain autocast", "repeated": "same bytes", "resumed": "same bytes", "learns": "≤ half"}
    found = []
    for name, text in names.items():
        if finding := figures.get(name):
            values = {"step": "gradient", "learns": "loss"}
            shown = finding.get("error") or finding.get(values.get(name, ""), "")
            if name == "step" and "gradient" in finding:
                shown = "{:.4f}, plain autocast {:.4f}".format(*finding["gradient"])
            elif name == "learns" and "loss" in finding:
                shown = "{:.3f}, {:.3f}".format(*finding["loss"])
            found.append((text, f"{'ok' if finding['ok'] else 'FAILED'} {shown}".strip(), targets[name]))
    return found


def of_training(figures: dict[str, Any]) -> list[Row]:
    setting = f"{figures['input_size']} px, batch {figures['batch']}, {figures['precision']}"
    found: list[Row] = [(f"training, {setting}, images/s", f"{figures['ours']:,.0f}", "≥ 4,500 (aim 5,500)")]
    for name, ratio in train.RATIOS.items():
        if rate := figures[ratio]:
            target = "≥ 1.3 ×" if name == "ratio" else ""
            found.append((f"{train.NAMES[ratio]}, images/s", f"{rate:,.0f}; ours is {figures[name]:.2f} ×", target))
    found.append(("forward, images/s", f"{figures['forward']:,.0f}", "≥ 13,000"))
    if figures["real"]:
        share, wait = figures["real_share"], figures["data_wait"]
        shown = f"{figures['real']:,.0f}; {share:.1%} of synthetic, {wait:.1%} of the loop's time waiting"
        found.append(("training from shards, images/s", shown, "≥ 97 % of synthetic"))
    share = f"{figures['tflops']:,.0f} of {figures['matmul_tflops']:,.0f}, {figures['matmul_share']:.0%}"
    found.append(("TFLOP/s, of large matrix products'", share, ""))
    found.append(("memory, GB", f"{figures['peak_memory_mb'] / 1024:.1f}", "< 20 (batch 256)"))
    return found


def of_decoding(figures: dict[str, Any]) -> list[Row]:
    found: list[Row] = [
        ("crops on one CPU core, images/s", f"{figures['ours']:,.0f}", ""),
        (f"loader, {figures['loader_workers']} workers, images/s", f"{figures['loader']:,.0f}", ""),
    ]
    if "gpu" in figures:
        apart = f"{figures['gpu_max_difference']} grey levels at most, {figures['gpu_mean_difference']} on average"
        found.append(("crops on the GPU, images/s", f"{figures['gpu_decode']:,.0f}; {apart}", "≤ 2, < 0.2"))
    return found


if __name__ == "__main__":
    main()
