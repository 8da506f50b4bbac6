"""One complete answer in numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from quantserve_bench.result import TOKENS, Kind, Result

Count = Callable[[str], int]
"""Tokens of a text, without special tokens."""
Source = Literal["usage", "tokenizer", "events"]
"""Source of the output token count: the server, a tokenizer, or the events with text, each counted as one token."""


@dataclass(frozen=True)
class Timing:
    """One complete answer in numbers; times in seconds, None where they have no meaning.

    Attributes:
        output_tokens, source: count and its source.
        input_tokens: the server's count, else the workload's.
        cached_tokens: input tokens the server took from its prefix cache.
        queue_s: waited in the client before it was sent.
        connect_s: spent connecting, part of everything below.
        first_byte_s: to the end of the headers.
        first_choice_s: to the first event with choices, the empty one that opens a chat included.
        ttft_s: to the first event with content, reasoning or a tool call.
        first_content_s: to the first event with content.
        e2e_s: to the end of the response.
        last_choice_s: to the last event with choices.
        tpot_s: per token after the first.
        gaps_s: between consecutive events with a token; 0 within one read.
        choice_gaps_s: between consecutive events with choices.
        events, reads: events with a token, and reads that brought any.
    """

    output_tokens: int
    source: Source
    input_tokens: int | None
    cached_tokens: int | None
    queue_s: float
    connect_s: float
    first_byte_s: float | None
    first_choice_s: float | None
    ttft_s: float | None
    first_content_s: float | None
    e2e_s: float
    last_choice_s: float | None
    tpot_s: float | None
    gaps_s: tuple[float, ...]
    choice_gaps_s: tuple[float, ...]
    events: int
    reads: int

    @property
    def normalized_s(self) -> float | None:
        """E2E per output token."""
        return self.e2e_s / self.output_tokens if self.output_tokens else None

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens per second of E2E."""
        return self.output_tokens / self.e2e_s if self.output_tokens and self.e2e_s > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second after the first."""
        return 1 / self.tpot_s if self.tpot_s else None

    @property
    def tokens_per_event(self) -> float | None:
        """Output tokens per event with a token."""
        return self.output_tokens / self.events if self.events else None

    @property
    def vllm_tpot_s(self) -> float | None:
        """TPOT between the first and the last event with choices."""
        if self.output_tokens < 2 or self.last_choice_s is None or self.first_choice_s is None:
            return None
        return (self.last_choice_s - self.first_choice_s) / (self.output_tokens - 1)


def timing_of(result: Result, count: Count | None = None) -> Timing:
    """The numbers of a complete answer.

    Args:
        result: decoded, and `ok`.
        count: counts tokens where the server did not.
    """
    start = result.start
    tokens = [event for event in result.events if event.kind in TOKENS]
    choices = [event.at for event in result.events if event.kind is not Kind.USAGE]
    content = next((event.at for event in tokens if event.kind is Kind.CONTENT), None)
    output, source = _output_tokens(result, len(tokens), count)
    first, last = (tokens[0].at, tokens[-1].at) if tokens else (None, None)
    usage = result.usage

    def since(at: float | None) -> float | None:
        return None if at is None else at - start

    return Timing(
        output_tokens=output,
        source=source,
        input_tokens=usage.prompt if usage and usage.prompt is not None else result.request.input_tokens,
        cached_tokens=usage.cached if usage else None,
        queue_s=max(0.0, start - result.scheduled),
        connect_s=result.connect_s,
        first_byte_s=since(result.head),
        first_choice_s=since(choices[0] if choices else None),
        ttft_s=since(first),
        first_content_s=since(content),
        e2e_s=result.end - start,
        last_choice_s=since(choices[-1] if choices else None),
        tpot_s=(last - first) / (output - 1) if first is not None and last is not None and output > 1 else None,
        gaps_s=tuple(b.at - a.at for a, b in pairwise(tokens)),
        choice_gaps_s=tuple(b - a for a, b in pairwise(choices)),
        events=len(tokens),
        reads=len({event.read for event in tokens}),
    )


def _output_tokens(result: Result, events: int, count: Count | None) -> tuple[int, Source]:
    if result.usage and result.usage.completion is not None:
        return result.usage.completion, "usage"
    if count is not None:
        return count(result.text), "tokenizer"
    return events, "events"
