"""Settings from the options of ``quantserve bench``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantserve.errors import UsageError, unknown_name
from quantserve_bench.measured import SLO_KEYS
from quantserve_bench.prompts import Lengths
from quantserve_bench.session import Settings, scaled
from quantserve_bench.workloads import find_workload


def make_settings(
    workload_name: str,
    count: int | None,
    concurrency: tuple[int, ...] | None,
    rate: tuple[float, ...] | None,
    input_tokens: Lengths | None,
    output_tokens: Lengths | None,
    prefix_tokens: int | None,
    scale: float | None,
    ignore_eos: bool | None,
    temperature: float | None,
    extra: str | None,
    slo: str | None,
    trace: Path | None,
    arrival: str,
    ramp: float,
    max_duration: float | None,
    timeout: float,
    stall: float | None,
    **same: Any,
) -> Settings:
    """Settings from the options.

    Raises:
        UsageError: options that contradict each other, or a value that is wrong.
    """
    workload = find_workload("trace" if trace else workload_name)
    if workload.name == "trace" and not trace:
        raise UsageError("the workload trace needs a file\n  fix: give it with --trace FILE")
    if rate and (concurrency or same["rounds"]):
        raise UsageError(
            "--rate (open load) excludes --concurrency and --rounds (closed load)\n  fix: give one of them"
        )
    if same["rate_end"] is not None and not (rate and ramp):
        raise UsageError("--rate-end needs --rate and --ramp\n  fix: e.g. --rate 1 --rate-end 10 --ramp 60")
    if same["max_concurrency"] and not (rate or trace):
        raise UsageError(
            "--max-concurrency needs an open load (--rate or --trace)\n  fix: use --concurrency for a closed load"
        )
    given: dict[str, Any] = {
        "requests": count if count or not trace else 0,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "prefix_tokens": prefix_tokens,
        "ignore_eos": ignore_eos,
        "temperature": temperature,
    }
    workload = replace(workload, **{key: value for key, value in given.items() if value is not None})
    if scale:
        workload = scaled(workload, scale)
    if not same["unique"] and workload.prefix_tokens >= workload.input_tokens.mean:
        limit = f"--input-tokens ({workload.input_tokens.mean:g})"
        raise UsageError(f"--prefix-tokens ({workload.prefix_tokens}) must be less than {limit}")
    return Settings(
        workload,
        concurrencies=concurrency or (workload.concurrency,),
        rates=rate or (),
        ramp_s=ramp,
        poisson=arrival == "poisson",
        max_duration_s=max_duration,
        timeout_s=timeout,
        stall_s=stall,
        slo=limits(slo),
        extra=json_object("--extra", extra),
        trace=trace,
        **same,
    )


def split(text: str | None) -> list[str]:
    """A comma-separated list."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def pairs(option: str, text: str | None) -> dict[str, str]:
    """``a=b,c=d``.

    Raises:
        UsageError: a part has another form.
    """
    out = {}
    for part in split(text):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UsageError(f"{option}: {part!r} is not NAME=VALUE")
        out[key.strip()] = value.strip()
    return out


def limits(text: str | None) -> dict[str, float]:
    """Limits in ms.

    Raises:
        UsageError: a name is unknown, or a value is not a number.
    """
    out = {}
    for key, value in pairs("--slo", text).items():
        if key not in SLO_KEYS:
            raise UsageError(f"--slo: {unknown_name('limit', key, SLO_KEYS)}")
        try:
            out[key] = float(value)
        except ValueError:
            raise UsageError(f"--slo: {key}={value}: {value!r} is not a number of milliseconds") from None
    return out


def json_object(option: str, text: str | None) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        UsageError: it is not a JSON object.
    """
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{option}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f'{option}: {text} is not a JSON object, like {{"top_p": 0.9}}')
    return value
