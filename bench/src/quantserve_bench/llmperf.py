"""Writes llmperf's result files, for tools that read them.

Names, keys and nesting are those of llmperf's token benchmark (version 2023-08-31). Three things differ on purpose:
numbers are numbers where llmperf wrote some as text, token counts are the server's where it has any, and failed
requests are counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from quantserve_bench.measured import Measured
from quantserve_bench.session import Measurement, Settings
from quantserve_bench.statistics import PERCENTILES, summarize
from quantserve_bench.timing import Timing, timing_of

VERSION: Final = "2023-08-31"
METRICS: Final = (
    "inter_token_latency_s",
    "ttft_s",
    "end_to_end_latency_s",
    "request_output_throughput_token_per_s",
    "number_input_tokens",
    "number_output_tokens",
)


def base_name(model: str, settings: Settings) -> str:
    """``{model}_{mean input}_{mean output}``, with hyphens for all other characters than letters, digits and ``_``."""
    workload = settings.workload
    name = f"{model}_{workload.input_tokens.mean:.0f}_{workload.output_tokens.mean:.0f}"
    return re.sub(r"-{2,}", "-", re.sub(r"[^\w\d-]+", "-", name))


def individual_responses(measurement: Measurement) -> list[dict[str, Any]]:
    """``<base>_individual_responses.json``."""
    return [
        _failed(result.failure.code, result.failure.message)
        if result.failure
        else {"error_code": None, "error_msg": "", **_values(timing_of(result))}
        for result in measurement.run
    ]


def _values(timing: Timing) -> dict[str, Any]:
    """The metrics of one answer by llmperf's formulas; with streaming its TTFT is that of the first content."""
    # llmperf divides by the number of data chunks, empty ones at begin and end included.
    chunks = len(timing.choice_gaps_s) + 1
    to_last = timing.last_choice_s if timing.last_choice_s is not None else timing.e2e_s
    return {
        "inter_token_latency_s": to_last / chunks,
        "ttft_s": timing.first_content_s or 0,
        "end_to_end_latency_s": timing.e2e_s,
        "request_output_throughput_token_per_s": timing.tokens_per_s or 0,
        "number_total_tokens": (timing.input_tokens or 0) + timing.output_tokens,
        "number_output_tokens": timing.output_tokens,
        "number_input_tokens": timing.input_tokens or 0,
    }


def _failed(code: int | str, message: str) -> dict[str, Any]:
    """A failed request; llmperf's code for everything without an HTTP status is -1."""
    return {
        "error_code": code if isinstance(code, int) else -1,
        "error_msg": message,
        "inter_token_latency_s": 0,
        "ttft_s": 0,
        "end_to_end_latency_s": 0,
        "request_output_throughput_token_per_s": 0,
        "number_total_tokens": 0,
        "number_output_tokens": 0,
        "number_input_tokens": 0,
    }


def summary(measurement: Measurement, settings: Settings, metadata: Mapping[str, str]) -> dict[str, Any]:
    """``<base>_summary.json``: one flat object."""
    workload = settings.workload
    rows = [_values(timing) for timing in measurement.measured.timings]
    out: dict[str, Any] = {
        "version": VERSION,
        "name": f"{base_name(measurement.served.id, settings)}_summary",
        "model": measurement.served.id,
        "mean_input_tokens": workload.input_tokens.mean,
        "stddev_input_tokens": workload.input_tokens.stddev,
        "mean_output_tokens": workload.output_tokens.mean,
        "stddev_output_tokens": workload.output_tokens.stddev,
        "num_concurrent_requests": measurement.level,
        **{f"additional_sampling_params_{key}": value for key, value in settings.extra.items()},
    }
    for metric in METRICS:
        numbers = summarize((row[metric] for row in rows), PERCENTILES)
        if numbers:
            key = f"results_{metric}"
            out |= {f"{key}_quantiles_p{percent}": value for percent, value in numbers.percentiles.items()}
            out |= {f"{key}_mean": numbers.mean, f"{key}_min": numbers.minimum, f"{key}_max": numbers.maximum}
            out |= {f"{key}_stddev": numbers.stddev}
    return {**out, **_counts(measurement.measured), **metadata, "timestamp": int(measurement.run.unix_time)}


def _counts(measured: Measured) -> dict[str, Any]:
    totals = measured.totals
    return {
        "results_num_requests_started": int(totals["requests"]),
        "results_error_rate": totals["error_rate"],
        "results_number_errors": int(totals["errors"]),
        "results_error_code_frequency": json.dumps(dict(measured.error_codes)),
        "results_mean_output_throughput_token_per_s": totals["output_tokens_per_s"],
        "results_num_completed_requests": int(totals["completed"]),
        "results_num_completed_requests_per_min": totals["requests_per_min"],
    }
