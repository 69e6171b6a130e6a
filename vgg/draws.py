"""Stateless random numbers: each is a pure function of its purpose and counters.

The order of an epoch, the crop of a sample and its dropout are drawn from counters, not from a generator with state.
So no random state has to be saved, and the numbers do not depend on the number of workers, ranks and restarts.  The
mixing function is the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), applied once per counter.  It is
plain 64-bit integer arithmetic, so that no library version can change a run.  There are versions for numpy and for
torch, whose tensors may be on a GPU and compiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step
GOLDEN = int(_GOLDEN) - 2**64  # as a signed integer
GOLDEN_INVERSE = -0x0E217C1E66C88CC3  # GOLDEN * GOLDEN_INVERSE = 1 modulo 2^64


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_tensor(x: torch.Tensor) -> torch.Tensor:
    """_mix in int64: products wrap as in uint64; shifts keep the sign, so the upper bits are masked."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def counter_bits(keys: torch.Tensor, stream: int, counters: torch.Tensor) -> torch.Tensor:
    """64 random bits, int64, for every key and counter: the outputs of SplitMix64 generators seeded with the keys.

    keys: int64 random bits, broadcast with counters.  stream: separates uses, so that no two share numbers.
    """
    # mix(key + (stream * 2^32 + counter) * GOLDEN) modulo 2^64.  The inverse makes the product one of tensors, which
    # wraps; a compiler would treat counters from arange as an index and multiply them without wrapping
    return _mix_tensor((keys * GOLDEN_INVERSE + stream * 2**32 + counters) * GOLDEN)


def bits(purpose: str, *counters: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for every element of the broadcast counters.

    purpose: separates uses ("crop", "order", ...), so that no two share numbers.
    counters: non-negative integers or arrays of them, for example seed, epoch, sample ids.
    Returns uint64 of the broadcast shape.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
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
