"""Traces: requests and their times from a JSON lines file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from quantserve.errors import UsageError, unknown_name
from quantserve_bench.prompts import Lengths, Maker, llmperf_request, random_request
from quantserve_bench.request import Request
from quantserve_bench.tokens import Tokenizer
from quantserve_bench.workloads import Workload

TRACE_KEYS: Final = {
    "timestamp", "input_length", "output_length", "input_tokens", "output_tokens", "prompt", "messages", "max_tokens",
    "hash_ids",
}  # fmt: skip


def read_trace(path: Path, workload: Workload, tokenizer: Tokenizer | None, seed: int, nonce: str, unit: str = "s",
               limit: int | None = None) -> tuple[list[Request], list[float]]:  # fmt: skip
    """Requests of a trace and their send times, in seconds from the first.

    A line has ``timestamp`` and either a ``prompt`` or ``messages`` with ``max_tokens``, or ``input_length`` and
    ``output_length`` (aliases: ``input_tokens``, ``output_tokens``); then a prompt of that length is made and EOS is
    ignored.

    Args:
        path: JSON lines.
        workload: defaults of values that a line does not set.
        tokenizer: for lengths.
        seed, nonce: as for `requests`.
        unit: of the timestamps: ``s`` or ``ms``.
        limit: lines to read at most.

    Raises:
        UsageError: with file and line.
    """
    maker = Maker(workload, random.Random(seed), tokenizer, nonce)
    made: list[Request] = []
    times: list[float] = []
    for number, line in _trace_lines(path, limit):
        where = f"{path}:{number}"
        maker.number = number
        made.append(_trace_request(maker, line, where))
        at = line.get("timestamp", times[-1] if times else 0.0)
        if not isinstance(at, int | float) or isinstance(at, bool):
            raise UsageError(f"{where}: timestamp must be a number, got {at!r}")
        times.append(float(at) / (1000.0 if unit == "ms" else 1.0))
    if not made:
        raise UsageError(
            f"--trace {path}: the file has no requests\n  fix: write one JSON object with a timestamp per line"
        )
    order = sorted(range(len(times)), key=times.__getitem__)
    return [made[i] for i in order], [times[i] - min(times) for i in order]


def _trace_lines(path: Path, limit: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--trace {path}: cannot be read: {error}") from None
    taken = 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(value, dict):
            raise UsageError(f"{path}:{number}: not a JSON object")
        for key in value:
            if key not in TRACE_KEYS:
                raise UsageError(f"{path}:{number}: {unknown_name('key', key, TRACE_KEYS)}")
        yield number, value
        taken += 1
        if taken == limit:
            return


def _trace_request(maker: Maker, line: Mapping[str, Any], where: str) -> Request:
    cap = line.get("max_tokens", line.get("output_length", line.get("output_tokens")))
    if cap is not None and (not isinstance(cap, int) or cap < 1):
        raise UsageError(f"{where}: the output length must be a number of tokens above 0, got {cap!r}")
    temperature = maker.workload.temperature
    if "prompt" in line or "messages" in line:
        prompt, messages = line.get("prompt"), line.get("messages")
        return Request(messages, prompt if messages is None else None, max_tokens=cap, temperature=temperature)
    length = line.get("input_length", line.get("input_tokens"))
    if not isinstance(length, int) or length < 1 or cap is None:
        raise UsageError(f"{where}: a line needs prompt or messages, or input_length and output_length")
    sized = replace(maker.workload, input_tokens=Lengths(length), output_tokens=Lengths(cap), ignore_eos=True)
    chance = random.Random(f"{maker.chance.random()}")
    local = replace(maker, workload=sized, chance=chance)
    return random_request(local) if maker.tokenizer else llmperf_request(local)
