"""Measures the models of a running server, one after the other, at each load level."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from quantserve.errors import EngineError, UsageError
from quantserve_bench.causes import with_fix
from quantserve_bench.client import Live
from quantserve_bench.load import Closed, Load, Open, Rounds, Run, Timed, describe, run, run_blocking
from quantserve_bench.measured import SATURATED, Measured, measure
from quantserve_bench.prompts import Lengths
from quantserve_bench.request import Request, Target
from quantserve_bench.served import Served
from quantserve_bench.tokens import Tokenizer, find_tokenizer
from quantserve_bench.trace import read_trace
from quantserve_bench.verdicts import Verdict, compare
from quantserve_bench.workloads import Workload, requests, shape, warmup_requests

SHOW_EVERY_S: Final = 0.25
TEMPLATE_TOKENS: Final = 32
"""Allowance for the tokens that a chat template adds to a prompt."""
GROUPED: Final = 1.5
"""Tokens per event above which the report has a warning."""
CACHED: Final = 0.1
"""Share of cached input tokens above which the report has a warning."""


@dataclass(frozen=True)
class Settings:
    """All parameters of a measurement except the server.

    Attributes:
        workload: with the lengths and the number of requests to use.
        concurrencies: of a closed load, one measurement each.
        rates: of an open load in requests per second, one measurement each; empty for a closed load.
        rate_end, ramp_s, poisson, max_concurrency, rounds: as for `workloads.shape`.
        warmup: requests before each measurement.
        seed: of prompts, lengths and arrivals.
        unique: begin each prompt with a unique text.
        max_duration_s, timeout_s, stall_s: as for `load.run`.
        slo: limits in ms.
        extra: further keys of each request's body.
        tokenizer: file, None asks the server.
        trace: file, and `trace_unit` of its timestamps.
    """

    workload: Workload
    concurrencies: Sequence[int]
    rates: Sequence[float] = ()
    rate_end: float | None = None
    ramp_s: float = 0.0
    poisson: bool = True
    max_concurrency: int | None = None
    rounds: bool | None = None
    warmup: int = 0
    seed: int = 0
    unique: bool = True
    max_duration_s: float | None = None
    timeout_s: float | None = 600.0
    stall_s: float | None = None
    slo: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    trace: Path | None = None
    trace_unit: str = "s"

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the results."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "workload"}
        workload = {name: getattr(self.workload, name) for name in self.workload.__dataclass_fields__ if name != "make"}
        values |= {"concurrencies": list(self.concurrencies), "rates": list(self.rates), "slo": dict(self.slo)}
        values |= {"extra": dict(self.extra), "trace": str(self.trace) if self.trace else None}
        for name in ("input_tokens", "output_tokens"):
            workload[name] = asdict(workload[name])
        return {"workload": workload, **values}


@dataclass(frozen=True)
class Measurement:
    """One model under one load.

    Attributes:
        served: the model.
        load: the shape.
        run, measured: raw and in numbers.
        expected: performance profile as JSON, or None.
        verdicts: against the expected performance.
        tokenizer: source of the prompt lengths; empty if they were estimated.
        warnings: facts that limit the validity of the numbers.
    """

    served: Served
    load: Load
    run: Run
    measured: Measured
    expected: Mapping[str, Any] | None
    verdicts: Sequence[Verdict]
    tokenizer: str
    warnings: Sequence[str]

    @property
    def level(self) -> float:
        """Concurrency of a closed load, rate of an open one."""
        match self.load:
            case Closed() | Rounds():
                return self.load.concurrency
            case Open():
                return self.load.rate
            case Timed():
                return 0.0

    @property
    def load_label(self) -> str:
        """The load in a few words."""
        return describe(self.load)


Show = Callable[[Served, Load, Live, int | None], None]
"""Called a few times a second with the model, the load, its counters and how many requests are planned."""
Expect = Callable[[Served, Load, Measured], Mapping[str, Any] | None]
"""Returns the expected performance of a model under the measured load; called afterwards, when lengths are known."""


def measure_models(
    target: Target,
    models: Sequence[Served],
    settings: Settings,
    show: Show | None = None,
    expect: Expect | None = None,
    done: list[Measurement] | None = None,
) -> list[Measurement]:
    """Measure each model at each level.

    Args:
        target: the server; its model is replaced by each.
        models: in this order.
        settings: what to measure.
        show: for a display.
        expect: default: the expected performance that the server reports.
        done: results are appended here one by one, so that they survive an interruption.

    Raises:
        UsageError: a request does not fit into a model, or the workload needs a tokenizer.
        EngineError: the server does not respond.
    """
    done = [] if done is None else done
    for served in models:
        aimed = replace(target, model=served.id)
        tokenizer = find_tokenizer(aimed, settings.tokenizer)
        for level in settings.rates or settings.concurrencies:
            measurement = _measure(aimed, served, settings, level, tokenizer, show, expect or _as_served)
            done.append(measurement)
    return done


def _measure(
    target: Target,
    served: Served,
    settings: Settings,
    level: float,
    tokenizer: Tokenizer | None,
    show: Show | None,
    expect: Expect,
) -> Measurement:
    nonce = secrets.token_hex(4) if settings.unique else ""
    made, load = _plan(settings, level, tokenizer, nonce)
    made = [replace(request, extra={**request.extra, **settings.extra}) for request in made]
    _check_lengths(served, made)
    _check_answer(target, settings, made[0])
    users = load.concurrency if isinstance(load, Closed | Rounds) else min(10, len(made))
    live = Live()
    if settings.warmup:
        short = warmup_requests(settings.workload, tokenizer, settings.warmup, nonce)
        short = [replace(request, extra={**request.extra, **settings.extra}) for request in short]
        run_blocking(run(target, short, Closed(users), timeout_s=settings.timeout_s, stall_s=settings.stall_s))
    planned = len(made)
    work = run(
        target,
        made,
        load,
        timeout_s=settings.timeout_s,
        stall_s=settings.stall_s,
        max_duration_s=settings.max_duration_s,
        live=live,
    )
    result = run_blocking(_shown(work, lambda: show(served, load, live, planned)) if show else work)
    measured = measure(result, settings.slo, _counter(tokenizer))
    expected = expect(served, load, measured) if measured.timings else None
    return Measurement(
        served,
        load,
        result,
        measured,
        expected,
        compare(expected, measured),
        tokenizer.name if tokenizer else "",
        _warnings(result, measured, tokenizer),
    )


def _as_served(served: Served, load: Load, measured: Measured) -> Mapping[str, Any] | None:
    return served.expected


def _counter(tokenizer: Tokenizer | None) -> Callable[[str], int] | None:
    return None if tokenizer is None else lambda text: len(tokenizer.encode(text)) if text else 0


def _plan(settings: Settings, level: float, tokenizer: Tokenizer | None, nonce: str) -> tuple[list[Request], Load]:
    """All requests, made before the clock starts, and the load."""
    workload = settings.workload
    times = None
    if settings.trace:
        limit = workload.requests or None
        made, times = read_trace(settings.trace, workload, tokenizer, settings.seed, nonce, settings.trace_unit, limit)
    else:
        made = list(islice(requests(workload, tokenizer, settings.seed, nonce), workload.requests))
    load = shape(
        workload,
        int(level) or 1,
        rate=level if settings.rates else None,
        rate_end=settings.rate_end,
        ramp_s=settings.ramp_s,
        poisson=settings.poisson,
        rounds=settings.rounds,
        times=times,
        max_concurrency=settings.max_concurrency,
        seed=settings.seed,
    )
    return made, load


def _check_lengths(served: Served, made: Sequence[Request]) -> None:
    """Refuse requests that exceed the model's context length, before the measurement starts."""
    limit = served.max_model_len
    if limit is None:
        return
    needs = [
        request.input_tokens + (request.max_tokens or 0) + (TEMPLATE_TOKENS if request.messages is not None else 0)
        for request in made
        if request.input_tokens is not None
    ]
    over = sum(need > limit for need in needs)
    if over:
        factor = int(100 * limit / max(needs)) / 100
        raise UsageError(
            f"{over} of {len(made)} requests exceed the context length of {served.id}: the limit is {limit} tokens, "
            f"the longest request needs {max(needs)}\n  fix: multiply --scale (default 1) by "
            f"{max(0.01, factor):g}, or reduce --input-tokens and --output-tokens"
        )


