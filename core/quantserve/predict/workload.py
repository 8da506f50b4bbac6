"""Workloads: what clients ask for, and how many of them at once."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

from quantserve.errors import UsageError, unknown_name

_MOST_TOKENS = 1 << 20
_MOST_USERS = 4096


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of a number of clients.

    Attributes:
        name: what commands call it.
        input_tokens, output_tokens: means per request.
        concurrency: clients, each with one request in flight.
        requests: in all; 0 is three per client.
        rounds: clients wait for each other after every request (the 2023 tool); otherwise each goes on at once.
        input_spread, output_spread: standard deviations.
        about: one line for people.
        known: (input, output) tokens of every request, in order, where a run has shown them: two runs of one mean and
            one deviation can still differ much, by a few very short answers.
    """

    name: str
    input_tokens: int
    output_tokens: int
    concurrency: int
    requests: int = 0
    rounds: bool = False
    input_spread: float = 0.0
    output_spread: float = 0.0
    about: str = ""
    known: tuple[tuple[int, int], ...] = ()

    def lengths(self) -> list[tuple[int, int]]:
        """(input, output) tokens of every request, the same ones every time."""
        if self.known:
            return list(self.known)
        count = self.requests or 3 * self.concurrency
        chance = random.Random(11111)

        def draw(mean: int, spread: float) -> int:
            return max(1, round(chance.gauss(mean, spread))) if spread else mean

        return [
            (draw(self.input_tokens, self.input_spread), draw(self.output_tokens, self.output_spread))
            for _ in range(count)
        ]

    def at(self, concurrency: int) -> Workload:
        """The same with another number of clients."""
        return replace(self, concurrency=concurrency, requests=0 if concurrency != self.concurrency else self.requests)

    def to_json(self) -> dict[str, object]:
        """Plain data for ``--json``."""
        return {key: value for key, value in asdict(self).items() if key != "known"}

    def __str__(self) -> str:
        how = "in rounds" if self.rounds else "closed loop"
        return f"{self.input_tokens} in, {self.output_tokens} out, {self.concurrency} at once, {how}"


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        load.name: load
        for load in (
            Workload(
                "rayllm-2023",
                500,
                140,
                10,
                300,
                rounds=True,
                about="legacy llmperf: 300 requests in rounds of 10, about 500 tokens in and 140 out",
            ),
            Workload(
                "llmperf",
                550,
                150,
                10,
                30,
                input_spread=150,
                output_spread=80,
                about="llmperf's defaults: 550 +- 150 in, 150 +- 80 out, 10 at once",
            ),
            Workload("chat", 512, 256, 16, about="a chat turn: 512 in, 256 out, 16 at once"),
            Workload("rag", 4096, 256, 8, about="documents in the prompt: 4096 in, 256 out, 8 at once"),
            Workload("batch", 512, 256, 128, about="offline: 512 in, 256 out, 128 at once"),
            Workload("single", 512, 256, 1, about="one user: 512 in, 256 out"),
        )
    }
)


def find_workload(text: str) -> Workload:
    """A named workload, or ``IN/OUT/CONCURRENCY`` such as ``512/128/16``.

    Raises:
        UsageError: neither, or a number out of range; known names are listed.
    """
    if text in WORKLOADS:
        return WORKLOADS[text]
    if match := re.fullmatch(r"(\d{1,9})/(\d{1,9})/(\d{1,9})", text.strip()):
        tokens_in, tokens_out, users = (int(part) for part in match.groups())
        if not (1 <= tokens_in <= _MOST_TOKENS and 1 <= tokens_out <= _MOST_TOKENS and 1 <= users <= _MOST_USERS):
            raise UsageError(
                f"workload {text!r}: tokens must be 1 to {_MOST_TOKENS}, clients 1 to {_MOST_USERS}\n"
                "  fix: write IN/OUT/CONCURRENCY, e.g. 512/128/16"
            )
        return Workload(text.strip(), tokens_in, tokens_out, users)
    raise UsageError(
        f"{unknown_name('workload', text, WORKLOADS)}\n  fix: or write IN/OUT/CONCURRENCY, e.g. 512/128/16"
    )
