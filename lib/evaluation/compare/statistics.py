"""How sure a difference is: McNemar's test of paired answers, and intervals by the bootstrap."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

LEVEL = 0.95


class McNemar(NamedTuple):
    """Images that only one of two models has right, and the chance of such a difference between equal models."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """The exact test (McNemar 1947; binomial, two-sided) of two models' answers, right or not, (n,) bool each."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return McNemar(only_first, only_second, p_value)


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], count: int, resamples: int, seed: int) -> np.ndarray:
    """The statistic of random samples, with replacement, of the rows 0 to count - 1 (Efron 1979).

    statistic: rows (count,) -> array; of several models at once, so that differences are of the same samples.
    Returns (resamples, *shape of the statistic).
    """
    generator = np.random.default_rng(seed)
    return np.stack([statistic(generator.integers(count, size=count)) for _ in range(resamples)])


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The percentiles that hold 95% of the samples (R,) between them."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
