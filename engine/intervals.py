"""How sure a score is: the bootstrap interval of a mean, and if two models differ by more than chance."""

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000  # of the bootstrap


def bootstrap(values: Sequence[float], images: Sequence[str] = (), seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean: images are drawn anew, with replacement and with all their questions,
    RESAMPLES times.

    images: that of each value; by default, and if all are about one image, each value is drawn by itself.
    Questions about one image are not independent: drawn one by one, they make the interval too narrow.
    """
    number: dict = {}
    keys = images if len(set(images)) > 1 else range(len(values))
    groups = [number.setdefault(key, len(number)) for key in keys]
    sums, sizes = np.bincount(groups, values), np.bincount(groups)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(sums), size=len(sums)) for _ in range(RESAMPLES))
    low, high = np.quantile([sums[i].sum() / sizes[i].sum() for i in draws], [0.025, 0.975])
    return float(low), float(high)


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """McNemar's exact test (two-sided p): of the questions that only one model gets right, is it a fair coin
    which?"""
    only_ours = sum(a and not b for a, b in zip(ours, theirs))
    only_theirs = sum(b and not a for a, b in zip(ours, theirs))
    n, k = only_ours + only_theirs, min(only_ours, only_theirs)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
