"""The figures of an answer, defined as in ``quantserve bench``: TTFT, TPOT, tok/s, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from rich.markup import escape
from rich.table import Table

from quantserve.cli.output import table
from quantserve_bench.markdown import number
from quantserve_bench.result import Result
from quantserve_bench.timing import Timing, timing_of

COLUMNS = ("model", "TTFT (ms)", "TPOT (ms)", "tok/s", "E2E (ms)", "tokens in", "tokens out", "answers")


def as_json(model: str, prompt: str, result: Result) -> dict[str, Any]:
    """An answer as plain data; figures are null where the answer failed."""
    timing = timing_of(result) if result.ok and result.events else None
    usage = result.usage
    return {
        "model": model,
        "prompt": prompt,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "tokens_in": usage.prompt if usage else None,
        "tokens_out": timing.output_tokens if timing else usage.completion if usage else None,
        "ttft_ms": _ms(timing.ttft_s) if timing else None,
        "tpot_ms": _ms(timing.tpot_s) if timing else None,
        "tokens_per_s": timing.tokens_per_s if timing else None,
        "e2e_ms": _ms(result.end - result.start),
        "error": {"code": result.failure.code, "message": result.failure.message} if result.failure else None,
    }


def line(result: Result) -> str:
    """The figures of one answer in a line."""
    if not result.events:
        return ""
    timing = timing_of(result)
    parts = [
        f"TTFT {number(_ms(timing.ttft_s))} ms",
        f"TPOT {number(_ms(timing.tpot_s))} ms",
        f"{number(timing.tokens_per_s)} tok/s",
        f"{timing.output_tokens} tokens",
    ]
    return ", ".join(part for part in parts if not part.split(" ", 1)[-1].startswith("-"))


def stats(results: Sequence[tuple[str, Result]]) -> Table:
    """A table with a row for each model: means over its complete answers.

    Args:
        results: model and answer of each request.
    """
    rows = []
    for model in dict.fromkeys(model for model, _ in results):
        own = [result for name, result in results if name == model]
        timings = [timing_of(result) for result in own if result.ok and result.events]
        rows.append(
            [
                escape(model),
                _mean(timings, "ttft_s", 1000),
                _mean(timings, "tpot_s", 1000),
                _mean(timings, "tokens_per_s"),
                _mean(timings, "e2e_s", 1000),
                _mean(timings, "input_tokens"),
                _mean(timings, "output_tokens"),
                f"{sum(result.ok for result in own)} of {len(own)}",
            ]
        )
    return table("Means per answer; tok/s is tokens / E2E", COLUMNS, rows)


def _mean(timings: Sequence[Timing], name: str, scale: float = 1) -> str:
    values = [value for timing in timings if (value := getattr(timing, name)) is not None]
    return number(scale * mean(values)) if values else "-"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
