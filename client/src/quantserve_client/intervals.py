"""Confidence intervals of shares, all of 95 %. Pure Python."""

from __future__ import annotations

from math import comb, sqrt
from typing import Final, NamedTuple

Z: Final = 1.959964
"""The 97.5th percentile of the normal distribution."""


class Share(NamedTuple):
    """A share with its interval; all None without a sample."""

    value: float | None
    low: float | None
    high: float | None


def wilson(successes: int, count: int) -> Share:
    """A share with Wilson's score interval (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    Args:
        successes: how many.
        count: of how many independent trials.
    """
    if not count:
        return Share(None, None, None)
    share, square = successes / count, Z * Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = Z / (1 + square / count) * sqrt(share * (1 - share) / count + square / (4 * count * count))
    low = middle - half if successes else 0.0  # exact, where floats miss it by a bit
    high = middle + half if successes < count else 1.0
    return Share(share, low, high)


def paired(only_first: int, only_second: int, count: int) -> Share:
    """The difference of two shares of the same trials, with Bonett and Price's adjusted Wald interval (2012,
    doi:10.3102/1076998611411915).

    Args:
        only_first, only_second: trials in which one of the two succeeded and the other did not.
        count: all trials.
    """
    if not count:
        return Share(None, None, None)
    first, second = (only_first + 1) / (count + 2), (only_second + 1) / (count + 2)
    half = Z * sqrt((first + second - (first - second) ** 2) / (count + 2))
    return Share((only_first - only_second) / count, max(-1.0, first - second - half), min(1.0, first - second + half))


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value that both shares are equal (McNemar 1947, by the binomial distribution)."""
    count = only_first + only_second
    if not count:
        return 1.0
    tail = sum(comb(count, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << count))  # whole numbers, however large


def win_rate(wins: int, losses: int, count: int) -> Share:
    """Wins and half of the ties over all comparisons: 1/2 + (wins - losses) / (2 count), with the interval of `paired`.

    Args:
        wins, losses: of the first of two.
        count: comparisons, ties included.
    """
    value, low, high = paired(wins, losses, count)
    if value is None or low is None or high is None:
        return Share(None, None, None)
    return Share(0.5 + value / 2, 0.5 + low / 2, 0.5 + high / 2)
