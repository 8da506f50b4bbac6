"""What is measured: the cells of the tables, the paths of the columns, and which server stands beside which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.console import BenchError

APIS: Final = ("chat", "completions")
LENGTHS: Final = ((64, 64), (512, 128))
"""Tokens in and out."""
USERS: Final = (1, 16, 64)

PATHS: Final[Mapping[str, str]] = {
    "bare": "vLLM's own server",
    "one": "quantserve, one model: the root",
    "route": "quantserve, several models: the model's own route",
    "shared": "quantserve, several models: the shared address",
    "ray-default": "Ray Serve LLM as it comes",
    "ray-direct": "Ray Serve LLM, direct streaming behind HAProxy",
}
REFERENCE: Final = "bare"
OURS: Final = ("one", "route", "shared")
PEERS: Final = ("ray-default", "ray-direct")
PEER: Final = "ray-default"
"""What our throughput is compared with as well."""


@dataclass(frozen=True)
class Cell:
    """One load.

    Attributes:
        models: ids of the models asked, at once when several.
        api: a key of `APIS`.
        input_tokens, output_tokens: of every request.
        users: requests at once, of all models together.
        requests: how many are measured, of all models together.
    """

    models: tuple[str, ...]
    api: str
    input_tokens: int
    output_tokens: int
    users: int
    requests: int

    @property
    def name(self) -> str:
        """In results and tables."""
        who = self.models[0] if len(self.models) == 1 else f"all {len(self.models)}"
        users = "1 user" if self.users == 1 else f"{self.users} users"
        return f"{who}, {self.api} {self.input_tokens}/{self.output_tokens}, {users}"


@dataclass(frozen=True)
class Amount:
    """How much of a model's cells is measured, so that each takes seconds.

    Attributes:
        waves: users -> requests per user, for 64 tokens out; the next smaller number of users counts.
        long_users: most users with the longer prompts; prefill alone would take a minute beyond.
    """

    waves: Mapping[int, int]
    long_users: int

    def requests(self, users: int, output_tokens: int) -> int:
        """Requests of a cell; half as many per user for long answers, at least one."""
        per_user = self.waves[max((known for known in self.waves if known <= users), default=min(self.waves))]
        return users * max(1, per_user if output_tokens <= 64 else per_user // 2)


FAST: Final = Amount({1: 16, 3: 8, 15: 10, 48: 5}, long_users=64)
SLOW: Final = Amount({1: 6, 3: 4, 15: 2, 48: 2}, long_users=16)


@dataclass(frozen=True)
class Choice:
    """What of everything is measured.

    Attributes:
        paths, shapes, apis, lengths, users: those chosen.
        rounds: of every cell.
        starts: extra starts of every server, for their times alone.
        patience_s: how long to wait for other processes to leave the processor alone, before every load and start.
    """

    paths: tuple[str, ...] = tuple(PATHS)
    shapes: tuple[str, ...] = ("demo", "small")
    apis: tuple[str, ...] = APIS
    lengths: tuple[tuple[int, int], ...] = LENGTHS
    users: tuple[int, ...] = USERS
    rounds: int = 3
    starts: int = 1
    patience_s: float = 20.0

    def matrix(self, model: str, amount: Amount) -> list[Cell]:
        """Every cell of one model."""
        return [
            Cell((model,), api, tokens_in, tokens_out, users, amount.requests(users, tokens_out))
            for tokens_in, tokens_out in self.lengths
            for api in self.apis
            for users in self.users
            if (tokens_in, tokens_out) == min(LENGTHS) or users <= amount.long_users
        ]

    def short(self, model: str, amount: Amount) -> list[Cell]:
        """Those of the shorter length."""
        return [c for c in self.matrix(model, amount) if (c.input_tokens, c.output_tokens) == min(self.lengths)]

    def middle(self, model: str, amount: Amount) -> list[Cell]:
        """Those of the middle number of users."""
        users = sorted(self.users)[len(self.users) // 2]
        return [cell for cell in self.matrix(model, amount) if cell.users == users]

    def together(self, models: Sequence[str], amount: Amount) -> list[Cell]:
        """All models asked at once, each by its share of the users."""
        tokens_in, tokens_out = min(self.lengths)
        shares = sorted({max(1, users // len(models)) * len(models) for users in self.users})
        return [
            Cell(tuple(models), self.apis[0], tokens_in, tokens_out, users, amount.requests(users, tokens_out))
            for users in shares
        ]


def chosen(text: str | None, known: Sequence[str], what: str) -> tuple[str, ...]:
    """A comma list of names, in the order in which they are known.

    Raises:
        BenchError: a name is unknown; lists the known ones.
    """
    if text is None:
        return tuple(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise BenchError(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
    return tuple(name for name in known if name in names)
