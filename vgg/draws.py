"""Stateless randomness: every random number is a pure function of what it is for.

The order of an epoch, the crop of a sample and what dropout takes from it are drawn from counters, never from a
generator that has a state.  So nothing random has to be saved, and any number of workers, ranks and restarts draws the
same.  The mixing function is the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), applied once per counter;
plain 64-bit integer arithmetic, so that no library version can change a run.  It is written for numpy and for torch,
whose tensors may be on a GPU and compiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step
GOLDEN = int(_GOLDEN) - 2**64  # as a signed number
GOLDEN_INVERSE = -0x0E217C1E66C88CC3  # GOLDEN * GOLDEN_INVERSE = 1 modulo 2^64


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_tensor(x: torch.Tensor) -> torch.Tensor:
    """_mix in int64, whose products wrap as unsigned ones do and whose shifts keep the sign."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def counter_bits(keys: torch.Tensor, stream: int, counters: torch.Tensor) -> torch.Tensor:
    """64 random bits, int64, for every key and counter: numbers of SplitMix64 generators that begin at the keys.

    keys: int64 random bits, broadcast with counters.  stream: names the use, so that two never share numbers.
    """
    # mix(key + (stream * 2^32 + counter) * GOLDEN) modulo 2^64, by the inverse: a compiler takes counters that come
    # from arange for an index and multiplies them in exact integers, unless what it multiplies is a tensor that wraps
    return _mix_tensor((keys * GOLDEN_INVERSE + stream * 2**32 + counters) * GOLDEN)


def bits(purpose: str, *counters: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for every element of the broadcast counters.

    purpose: names the use ("crop", "order", ...), so that two uses never share numbers.
    counters: non-negative integers or arrays of them, for example seed, epoch, sample ids.
    Returns uint64 of the broadcast shape.
    """
    with np.errstate(over="ignore"):  # wrapping around 2^64 is the arithmetic that is meant
        state = np.zeros((), np.uint64)
        for letter in purpose.encode():
            state = _mix(state + _GOLDEN + np.uint64(letter))
        for counter in counters:
            state = _mix(state * np.uint64(3) + _GOLDEN + np.asarray(counter).astype(np.uint64))
        return _mix(state + _GOLDEN)


def uniform(purpose: str, *counters: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64 with 53 random bits, of the broadcast shape of the counters."""
    return (bits(purpose, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(purpose: str, *counters: ArrayLike) -> NDArray[np.float64]:
    """Standard normal numbers (Box-Muller), float64, of the broadcast shape of the counters."""
    radius = np.sqrt(-2.0 * np.log1p(-uniform(purpose + "/radius", *counters)))
    return np.asarray(radius * np.cos(2.0 * np.pi * uniform(purpose + "/angle", *counters)))


def permutation(purpose: str, size: int, *counters: int) -> NDArray[np.int64]:
    """A random order of range(size), int64: the ranks of one draw per element."""
    return np.argsort(bits(purpose, *counters, np.arange(size)), kind="stable")
