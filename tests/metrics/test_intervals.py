"""Intervals hold what they promise at the numbers of cases at hand, and no difference is found where there is none."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from samseg_monai.metrics.rows import holm, t_interval

DRAWS = 20_000  # the error of a simulated 0.95 is 0.0015; 500 draws could not tell 0.93 from 0.95
SIZES = (6, 13, 40)
SHAPES = {
    "normal": (lambda rng, size: rng.normal(0.85, 0.05, size), 0.85),
    "Beta(8, 2)": (lambda rng, size: rng.beta(8, 2, size), 0.8),
    "Beta(12, 1.5)": (lambda rng, size: rng.beta(12, 1.5, size), 12 / 13.5),
    "failures": (lambda rng, size: np.where(rng.random(size) < 0.1, 0.0, rng.beta(20, 3, size)), 0.9 * 20 / 23),
}
# what the text at the top of metrics/rows.py says
WRITTEN = {
    "normal": (0.961, 0.951, 0.950),
    "Beta(8, 2)": (0.943, 0.941, 0.946),
    "Beta(12, 1.5)": (0.930, 0.931, 0.942),
    "failures": (0.659, 0.754, 0.916),
}


def ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``t_interval`` of every row of (draws, n) at once, as the formula has it; shown to be the function's below."""
    n = values.shape[1]
    half = stats.t.ppf(0.975, n - 2) * values.std(axis=1, ddof=1) / math.sqrt(n)
    return values.mean(axis=1) - half, values.mean(axis=1) + half


def test_the_simulated_formula_is_that_of_the_function():
    values = np.random.default_rng(1).beta(8, 2, (30, 9))
    low, high = ends(values)
    found = [t_interval(one.tolist()) for one in values]
    np.testing.assert_allclose([(one.low, one.high) for one in found], np.stack([low, high], axis=1), rtol=1e-12)
    # Student's own, from scipy's test of one sample
    for one in values:
        own, told = t_interval(one, margin=0), stats.ttest_1samp(one, 0.0)
        assert (own.low, own.high) == pytest.approx(tuple(told.confidence_interval(0.95)))
        assert own.p == pytest.approx(told.pvalue)
        shifted = t_interval(one - 0.8)
        assert (shifted.p < 0.05) == (not shifted.low <= 0 <= shifted.high) == shifted.told


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_of_the_interval_of_a_mean(shape):
    rng = np.random.default_rng(0)
    draw, mean = SHAPES[shape]
    for n, written in zip(SIZES, WRITTEN[shape], strict=True):
        low, high = ends(draw(rng, (DRAWS, n)))
        covered = float(((low <= mean) & (mean <= high)).mean())
        assert covered == pytest.approx(written, abs=0.012), (shape, n)
        if shape == "failures":
            assert covered < 0.92  # which the report says beside such intervals
        else:
            assert 0.92 <= covered <= 0.97, (shape, n)


def test_without_a_difference_hardly_any_is_found():
    rng = np.random.default_rng(2)
    for n in SIZES:
        base, *others = rng.beta(9, 1, (4, DRAWS, n))
        told, any_of_three = [], np.zeros(DRAWS, dtype=bool)
        p = []
        for other in others:
            low, high = ends(other - base)
            told.append(((low > 0) | (high < 0)).mean())
            gap = other - base
            t = np.abs(gap.mean(axis=1)) / (gap.std(axis=1, ddof=1) / math.sqrt(n))
            p.append(2 * stats.t.sf(t, n - 2))
        assert max(told) <= 0.055, n
        # Holm finds something where the smallest of three is below 0.05 / 3
        any_of_three = np.min(p, axis=0) < 0.05 / 3
        assert any_of_three.mean() <= 0.05, n
        for draw in range(50):
            assert (min(holm([float(one[draw]) for one in p])) < 0.05) == any_of_three[draw]


def test_holm_by_hand_and_without_what_was_not_compared():
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    first, none, last = holm([0.01, math.nan, 0.04])
    assert (first, last) == pytest.approx((0.02, 0.04)) and math.isnan(none)
    assert holm([]) == []


@pytest.mark.parametrize("n", range(6))
def test_no_interval_below_six_cases(n):
    found = t_interval([0.9] * n)
    assert found.n == n and not found.told
    assert all(math.isnan(one) for one in (found.low, found.high, found.p))


def test_many_cases_need_no_memory():
    """Ten thousand resamples of ten thousand cases were 1.6 GB at once."""
    values = np.random.default_rng(0).beta(8, 2, 10_000).tolist()
    tracemalloc.start()
    t_interval(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
