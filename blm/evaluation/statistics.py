"""95 % confidence intervals of rates and of paired differences, and McNemar's test.

Wilson's score interval (Newcombe 1998, Statistics in Medicine 17:857). Where questions share an
image, n is replaced by the effective sample size n / design effect, with a t correction for few
clusters (Korn & Graubard 1998, Survey Methodology 24:193).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from blm.types import BlmError

Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Rate:
    """The mean of n scores from 0 to 1, with its 95 % confidence interval."""

    hits: float
    """Sum of the scores: the number of right answers if each is right or wrong."""
    n: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """First minus second on the same items, with its 95 % confidence interval."""

    n: int
    first: float
    """Rate of the first."""
    second: float
    difference: float
    low: float
    high: float
    only_first: int
    """Number of items with a higher score in the first."""
    only_second: int
    p_value: float | None
    """McNemar's exact two-sided test; None for clustered items, because it assumes independence."""


def wilson(rate: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a rate in n independent trials.

    n may be an effective size, which need not be an integer. `scipy.stats.binomtest` gives the same
    for integers only.
    """
    scale = 1 + Z95**2 / n
    centre = (rate + Z95**2 / (2 * n)) / scale
    half = Z95 / scale * math.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def success_rate(
    outcomes: Sequence[float], groups: Sequence[str] | None = None, strata: Sequence[str] | None = None
) -> Rate:
    """Return the mean of scores in [0, 1] with its interval, clustered by `groups` if given.

    With `strata` it is the unweighted mean over the strata's means (balanced accuracy, mean over
    kinds). Raises BlmError for no outcomes.
    """
    if not outcomes:
        raise BlmError("a rate needs at least one outcome, got none")
    values = np.asarray(outcomes, dtype=np.float64)
    rate = float(_stratum_means(values, strata)[0].mean())
    size = effective_size(values, groups or [str(index) for index in range(len(values))], strata)
    total = math.fsum(values)
    return Rate(int(total) if total.is_integer() else total, len(values), rate, *wilson(rate, size))


def _stratum_means(values: np.ndarray, strata: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of each stratum [K], and the stratum of each item [n]."""
    index = np.unique(np.asarray(strata or [""] * len(values)), return_inverse=True)[1]
    return np.bincount(index, values) / np.bincount(index), index


def effective_size(values: np.ndarray, groups: Sequence[str], strata: Sequence[str] | None = None) -> float:
    """Return the number of independent binary trials whose mean has the same variance.

    `values` [n]. Correlation of the items of one group reduces it; scores between 0 and 1 vary less
    than binary ones, which increases it.
    """
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    n = len(values)
    clusters = int(index.max()) + 1
    means, stratum = _stratum_means(values, strata)
    centred = values - means[stratum]
    mean = float(means.mean())
    plain = clusters == n and strata is None and bool(np.isin(values, (0, 1)).all())
    if plain or clusters == 1 or not centred.any():
        return float(clusters)  # without variance the design effect is unknown: assume the worst
    parts = centred / (len(means) * np.bincount(stratum))[stratum]
    variance = float(parts @ parts)
    correction = 1.0
    if clusters < n:
        sums = np.bincount(index, weights=parts)
        variance = max(variance, clusters / (clusters - 1) * float(sums @ sums))
        correction = (Z95 / _t95(clusters - 1)) ** 2
    return max(1.0, mean * (1 - mean) / variance * correction)


def _t95(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit  # not at import: it takes longer than everything else here

    return float(stdtrit(freedom, 0.975))


def paired_difference(
    first: Sequence[float], second: Sequence[float], groups: Sequence[str] | None = None
) -> Difference:
    """Return the difference of two means on the same items, with its interval.

    Newcombe 1998, Statistics in Medicine 17:2635, method 8: it combines the intervals of both rates
    with the correlation of the outcomes, so it is also valid at 0 and 100 %.
    """
    a = success_rate(first, groups)
    b = success_rate(second, groups)
    x = np.asarray(first, dtype=np.float64)
    y = np.asarray(second, dtype=np.float64)
    scale = float(x.std() * y.std())
    correlation = float(np.mean(x * y) - a.rate * b.rate) / scale if scale > 0 else 0.0

    def combine(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 + other**2 - 2 * correlation * one * other))

    gap = a.rate - b.rate
    only_first = int((x > y).sum())
    only_second = int((y > x).sum())
    return Difference(
        n=a.n,
        first=a.rate,
        second=b.rate,
        difference=gap,
        low=gap - combine(a.rate - a.low, b.high - b.rate),
        high=gap + combine(a.high - a.rate, b.rate - b.low),
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar(only_first, only_second) if groups is None else None,
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the p-value of McNemar's exact test, a binomial test of the discordant items."""
    from scipy.stats import binomtest  # takes a second to import, which commands would wait for

    n = only_first + only_second
    return float(binomtest(only_first, n).pvalue) if n else 1.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for their number (Holm 1979, Scand. J. Statistics 6:65); None stays None."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    worst = 0.0
    for rank, (p, place) in enumerate(known):
        worst = max(worst, min(1.0, (len(known) - rank) * p))
        corrected[place] = worst
    return corrected
