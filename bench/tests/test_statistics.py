"""Summaries against definitions, numpy and the standard library."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantserve_bench.statistics import PERCENTILES, mean_over_time, quantile, summarize

# Nothing that is measured is that near to zero; squares of smaller ones underflow.
values = st.floats(-1e9, 1e9).map(lambda value: value if abs(value) > 1e-12 else 0.0)
samples = st.lists(values, min_size=1, max_size=60)


def test_by_hand() -> None:
    summary = summarize([4, 1, 3, 2])
    assert summary is not None
    assert (summary.count, summary.mean, summary.minimum, summary.maximum) == (4, 2.5, 1, 4)
    assert summary.stddev == pytest.approx((5 / 3) ** 0.5)
    assert summary.stddev_population == pytest.approx((5 / 4) ** 0.5)
    assert summary.median == 2.5
    assert summary.percentiles[25] == 1.75
    assert summary.percentiles[90] == pytest.approx(3.7)  # llmperf's p90 of ten or fewer lies between the two highest


def test_empty_samples_and_invalid_values() -> None:
    assert summarize([]) is None
    with pytest.raises(ValueError, match="not finite"):
        summarize([1.0, float("nan")])


@settings(deadline=None)
@given(samples)
def test_like_numpy_and_the_standard_library(sample: list[float]) -> None:
    summary = summarize(sample)
    assert summary is not None
    scale = max(map(abs, sample)) or 1.0
    for percent in PERCENTILES:
        assert summary.percentiles[percent] == pytest.approx(np.percentile(sample, percent), abs=1e-9 * scale)
    assert summary.mean == pytest.approx(statistics.fmean(sample), abs=1e-9 * scale)
    assert summary.stddev_population == pytest.approx(np.std(sample), abs=1e-6 * scale)
    if len(sample) > 1:
        assert summary.stddev == pytest.approx(statistics.stdev(sample), abs=1e-6 * scale)


@settings(deadline=None)
@given(samples, st.randoms())
def test_percentiles_rise_stay_inside_and_forget_the_order(sample: list[float], chance: object) -> None:
    summary = summarize(sample)
    assert summary is not None
    rising = [summary.minimum, *(summary.percentiles[p] for p in sorted(summary.percentiles)), summary.maximum]
    assert rising == sorted(rising)
    assert summary.minimum <= summary.mean <= summary.maximum
    shuffled = list(sample)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert summarize(shuffled) == summary


@settings(deadline=None)
@given(samples, st.floats(0.001, 1000), st.floats(-1000, 1000))
def test_a_change_of_unit_changes_everything_alike(sample: list[float], factor: float, shift: float) -> None:
    before, after = summarize(sample), summarize(value * factor + shift for value in sample)
    assert before is not None
    assert after is not None
    near = 1e-9 * (max(map(abs, sample)) * factor + abs(shift) + 1)
    assert after.mean == pytest.approx(before.mean * factor + shift, abs=near)
    for percent in PERCENTILES:
        assert after.percentiles[percent] == pytest.approx(before.percentiles[percent] * factor + shift, abs=near)
    assert after.stddev == pytest.approx(before.stddev * factor, rel=1e-6, abs=1e4 * near)


@settings(deadline=None)
@given(samples, st.floats(0, 1))
def test_a_quantile_splits_the_sample(sample: list[float], share: float) -> None:
    ordered = sorted(sample)
    value = quantile(ordered, share)
    below = sum(item < value for item in ordered)
    at_most = sum(item <= value for item in ordered)
    assert below <= share * (len(ordered) - 1) + 1
    assert at_most >= share * (len(ordered) - 1)


def test_a_step_function_by_hand() -> None:
    # 0 until 1, 1 until 2, 2 until 4, 1 until 6, 0 later
    steps = [(1.0, 1), (6.0, -1), (2.0, 1), (4.0, -1)]
    assert mean_over_time(steps, 0.0, 10.0) == (0.7, 2)
    assert mean_over_time(steps, 2.0, 4.0) == (2.0, 2)
    assert mean_over_time(steps, 4.0, 6.0) == (1.0, 1)
    assert mean_over_time([], 0.0, 1.0) == (0.0, 0)
    assert mean_over_time(steps, 3.0, 3.0) == (0.0, 0)


intervals = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)).map(lambda x: (x[0], x[0] + x[1])), max_size=20)


@settings(deadline=None)
@given(intervals, st.integers(0, 40), st.integers(1, 60))
def test_a_step_function_like_counting(spans: list[tuple[int, int]], begin: int, length: int) -> None:
    """With whole numbers the mean is that of the levels in the unit cells."""
    cells = [sum(a <= cell < b for a, b in spans) for cell in range(begin, begin + length)]
    changes = [change for a, b in spans for change in ((float(a), 1), (float(b), -1))]
    mean, most = mean_over_time(changes, float(begin), float(begin + length))
    assert mean == pytest.approx(sum(cells) / length)
    assert most == max(cells)
