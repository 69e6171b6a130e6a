"""The results of a lease as a table in Markdown.  It has every row, even if a program failed."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

Figures = dict[str, Any]
TITLES = {  # in the order of the lease
    "machine": "the machine",
    "names": "names of torch and torchvision, also in 2.11 and 0.26",
    "decoders": "crops beside Pillow's",
    "step": "a training step beside float64",
    "prepare": "CIFAR-10 sharded, compiled",
    "train": "training",
    "evaluate": "evaluation",
    "loader": "decoding",
    "repeated": "deterministic training",
    "cifar10": "CIFAR-10",
}


def rate(name: str, ratio: str = "") -> Callable[[Figures], str]:
    def shown(figures: Figures) -> str:
        return f"{figures[name]:,.0f}" + (f"; ours is {figures[ratio]:.2f} ×" if ratio else "")

    return shown


def verdict(name: str, detail: str = "") -> Callable[[Figures], str]:
    def shown(figures: Figures) -> str:
        result = figures[name]
        return f"{'ok' if result['ok'] else 'NOT OK'} {detail.format(**result)}".strip()

    return shown


# rows of every program: what, measured, target on one H200
ROWS: dict[str, list[tuple[str, Callable[[Figures], str], str]]] = {
    "decoders": [
        (
            "crops decoded on the device, tests/vgg/test_roi.py",
            verdict("decoders", "{passed} passed, {failed} failed"),
            "≤ 2 grey levels from Pillow's",
        ),
    ],
    "step": [
        (
            "one step beside torchvision's vgg16 in float64: gradient's distance",
            verdict("step", "{gradient[0]:.4f}, plain autocast {gradient[1]:.4f}"),
            "≤ 1.5 × plain autocast",
        ),
        ("compiled regions", verdict("step", "{compiled_regions} of {of}"), "all"),
    ],
    "prepare": [
        ("CIFAR-10 sharded meanwhile", lambda f: f"{f['sharded']:,} images in {f['shard_seconds']} s", ""),
        ("sharded and compiled", lambda f: f"{f['prepare_seconds']} s", ""),
    ],
    "train": [
        (
            "what is trained",
            lambda f: f"VGG-16, {f['input_size']} px, batch {f['batch']}, {f['precision']}",
            "224 px, batch 256",
        ),
        ("memory, GB", lambda f: f"{f['peak_memory_mb'] / 1024:.1f}", "< 20"),
        ("training, images/s", rate("ours"), "≥ 4,500 (aim 5,500)"),
        ("torchvision's loop, images/s", rate("reference", "ratio"), "≥ 1.3 ×"),
        ("the same, channels_last", rate("reference_channels_last", "ratio_channels_last"), ""),
        ("forward only, images/s", rate("forward"), "≥ 13,000"),
        (
            "TFLOP/s, of large matrix products'",
            lambda f: f"{f['tflops']:,.2f} of {f['matmul_tflops']:,.2f}, {f['matmul_share']:.0%}",
            "",
        ),
        ("a step's time", lambda f: ", ".join(f"{name} {share:.0%}" for name, share in f["shares"].items()), ""),
        (
            "training from shards, images/s",
            lambda f: f"{f['real']:,.0f}; {f['real_share']:.1%} of synthetic, {f['data_wait']:.1%} waiting",
            "≥ 97 % of synthetic",
        ),
    ],
    "evaluate": [
        (
            "what is evaluated",
            lambda f: f"{f['images']} images, network of {f['input_size']} px, dense at Q = {f['scales']}, mirrored",
            "",
        ),
        ("evaluation, decoding included, images/s", rate("ours"), "≥ 333 (50,000 in 2.5 minutes)"),
        ("a loop with torchvision's modules, images/s", rate("naive", "ratio_naive"), "≥ 3 ×"),
        ("150 crops, images/s", rate("multi_crop"), "≥ 70 (50,000 in 12 minutes)"),
        (
            "its time, in one process",
            lambda f: ", ".join(f"{name} {share:.0%}" for name, share in f["shares"].items()),
            "",
        ),
    ],
    "loader": [
        (
            "crops on one CPU core, images/s",
            lambda f: f"{f['ours']:,.0f}; {f['max_difference']} grey levels from Pillow's at most",
            "≤ 2",
        ),
        (
            "crops on the GPU's engines, images/s",
            lambda f: (
                f"{f['gpu_decode']:,.0f}; {f['gpu_max_difference']} grey levels at most, "
                f"{f['gpu_mean_difference']} on average"
            ),
            "≤ 2, < 0.2",
        ),
        (
            "loader, images/s",
            lambda f: (
                f"{f['loader']:,.0f} from {f['loader_workers']} workers, {f['loader_efficiency']:.0%} of as many cores"
            ),
            "faster than training",
        ),
    ],
    "repeated": [
        ("two deterministic trainings", verdict("repeated", "{weights}"), "same bytes"),
        ("a training stopped half-way and resumed", verdict("resumed", "{weights}"), "same bytes"),
    ],
    "cifar10": [
        (
            "recipes/cifar10-bn.yaml, top-1",
            lambda f: (
                f"{f['top1']:.2%} after {f['epochs']:g} epochs (the recipe has {f['recipe_epochs']}), {f['mode']}"
            ),
            "≥ 94 % after 80",
        ),
        (
            "its training, validations included",
            lambda f: f"{f['images_per_second']:,.0f} images/s, {f['train_minutes']} minutes",
            "",
        ),
        ("its evaluation", lambda f: f"{f['evaluate_minutes']} minutes", ""),
    ],
}


def of(programs: dict[str, dict[str, Any]], rehearsal: bool) -> str:
    """programs: by name: "exit" (None: still running), "seconds", "limit", "over" (exceeded its limit), "last" (its
    last message) and "figures"."""
    machine = programs.get("machine", {}).get("figures", {}).get("machine", "unknown machine")
    mark = " (rehearsal, CPU)" if rehearsal else ""
    title = "REHEARSAL on a CPU, tiny sizes: not a measurement. " if rehearsal else ""
    lines = [f"{title}{datetime.date.today()}, {machine}. `benchmarks/gpu.sh lease`", ""]
    lines += ["| | measured | target, one H200 |", "|---|---|---|"]
    for name, text in TITLES.items():
        if name == "names" and not rehearsal:
            continue
        program = programs.get(name, {})
        lines.append(f"| **{text}** (`{name}`) | {status(program)}{mark} | |")
        for what, shown, target in ROWS.get(name, []):
            lines.append(f"| {what} | {measured(program, shown)}{mark} | {target} |")
    return "\n".join(lines)


def status(program: dict[str, Any]) -> str:
    if not program:
        return "not started"
    code = program["exit"]
    if code is None:
        return "running"
    last = "".join(program["last"]).replace("|", "/")[:200]
    if program.get("over"):
        return f"TIMED OUT after {program['limit']} s, exit {code}: {last}"
    return f"done in {program['seconds']:.0f} s of {program['limit']}" if code == 0 else f"FAILED, exit {code}: {last}"


def measured(program: dict[str, Any], shown: Callable[[Figures], str]) -> str:
    """A row's figure; a program that failed later has it too."""
    try:
        return shown(program["figures"])
    except KeyError:
        return "none"
