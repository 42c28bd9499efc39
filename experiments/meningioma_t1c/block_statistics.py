"""Intervals and tests over blocks: Student's t of block means, and Holm's correction for several tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """Mean of n values with its two-sided t interval and the p-value of a mean of 0; NaN below two values."""

    n: int
    mean: float
    low: float
    high: float
    p: float


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of a mean: mean +- t(n - 1) * sd / sqrt(n)."""
    array = np.asarray(values, dtype=float)
    n = len(array)
    if n < 2:
        return Interval(n, float(array.mean()) if n else math.nan, math.nan, math.nan, math.nan)
    mean, error = float(array.mean()), float(array.std(ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    return Interval(n, mean, mean - half, mean + half, p)


def block_means(values: Mapping[str, float], blocks: Mapping[str, str]) -> list[float]:
    """Mean of the slices of each block, in the order of block names; slices without a value are left out."""
    found: dict[str, list[float]] = {}
    for case, value in values.items():
        if math.isfinite(value):
            found.setdefault(blocks[case], []).append(value)
    return [float(np.mean(found[name])) for name in sorted(found)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979), in the order given; they keep the family-wise error rate."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
