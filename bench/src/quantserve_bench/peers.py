"""The metrics of a run by the names and definitions of other tools."""

from __future__ import annotations

from collections.abc import Sequence

from quantserve_bench.load import Run
from quantserve_bench.statistics import summarize
from quantserve_bench.timing import Count, timing_of


def vllm_result(run: Run, count: Count | None = None, percentiles: Sequence[int] = (50, 99)) -> dict[str, float]:
    """The run under the names and by the definitions of ``vllm bench serve`` 0.32: times in ms.

    There TTFT ends with the first event with choices, E2E and TPOT with the last one, the gaps are those between
    events with choices, and the standard deviation divides by n.
    """
    timings = [timing_of(result, count) for result in run if result.ok]
    # There an answer without any event with choices has failed.
    timings = [timing for timing in timings if timing.first_choice_s is not None]
    output = sum(timing.output_tokens for timing in timings)
    inputs = sum(timing.input_tokens or 0 for timing in timings)
    duration = run.duration_s or 1.0
    out: dict[str, float] = {
        "duration": run.duration_s,
        "completed": len(timings),
        "failed": len(run) - len(timings),
        "total_input_tokens": inputs,
        "total_output_tokens": output,
        "request_throughput": len(timings) / duration,
        "output_throughput": output / duration,
        "total_token_throughput": (inputs + output) / duration,
    }
    samples: dict[str, list[float | None]] = {
        "ttft": [timing.first_choice_s for timing in timings],
        "tpot": [timing.vllm_tpot_s for timing in timings],
        "itl": [gap for timing in timings for gap in timing.choice_gaps_s],
        "e2el": [timing.last_choice_s for timing in timings],
    }
    for name, values in samples.items():
        summary = summarize([value * 1000 for value in values if value is not None], percentiles)
        if summary:
            out |= {f"mean_{name}_ms": summary.mean, f"median_{name}_ms": summary.median}
            out |= {f"std_{name}_ms": summary.stddev_population}
            out |= {f"p{percent}_{name}_ms": summary.percentiles[percent] for percent in percentiles}
    return out
