"""Performance as a profile expects it and as the engines measured it, in the same terms."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantserve.serve.gateway.metrics.text import totals

WINDOW_S: Final = 300.0
"""Averaging window of the observed performance."""
_MOST_MARKS: Final = 100


def expected_means(profile: Mapping[str, Any]) -> dict[str, float]:
    """A performance profile as ``ttft_seconds``, ``tpot_seconds`` and ``output_tokens_per_second``.

    TPOT is (E2E - TTFT) / (tokens - 1), vLLM's definition. An ITL that includes the TTFT (E2E / tokens) is
    converted: it gives the number of tokens, and that gives TPOT.
    """
    value = {key: float(number) for key, number in profile.items() if _positive(number)}
    e2e, ttft, itl, tpot = (value.get(f"{name}_ms") for name in ("e2e", "ttft", "itl", "tpot"))
    if tpot is None and itl is not None:
        if "E2E" not in str(profile.get("itl_definition", "E2E")):
            tpot = itl
        elif e2e is not None and ttft is not None and e2e > ttft and e2e / itl > 1.5:
            tpot = (e2e - ttft) / (e2e / itl - 1)
    found = {
        "ttft_seconds": ttft and ttft / 1000,
        "tpot_seconds": tpot and tpot / 1000,
        "output_tokens_per_second": value.get("output_tokens_per_s"),
    }
    return {name: number for name, number in found.items() if number}


@dataclass(frozen=True, slots=True)
class Window:
    """What the engines of a model did in the time that its means cover: seconds, requests, output tokens of those."""

    seconds: float
    requests: float
    tokens: float


class Observed:
    """Means per model over a sliding window, from the cumulative metrics of the replicas' vLLM.

    Args:
        window_s: length of the window.
        clock: seconds, monotonic.
    """

    REQUESTS: Final = "vllm:time_to_first_token_seconds_count"
    TOKENS: Final = "vllm:request_generation_tokens_sum"
    RATIOS: Final[Mapping[str, tuple[str, str]]] = {
        "ttft_seconds": ("vllm:time_to_first_token_seconds_sum", REQUESTS),
        "tpot_seconds": (
            "vllm:request_time_per_output_token_seconds_sum",
            "vllm:request_time_per_output_token_seconds_count",
        ),
        # Per user, like the expected value: tokens of the completed requests / their total duration.
        "output_tokens_per_second": (TOKENS, "vllm:e2e_request_latency_seconds_sum"),
    }
    NAMES: Final = tuple(sorted({name for pair in RATIOS.values() for name in pair}))

    def __init__(self, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.window_s = window_s
        self._clock = clock
        self._last: dict[tuple[str, str], dict[str, float]] = {}
        self._sums: dict[str, dict[str, float]] = {}
        self._marks: dict[str, deque[tuple[float, dict[str, float]]]] = {}

    def add(self, model: str, replica: str, text: bytes) -> None:
        """Add one replica's metrics; the first call sets the baseline."""
        found = {**dict.fromkeys(self.NAMES, 0.0), **totals(text, self.NAMES)}
        before = self._last.get((model, replica), found)
        if any(found[name] < before[name] for name in self.NAMES):  # the engine was restarted
            before = dict.fromkeys(self.NAMES, 0.0)
        sums = self._sums.setdefault(model, dict.fromkeys(self.NAMES, 0.0))
        for name in self.NAMES:
            sums[name] += found[name] - before[name]
        self._last[model, replica] = found

    def mark(self, present: Iterable[tuple[str, str]]) -> None:
        """End one round over all replicas; `present` are those (model, replica) that exist."""
        self._last = {key: self._last[key] for key in present if key in self._last}
        now = self._clock()
        for model, sums in self._sums.items():
            marks = self._marks.setdefault(model, deque())
            if len(marks) > 1 and now - marks[-2][0] < self.window_s / _MOST_MARKS:
                marks.pop()
            marks.append((now, dict(sums)))
            while len(marks) > 1 and marks[1][0] <= now - self.window_s:
                marks.popleft()

    def means(self, model: str) -> dict[str, float]:
        """As `expected_means`; metrics without a request in the window are omitted."""
        marks = self._marks.get(model)
        if not marks:
            return {}
        (_, first), (_, last) = marks[0], marks[-1]
        return {
            name: (last[above] - first[above]) / (last[below] - first[below])
            for name, (above, below) in self.RATIOS.items()
            if last[below] > first[below]
        }

    def window(self, model: str) -> Window | None:
        """What the means are of; None before there are two rounds."""
        marks = self._marks.get(model)
        if not marks or marks[-1][0] <= marks[0][0]:
            return None
        (began, first), (ended, last) = marks[0], marks[-1]
        requests, tokens = (last[name] - first[name] for name in (self.REQUESTS, self.TOKENS))
        return Window(ended - began, requests, tokens)


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