def _check_answer(target: Target, settings: Settings, request: Request) -> None:
    """Send one short request first, so that a wrong key or model gives one error instead of hundreds.

    Raises:
        UsageError: it was refused.
        EngineError: it failed.
    """
    probe = replace(request, max_tokens=1, prompt="Hi", messages=None) if request.messages is None else replace(
        request, max_tokens=1, messages=[{"role": "user", "content": "Hi"}]
    )  # fmt: skip
    outcome = run_blocking(run(target, [probe], Closed(1), timeout_s=settings.timeout_s)).results[0]
    if outcome.failure is None:
        return
    message = f"the first request to {target.model} at {target.url} failed with {outcome.failure.code}: "
    message += outcome.failure.message
    if isinstance(outcome.failure.code, int) and 400 <= outcome.failure.code < 500 and outcome.failure.code != 429:
        raise UsageError(message)
    raise EngineError(with_fix(message, outcome.failure.code))


async def _shown(work: Any, show: Callable[[], None]) -> Run:
    task: asyncio.Task[Run] = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=SHOW_EVERY_S)
            show()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
    return task.result()


def _warnings(result: Run, measured: Measured, tokenizer: Tokenizer | None) -> list[str]:
    warnings = [
        f"{times} of {len(result)} requests failed with {code}: {measured.error_messages[code]}"
        for code, times in measured.error_codes.items()
    ]
    share = measured.totals["client_share"]
    if share > SATURATED:
        warnings.append(f"the client used {share:.0%} of a core: it may limit the measured performance")
    if by_events := measured.sources.get("events"):
        warnings.append(f"the server reported no token counts: in {by_events} answers each event counts as one token")
    per_event = measured.summaries.get("tokens_per_event")
    if per_event and per_event.mean > GROUPED:
        warnings.append(f"{per_event.mean:.1f} tokens per event: chunk gaps are not gaps between tokens")
    cached = sum(timing.cached_tokens or 0 for timing in measured.timings)
    prompts = sum(timing.input_tokens or 0 for timing in measured.timings)
    if prompts and cached > CACHED * prompts:
        warnings.append(f"{cached / prompts:.0%} of the input tokens came from the server's prefix cache")
    if tokenizer is None and result.results and result.results[0].request.input_tokens is not None:
        warnings.append("the server has no /tokenize: prompt lengths are estimates")
    return warnings


def scaled(workload: Workload, factor: float) -> Workload:
    """A workload with all lengths multiplied by a factor."""
    return replace(
        workload,
        input_tokens=workload.input_tokens.scaled(factor),
        output_tokens=Lengths(max(1.0, workload.output_tokens.mean * factor), workload.output_tokens.stddev * factor),
        prefix_tokens=round(workload.prefix_tokens * factor),
    )
