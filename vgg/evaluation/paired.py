"""Two networks on the same images: do they differ, and by how much, with confidence."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000  # of the bootstrap


def score(only_first: int, only_second: int, num_images: int, difference: float) -> float:
    """The score statistic of Tango for the hypothesis that the error rates differ by `difference`.

    only_first: images that the first network alone gets wrong.  only_second: the second alone.  num_images: all.
    difference: error of the first minus error of the second, in (-1, 1).  Returns a value that is standard normal if
    the hypothesis holds, and falls with `difference`.

    T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample design,
    Statistics in Medicine 17 (1998) 891-908.  Its variance is that of the maximum likelihood estimate under the
    hypothesis, not that of the sample (Wald): with few discordant images, as good networks have, the latter is too
    small, and 0 if there are none.  For difference 0 it is McNemar's statistic.
    """
    b, c, n, d = only_first, only_second, num_images, difference
    linear = (2 * n - b + c) * d - b - c
    constant = -c * d * (1 - d)
    root = math.sqrt(max(0.0, linear * linear - 8 * n * constant))
    # of the two forms of the solution of 2n q² + linear q + constant = 0 the one without cancellation
    q = (root - linear) / (4 * n) if linear <= 0 else (-2 * constant / (root + linear) if root + linear else 0.0)
    variance = n * (2 * q + d * (1 - d))
    excess = b - c - n * d
    if variance <= 0:
        return math.copysign(math.inf, excess) if excess else 0.0
    return excess / math.sqrt(variance)


def upper_bound(only_first: int, only_second: int, num_images: int, confidence: float) -> float:
    """The largest difference of the error rates, first minus second, that is compatible with the counts.

    One-sided: with probability `confidence` (at least 0.5) the true difference is below it.  The first network is not
    inferior by a margin if the bound is at most the margin: the test of Tango, turned into an interval.
    """
    wanted = NormalDist().inv_cdf(confidence)
    low, high = (only_first - only_second) / num_images, 1.0
    if wanted <= 0:
        return low
    for _ in range(60):  # the score falls from 0 at `low`
        middle = (low + high) / 2
        if score(only_first, only_second, num_images, middle) > -wanted:
            low = middle
        else:
            high = middle
    return high


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p value of the hypothesis that both networks err equally often (McNemar 1947).

    only_first: images that the first network alone gets wrong.  only_second: the second alone.
    """
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    # tail of the binomial distribution with probability 1/2, by logarithms: 2^-50,000 is 0 as a float
    terms = (
        math.lgamma(discordant + 1) - math.lgamma(k + 1) - math.lgamma(discordant - k + 1) - discordant * math.log(2)
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * sum(math.exp(term) for term in terms))


def bootstrap(only_first: int, only_second: int, num_images: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the difference of the error rates, first minus second, from resampled images (percentiles).

    An image counts +1, -1 or 0: a sample of images is a draw from a multinomial distribution.  Always the same draws.
    """
    shares = np.array([only_first, only_second, num_images - only_first - only_second]) / num_images
    counts = np.random.Generator(np.random.PCG64(1)).multinomial(num_images, shares, RESAMPLES)
    differences = (counts[:, 0] - counts[:, 1]) / num_images
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
