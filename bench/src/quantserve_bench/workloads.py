"""The workloads by name: prompts, number of requests, load shape."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from quantserve.errors import UsageError, unknown_name
from quantserve_bench.load import Closed, Load, Open, Rounds, Timed
from quantserve_bench.prompts import (
    POEM_TOKENS,
    Lengths,
    Maker,
    llmperf_request,
    random_request,
    rayllm_request,
    sonnet_request,
)
from quantserve_bench.request import Request
from quantserve_bench.tokens import Tokenizer

WARMUP_TOKENS: Final = 8


@dataclass(frozen=True)
class Workload:
    """How requests are made and sent.

    Attributes:
        name: as on the command line.
        summary: one line.
        requests: how many.
        concurrency: users, or the size of a round.
        input_tokens, output_tokens: lengths; that of the output is a maximum, or exact with `ignore_eos`.
        rounds: barrier rounds instead of a closed loop.
        ignore_eos: answers have exactly the requested length.
        temperature: None leaves it to the server.
        prefix_tokens: length of the common prefix of all prompts.
        make: makes a request; for a trace only warm-up requests.
    """

    name: str
    summary: str
    requests: int
    concurrency: int
    input_tokens: Lengths
    output_tokens: Lengths
    make: Callable[[Maker], Request]
    rounds: bool = False
    ignore_eos: bool = False
    temperature: float | None = None
    prefix_tokens: int = 0


WORKLOADS: Final[Mapping[str, Workload]] = {
    workload.name: workload
    for workload in (
        Workload(
            "rayllm-2023",
            "RayLLM's quantization tables of 2023: legacy llmperf, 300 requests in rounds of 10, about 500 tokens in, "
            "at most 384 out, temperature 0",
            requests=300,
            concurrency=10,
            input_tokens=Lengths(POEM_TOKENS),
            output_tokens=Lengths(384),
            make=rayllm_request,
            rounds=True,
            temperature=0.0,
        ),
        Workload(
            "llmperf",
            "llmperf since December 2023: 550 sd 150 tokens in, at most 150 sd 80 out, 10 users",
            requests=100,
            concurrency=10,
            input_tokens=Lengths(550, 150),
            output_tokens=Lengths(150, 80),
            make=llmperf_request,
        ),
        Workload(
            "random",
            "random tokens of exact lengths: 512 in, 128 out, EOS ignored (like random of vllm bench serve)",
            requests=100,
            concurrency=10,
            input_tokens=Lengths(512),
            output_tokens=Lengths(128),
            make=random_request,
            ignore_eos=True,
            temperature=0.0,
        ),
        Workload(
            "sonnet",
            "lines of poetry with a common prefix of 200 tokens: 550 in, at most 150 out",
            requests=100,
            concurrency=10,
            input_tokens=Lengths(550),
            output_tokens=Lengths(150),
            make=sonnet_request,
            prefix_tokens=200,
        ),
        Workload(
            "trace",
            "a JSON lines file with timestamps and lengths or prompts, replayed at its times (--trace FILE)",
            requests=0,
            concurrency=10,
            input_tokens=Lengths(64),
            output_tokens=Lengths(16),
            make=llmperf_request,
            temperature=0.0,
        ),
    )
}


def find_workload(name: str) -> Workload:
    """A workload by name.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in WORKLOADS:
        raise UsageError(unknown_name("workload", name, WORKLOADS))
    return WORKLOADS[name]


def requests(
    workload: Workload, tokenizer: Tokenizer | None, seed: int, nonce: str = "", first: int = 0
) -> Iterator[Request]:
    """Endless requests of a workload; the same seed, nonce and tokenizer give the same ones.

    Args:
        workload: any but a trace.
        tokenizer: None estimates lengths.
        seed: of all random choices.
        nonce: prefix that makes every prompt unique; empty for none.
        first: number of the first request.
    """
    maker = Maker(workload, random.Random(f"{seed}/{first}"), tokenizer, nonce)
    maker.number = first
    while True:
        yield workload.make(maker)
        maker.number += 1


def warmup_requests(workload: Workload, tokenizer: Tokenizer | None, count: int, nonce: str) -> list[Request]:
    """Requests like those of the workload, but with other prompts and short answers."""
    made = islice(requests(workload, tokenizer, seed=-1, nonce=nonce and nonce + "w", first=10**6), count)
    return [replace(request, max_tokens=min(WARMUP_TOKENS, request.max_tokens or WARMUP_TOKENS)) for request in made]


def shape(
    workload: Workload,
    concurrency: int,
    *,
    rate: float | None = None,
    rate_end: float | None = None,
    ramp_s: float = 0.0,
    poisson: bool = True,
    rounds: bool | None = None,
    times: Sequence[float] | None = None,
    max_concurrency: int | None = None,
    seed: int = 0,
) -> Load:
    """The load shape for these options.

    Args:
        workload: has the default shape.
        concurrency: users of a closed load, or size of a round.
        rate, rate_end, ramp_s, poisson, max_concurrency, seed: as for `Open`.
        rounds: whether to send in barrier rounds; None for the workload's default.
        times: of a trace.
    """
    if rate is not None:
        return Open(rate, rate_end, ramp_s, poisson, max_concurrency, seed)
    if times is not None:
        return Timed(times, max_concurrency)
    if workload.rounds if rounds is None else rounds:
        return Rounds(concurrency)
    return Closed(concurrency, ramp_s)
