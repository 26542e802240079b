"""Means over seeds, differences paired by seed with their intervals, and orders compared. Any unit: it is kept."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

# Student's t: 97.5 % quantiles for 1, 2, ... 30 degrees of freedom. Beyond, the last one: slightly too wide.
_T975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
_NO_SPREAD = 1e-9  # a standard deviation below is rounding; seeds that all say the same tell nothing of other seeds


@dataclass(frozen=True)
class Summary:
    """Mean over n >= 1 seeds; std is the sample standard deviation (n - 1), None for one seed."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Difference(Summary):
    """A summary of differences, and the 95 % interval of their mean; None for one pair or pairs that all agree."""

    interval: tuple[float, float] | None
    each: tuple[float, ...]  # in the order of the seeds

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero; False without an interval."""
        return self.interval is not None and not self.interval[0] <= 0.0 <= self.interval[1]


def summarize(values: Iterable[float]) -> Summary | None:
    """Mean and sample standard deviation of finite numbers; None if there are none."""
    numbers = np.array(list(values), np.float64)
    if not numbers.size:
        return None
    std = float(numbers.std(ddof=1)) if numbers.size > 1 else None
    return Summary(float(numbers.mean()), std, numbers.size)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """values - baseline, {seed: number} each, over the seeds that both have; None if they share none.

    The interval is mean ± t std / sqrt(n), t of n - 1 degrees of freedom: it takes the differences for independent and
    normally distributed, and knows of no other variation than that between seeds.
    """
    each = tuple(values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys()))
    summary = summarize(each)
    if summary is None:
        return None
    interval = None
    if summary.std is not None and summary.std > _NO_SPREAD:
        half = t975(summary.n - 1) * summary.std / math.sqrt(summary.n)
        interval = summary.mean - half, summary.mean + half
    return Difference(summary.mean, summary.std, summary.n, interval, each)


def t975(degrees: int) -> float:
    """The 97.5 % quantile of Student's t; degrees >= 1, else ValueError. From 31 on, that of 30."""
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom; at least 1 is needed")
    return _T975[min(degrees, len(_T975)) - 1]


@dataclass(frozen=True)
class Agreement:
    """How two orders of the same names agree. tau: Kendall's tau-a, -1 (reversed) .. 1 (the same)."""

    tau: float
    pairs: int
    tied: int  # pairs that one of the orders does not tell apart; they count as neither
    discordant: tuple[tuple[str, str], ...]  # (upper, lower) by the second order; the other way round by the first


def agreement(first: Mapping[str, float], second: Mapping[str, float]) -> Agreement | None:
    """Compare the orders by value of the names that both have; None for fewer than two."""
    names = [name for name in first if name in second]
    concordant, discordant = 0, []
    for a, b in itertools.combinations(names, 2):
        upper, lower = (a, b) if second[a] > second[b] else (b, a)
        product = (first[upper] - first[lower]) * (second[upper] - second[lower])
        concordant += product > 0
        if product < 0:
            discordant.append((upper, lower))
    pairs = len(names) * (len(names) - 1) // 2
    if not pairs:
        return None
    tied = pairs - concordant - len(discordant)
    return Agreement((concordant - len(discordant)) / pairs, pairs, tied, tuple(discordant))


def ranking(values: Mapping[str, float]) -> str:
    """The names from the highest value to the lowest: "a 5.2 > b 4.1 = c 4.1"."""
    names = sorted(values, key=lambda name: -values[name])
    parts = [f"{name} {values[name]:.1f}" for name in names[:1]]
    for before, name in itertools.pairwise(names):
        parts.append(f"{'=' if values[before] == values[name] else '>'} {name} {values[name]:.1f}")
    return " ".join(parts)
