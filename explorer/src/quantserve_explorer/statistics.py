"""Win rates with intervals.

In a vote the winner meets each of the others and wins; in a tie all meet, and each wins half of each meeting. The
meetings of one vote are not independent, so the interval's sample size is the number of votes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from typing import Any, Final

Z: Final = 1.959964
"""Of a 95 % interval."""
Kind = tuple[tuple[str, ...], tuple[str, ...], str | None]


@dataclass
class Score:
    """Votes, meetings and wins of a model or a method."""

    votes: int = 0
    meetings: int = 0
    won: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the win rate and Wilson's interval."""
        rate = self.won / self.meetings
        low, high = wilson(rate, self.votes)
        return {
            "votes": self.votes,
            "won": self.won,
            "meetings": self.meetings,
            "win_rate": round(rate, 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share seen in `count` trials.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    centre = rate + Z * Z / (2 * count)
    spread = Z * sqrt(rate * (1 - rate) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    return max(0.0, min(rate, (centre - spread) / scale)), min(1.0, max(rate, (centre + spread) / scale))


def summary(votes: int, kinds: Mapping[Kind, int]) -> dict[str, Any]:
    """What ``GET /explorer/votes`` returns: methods and models, best first.

    Args:
        votes: how many there are.
        kinds: how many of each: models, their methods, and the winner.
    """
    models: dict[str, Score] = {}
    methods: dict[str, Score] = {}
    method_of: dict[str, str] = {}
    for (names, kind_methods, winner), count in kinds.items():
        method_of |= dict(zip(names, kind_methods, strict=True))
        _count(models, names, names, winner, count)
        _count(methods, names, kind_methods, winner, count)
    return {
        "votes": votes,
        "methods": [{"name": name, **score.to_json()} for name, score in _best_first(methods)],
        "models": [{"name": name, "method": method_of[name], **score.to_json()} for name, score in _best_first(models)],
    }


def _count(
    scores: dict[str, Score], names: Sequence[str], labels: Sequence[str], winner: str | None, count: int
) -> None:
    met = set()
    for one, other in _meetings(names, winner):
        first, second = labels[one], labels[other]
        if first == second:
            continue
        met |= {first, second}
        share = 0.5 if winner is None else 1.0
        for label, won in ((first, share), (second, 1 - share)):
            score = scores.setdefault(label, Score())
            score.meetings += count
            score.won += won * count
    for label in met:
        scores[label].votes += count


def _meetings(names: Sequence[str], winner: str | None) -> Iterator[tuple[int, int]]:
    """Pairs of indices that meet; the winner comes first."""
    if winner is None:
        yield from combinations(range(len(names)), 2)
    else:
        best = names.index(winner)
        yield from ((best, other) for other in range(len(names)) if other != best)


def _best_first(scores: Mapping[str, Score]) -> list[tuple[str, Score]]:
    return sorted(scores.items(), key=lambda item: (-item[1].won / item[1].meetings, -item[1].votes, item[0]))
