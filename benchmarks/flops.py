"""How much a network computes, and how fast the device multiplies large matrices."""

from __future__ import annotations

import statistics

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from benchmarks.competitors import Turn
from vgg.network.model import VGG, Architecture


def forward_flops(architecture: Architecture) -> int:
    """Of one image; a multiplication and an addition count as two."""
    size = architecture.input_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        VGG(architecture).eval()(torch.empty(1, 3, size, size))
    return counter.get_total_flops()


def matmul_tflops(device: torch.device, precision: torch.dtype) -> float:
    """The fastest product of two large square matrices of random numbers, in the precision of training."""
    best = 0.0
    for side in (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 3072):
        a, b = (torch.randn(side, side, device=device).to(precision) for _ in range(2))
        out = torch.empty_like(a)
        taken = []
        for _ in range(3 + 10):
            machine.synchronise(device)
            start = Turn.clock()
            torch.mm(a, b, out=out)
            machine.synchronise(device)
            taken.append(Turn.clock() - start)
        best = max(best, 2 * side**3 / statistics.median(taken[3:]) / 1e12)
    return best
