"""A run in numbers: summaries of every metric, totals, errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from quantserve_bench.load import Closed, Rounds, Run
from quantserve_bench.metrics import METRICS
from quantserve_bench.result import Result
from quantserve_bench.statistics import Summary, mean_over_time, summarize
from quantserve_bench.timing import Count, Timing, timing_of

SLO_KEYS: Final = {"ttft": "ttft_s", "tpot": "tpot_s", "e2e": "e2e_s", "normalized": "normalized_s"}
SATURATED: Final = 0.5
"""Share of a core above which the client may limit the results."""


@dataclass(frozen=True)
class Measured:
    """A run in numbers.

    Attributes:
        timings: of the complete answers, in the order of sending.
        summaries: by key of `METRICS`, in its unit; without those that have no value.
        totals: by key of `TOTALS`; goodput only where limits were given.
        error_codes: number of failures by code (as text).
        error_messages: one message per code.
        sources: source of the output token counts -> number of answers.
        slo: limits in ms, by key of `SLO_KEYS`.
    """

    timings: Sequence[Timing]
    summaries: Mapping[str, Summary]
    totals: Mapping[str, float]
    error_codes: Mapping[str, int]
    error_messages: Mapping[str, str]
    sources: Mapping[str, int]
    slo: Mapping[str, float] = field(default_factory=dict)

    def mean(self, key: str) -> float | None:
        """Mean of a metric in its unit."""
        summary = self.summaries.get(key)
        return summary.mean if summary else None

    def to_json(self) -> dict[str, Any]:
        """Plain data: summaries, totals, errors."""
        return {
            "totals": dict(self.totals),
            "metrics": {key: summary_json(summary) for key, summary in self.summaries.items()},
            "error_codes": dict(self.error_codes),
            "error_messages": dict(self.error_messages),
            "output_tokens_counted_by": dict(self.sources),
            **({"slo_ms": dict(self.slo)} if self.slo else {}),
        }


def summary_json(summary: Summary) -> dict[str, float]:
    """A summary as plain data."""
    percentiles = {f"p{percent}": value for percent, value in summary.percentiles.items()}
    return {
        "count": summary.count,
        "mean": summary.mean,
        "stddev": summary.stddev,
        "min": summary.minimum,
        **percentiles,
        "max": summary.maximum,
    }


def measure(run: Run, slo: Mapping[str, float] | None = None, count: Count | None = None) -> Measured:
    """Turn the results of a run into numbers.

    Args:
        run: decoded.
        slo: limits in ms by key of `SLO_KEYS`, for goodput.
        count: counts tokens where the server did not.
    """
    slo = slo or {}
    complete = [result for result in run if result.ok]
    timings = [timing_of(result, count) for result in complete]
    failures = [result.failure for result in run if result.failure]
    summaries = {}
    for key, metric in METRICS.items():
        summary = summarize(value * metric.scale for timing in timings for value in metric.of(timing))
        if summary:
            summaries[key] = summary
    messages: dict[str, str] = {}
    for failure in failures:
        messages.setdefault(str(failure.code), failure.message)
    return Measured(
        timings=timings,
        summaries=summaries,
        totals=_totals(run, complete, timings, slo),
        error_codes=dict(Counter(str(failure.code) for failure in failures).most_common()),
        error_messages=messages,
        sources=dict(Counter(timing.source for timing in timings)),
        slo=slo,
    )


def _totals(
    run: Run, complete: Sequence[Result], timings: Sequence[Timing], slo: Mapping[str, float]
) -> dict[str, float]:
    duration = run.duration_s
    output = sum(timing.output_tokens for timing in timings)
    both = output + sum(timing.input_tokens or 0 for timing in timings)
    begin, end = steady_window(run)
    changes = [change for result in run for change in ((result.start, 1), (result.end, -1))]
    held, _ = mean_over_time(changes, begin, end)
    _, most = mean_over_time(changes, run.began, run.ended)
    arrivals = token_arrivals(complete, timings)

    def per_s(amount: float, seconds: float = duration) -> float:
        return amount / seconds if seconds > 0 else 0.0

    totals: dict[str, float] = {
        "duration_s": duration,
        "requests": len(run),
        "completed": len(complete),
        "errors": len(run) - len(complete),
        "error_rate": (len(run) - len(complete)) / len(run) if len(run) else 0.0,
        "requests_per_s": per_s(len(complete)),
        "requests_per_min": per_s(len(complete)) * 60,
        "output_tokens_per_s": per_s(output),
        "total_tokens_per_s": per_s(both),
        "peak_output_tokens_per_s": max(per_second(arrivals, run.began, run.ended), default=0.0),
        "concurrency_mean": held,
        "concurrency_max": most,
        "steady_s": end - begin,
        "steady_output_tokens_per_s": per_s(sum(n for at, n in arrivals if begin <= at <= end), end - begin),
        "client_share": run.client_share,
        "loop_lag_mean_ms": run.lag_mean_s * 1000,
        "loop_lag_max_ms": run.lag_max_s * 1000,
    }
    if slo:
        good = sum(keeps(timing, slo) for timing in timings)
        totals |= {"goodput_per_s": per_s(good), "goodput_share": good / len(run) if len(run) else 0.0}
    return totals


def steady_window(run: Run) -> tuple[float, float]:
    """Begin and end of the time in which the load was what it was meant to be.

    Of a closed load: from the moment the last user has joined until the last request is sent, after which users begin
    to leave. Rounds have no steady state, so it is the whole run. Of an open load: while requests are sent.
    """
    if not run.results or isinstance(run.load, Rounds):
        return run.began, run.ended
    if isinstance(run.load, Closed):
        users = min(run.load.concurrency, len(run))
        # Early users may have sent several requests before the last one joins.
        joined = run.began + run.load.ramp_s * (run.load.concurrency - 1) / run.load.concurrency
        begin = max(run.results[users - 1].start, joined)
        return begin, max(begin, run.last_launch)
    return run.results[0].start, run.last_launch


def token_arrivals(complete: Sequence[Result], timings: Sequence[Timing]) -> list[tuple[float, float]]:
    """When output tokens came, and how many; an answer's tokens are spread evenly over its events with a token."""
    arrivals = []
    for result, timing in zip(complete, timings, strict=True):
        times = result.token_times or [result.end]
        arrivals += [(at, timing.output_tokens / len(times)) for at in times]
    return arrivals


def per_second(arrivals: Sequence[tuple[float, float]], began: float, ended: float) -> list[float]:
    """Tokens in each second of a run, the last one possibly short."""
    buckets = [0.0] * (int(max(0.0, ended - began)) + 1)
    for at, tokens in arrivals:
        buckets[min(max(int(at - began), 0), len(buckets) - 1)] += tokens
    return buckets


def keeps(timing: Timing, slo: Mapping[str, float]) -> bool:
    """Whether an answer keeps all limits. One token has no TPOT and keeps any; without tokens the others are missed."""
    for key, limit_ms in slo.items():
        value = getattr(timing, SLO_KEYS[key])
        if value is None and key != "tpot":
            return False
        if value is not None and value * 1000 > limit_ms:
            return False
    return True
