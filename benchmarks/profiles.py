"""Where the time of a step goes: torch.profiler's table by kernel, and shares by kind of work."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks import machine

# the first pattern that matches decides: the name of a fused kernel lists everything it fuses
KINDS = {
    "communication": r"nccl|all_?reduce|broadcast",
    "copies": r"memcpy|memset|nchwtonhwc|nhwctonchw|copy|aten::(to|clone|contiguous|fill_|zero_)$",
    "optimiser": r"fused_?sgd|multi_tensor_apply|foreach|lpnorm|linalg_vector_norm",
    "pooling": r"max_pool|maxpool|avg_pool|pooling",
    "elementwise": r"^triton_(poi|red|per)|elementwise|reduce_kernel",
    "convolution": r"conv|fprop|dgrad|wgrad|cudnn|^triton_tem",
    "GEMM": r"gemm|gemv|nvjet|cublas|cutlass|splitk|aten::(mm|addmm|bmm|linear)$|mkldnn_linear",
}
REST = "elementwise"


def profile(step: Callable[[], None], device: torch.device, path: Path, steps: int = 4) -> dict[str, float]:
    """Write the table of the 25 longest kernels to a file; returns the shares of the device's time."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    step()
    machine.synchronise(device)
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
        machine.synchronise(device)
    events = recorded.key_averages()
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(events.table(sort_by=by, row_limit=25, max_name_column_width=90) + "\n", encoding="utf-8")

    times: dict[str, float] = {}
    for event in events:
        # on a GPU the time of a kernel is listed for the kernel and again for the operator that launched it
        is_kernel = event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        if is_kernel or not on_gpu:
            kind = kind_of(event.key)
            times[kind] = times.get(kind, 0.0) + float(getattr(event, by))
    total = sum(times.values()) or 1.0
    shares = {name: round(time / total, 4) for name, time in sorted(times.items(), key=lambda item: -item[1])}
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n".join(f"{name:14} {100 * share:5.1f} %" for name, share in shares.items()) + "\n")
    return shares


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), REST)
