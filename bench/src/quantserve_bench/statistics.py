"""Summaries of samples: percentiles, spread, counts. Pure Python, so that a report needs no numpy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor, isfinite, sqrt
from typing import Final

PERCENTILES: Final = (25, 50, 75, 90, 95, 99)


@dataclass(frozen=True)
class Summary:
    """A sample in numbers.

    Attributes:
        count: how many values.
        mean, minimum, maximum: of them.
        stddev: with n - 1, as llmperf; 0 for a single value.
        stddev_population: with n, as vLLM.
        percentiles: percent -> value.
    """

    count: int
    mean: float
    stddev: float
    stddev_population: float
    minimum: float
    maximum: float
    percentiles: dict[int, float]

    @property
    def median(self) -> float:
        """The 50th percentile."""
        return self.percentiles[50]


def summarize(values: Iterable[float], percentiles: Sequence[int] = PERCENTILES) -> Summary | None:
    """The summary of a sample; None for an empty one.

    Raises:
        ValueError: a value is not finite.
    """
    ordered = sorted(values)
    if not ordered:
        return None
    if not all(map(isfinite, ordered)):
        raise ValueError("a sample holds a value that is not finite")
    count = len(ordered)
    # The mean of equal floats may miss them by a bit; a mean outside its sample would surprise everyone.
    mean = min(max(sum(ordered) / count, ordered[0]), ordered[-1])
    squares = sum((value - mean) ** 2 for value in ordered)
    return Summary(
        count=count,
        mean=mean,
        stddev=sqrt(squares / (count - 1)) if count > 1 else 0.0,
        stddev_population=sqrt(squares / count),
        minimum=ordered[0],
        maximum=ordered[-1],
        percentiles={percent: quantile(ordered, percent / 100) for percent in sorted({*percentiles, 50})},
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which a share of a sorted sample lies, interpolated between neighbours as numpy and pandas do.

    Args:
        ordered: ascending, not empty.
        share: from 0 to 1.
    """
    position = share * (len(ordered) - 1)
    below = floor(position)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below], ordered[above]
    # This form stays between its neighbours whatever the rounding.
    return min(max(low + (high - low) * (position - below), low), high)


def mean_over_time(changes: Iterable[tuple[float, int]], begin: float, end: float) -> tuple[float, int]:
    """Mean and maximum of a step function between two times.

    Args:
        changes: when it changes and by how much, in any order.
        begin, end: the window, in the unit of the times.
    """
    level, at, area, highest = 0, begin, 0.0, 0
    for time, step in sorted(changes):
        now = min(max(time, begin), end)
        if now > at:
            area += level * (now - at)
            highest = max(highest, level)
            at = now
        level += step
    if end > at:
        area += level * (end - at)
        highest = max(highest, level)
    return (area / (end - begin) if end > begin else 0.0), highest
