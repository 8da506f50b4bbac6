"""The figures of an answer, defined as in ``quantserve bench``: TTFT, TPOT, tok/s, tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rich.markup import escape
from rich.table import Table

from quantserve.cli.output import table
from quantserve_bench.markdown import DASH, number
from quantserve_bench.result import Result
from quantserve_bench.timing import Timing, timing_of

Expected = Mapping[str, float]
"""``ttft_ms``, ``tpot_ms`` and ``tokens_per_s`` of one request alone, as far as a server tells."""
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


def expected_of(status: Mapping[str, Any] | None) -> dict[str, Expected]:
    """What quantserve expects of each model and adapter.

    Args:
        status: see `Server.status`.
    """
    found: dict[str, Expected] = {}
    for model in status["models"] if status else ():
        told = model.get("expected")
        told = told.get("alone") or told if isinstance(told, dict) else None
        if isinstance(told, dict):
            figures = {key: value for key, value in told.items() if type(value) in (int, float)}
            adapters = model.get("adapters")
            names = [model["id"], *(adapters if isinstance(adapters, list) else ())]
            found |= {str(name): figures for name in names}
    return found


def stats(results: Sequence[tuple[str, Result]], expected: Mapping[str, Expected]) -> Table:
    """A table with a row for each model: means over its complete answers, behind what is expected where that is known.

    Args:
        results: model and answer of each request.
        expected: see `expected_of`.
    """
    names = list(dict.fromkeys(model for model, _ in results))
    known = any(name in expected for name in names)
    rows = []
    for model in names:
        own = [result for name, result in results if name == model]
        timings = [timing_of(result) for result in own if result.ok and result.events]

        def cell(name: str, scale: float = 1, key: str = "", model: str = model, made: Any = timings) -> str:
            measured = _mean(made, name, scale)
            value = expected.get(model, {}).get(key)
            return f"{DASH if value is None else number(value)} / {measured}" if known and key else measured

        rows.append(
            [
                escape(model),
                cell("ttft_s", 1000, "ttft_ms"),
                cell("tpot_s", 1000, "tpot_ms"),
                cell("tokens_per_s", 1, "tokens_per_s"),
                cell("e2e_s", 1000),
                cell("input_tokens"),
                cell("output_tokens"),
                f"{sum(result.ok for result in own)} of {len(own)}",
            ]
        )
    title = "Means per answer; tok/s is tokens / E2E" + ("; expected of one request alone / measured" if known else "")
    return table(title, COLUMNS, rows, wrap=("model",))


def _mean(timings: Sequence[Timing], name: str, scale: float = 1) -> str:
    values = [value for timing in timings if (value := getattr(timing, name)) is not None]
    return number(scale * mean(values)) if values else DASH


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
