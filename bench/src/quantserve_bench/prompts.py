"""How prompts are made: one function per kind, and what it may use."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import cycle
from typing import TYPE_CHECKING, Final

from quantserve.errors import UsageError
from quantserve_bench.request import Request
from quantserve_bench.tokens import CHARACTERS_PER_TOKEN, Tokenizer, count_tokens

if TYPE_CHECKING:
    from quantserve_bench.workloads import Workload


@dataclass(frozen=True)
class Lengths:
    """Token lengths drawn from a normal distribution; a deviation of 0 makes them fixed."""

    mean: float
    stddev: float = 0.0

    def draw(self, chance: random.Random, least: int = 1) -> int:
        """A length, drawn again until it is at least `least` (llmperf's way; it raises the mean when sd is large)."""
        if self.stddev <= 0:
            return max(least, round(self.mean))
        for _ in range(1000):
            value = int(chance.gauss(self.mean, self.stddev))
            if value >= least:
                return value
        return least

    def scaled(self, factor: float) -> Lengths:
        """All lengths by a factor."""
        return Lengths(self.mean * factor, self.stddev * factor)

    def __str__(self) -> str:
        return f"{self.mean:g} sd {self.stddev:g}" if self.stddev else f"{self.mean:g}"


@dataclass
class Maker:
    """State for making requests.

    Attributes:
        workload: with the lengths to use.
        chance: seeded random generator.
        tokenizer: None estimates lengths from characters.
        nonce: differs between runs, so that no prompt is in a prefix cache; empty for the same prompts in every run.
        number: of the request.
    """

    workload: Workload
    chance: random.Random
    tokenizer: Tokenizer | None
    nonce: str = ""
    number: int = 0
    _costs: dict[str, int] = field(default_factory=dict)
    _pool: list[int] = field(default_factory=list)

    @property
    def stamp(self) -> str:
        """The unique prefix of a prompt."""
        return f"[{self.nonce}-{self.number}] " if self.nonce else ""

    def cost(self, text: str) -> int:
        """Tokens of a short text, cached."""
        if text not in self._costs:
            self._costs[text] = count_tokens(self.tokenizer, text)
        return self._costs[text]

    def fill(self, beginning: str, lines: Iterable[str], tokens: int) -> tuple[str, int]:
        """Lengthen a text by lines until it has so many tokens, the last line cut; returns the text and its tokens.

        The sum over lines decides when to stop and the whole text is counted once at the end, because the tokens of
        parts do not add up exactly.
        """
        parts, total = [beginning], self.cost(beginning)
        for line in lines:
            part = line + "\n"
            if total + self.cost(part) > tokens:
                parts.append(self.cut(part, max(0, tokens - total)))
                break
            parts.append(part)
            total += self.cost(part)
        text = "".join(parts)
        return text, count_tokens(self.tokenizer, text)

    def cut(self, text: str, tokens: int) -> str:
        """The beginning of a text."""
        if self.tokenizer is None:
            return text[: round(tokens * CHARACTERS_PER_TOKEN)]
        return self.tokenizer.decode(self.tokenizer.encode(text)[:tokens]) if tokens else ""

    def any_token(self, chance: random.Random) -> int:
        """A token id that occurs in ordinary text, so no special or unused token."""
        assert self.tokenizer is not None
        if not self._pool:
            self._pool.extend(sorted(set(self.tokenizer.encode("\n".join(poem()[:200])))))
        return chance.choice(self._pool)


@cache
def poem() -> tuple[str, ...]:
    """Lines of Shakespeare's sonnets, as in the benchmarks of llmperf and vLLM."""
    text = files("quantserve_bench").joinpath("data/sonnets.txt").read_text()
    return tuple(line for line in text.splitlines() if line)


DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TENS: Final = ("", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
TEENS: Final = (
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
POEM_LINES: Final = (15, 49)
"""How many lines llmperf drew in 2023, about 500 tokens with the question."""
POEM_TOKENS: Final = 500


def in_words(number: int) -> str:
    """A number from 100 to 999 in words."""
    hundreds, rest = divmod(number, 100)
    tens, ones = divmod(rest, 10)
    tail = TEENS[ones] if tens == 1 else "-".join(part for part in (TENS[tens], DIGITS[ones] if ones else "") if part)
    return f"{DIGITS[hundreds]} hundred" + (f" and {tail}" if tail else "")


def rayllm_request(maker: Maker) -> Request:
    """llmperf's request of 2023: a number in words to be written in digits, then seven lines to pick from a poem."""
    share = maker.workload.input_tokens.mean / POEM_TOKENS
    low, high = (max(1, round(lines * share)) for lines in POEM_LINES)
    lines = maker.chance.sample(poem(), maker.chance.randint(low, max(low, high)))
    number = in_words(maker.chance.randint(100, 999))
    user = (
        f"{maker.stamp}Write the number {number} in digits. Print the number first. Then choose 7 of these lines "
        "of poetry and print them.\n\n" + "\n\n".join(lines)
    )
    system = "Answer with exactly what was asked for, as briefly as possible, without any explanation."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return _chat(maker, messages, count_tokens(maker.tokenizer, user) + maker.cost(system))


def llmperf_request(maker: Maker) -> Request:
    """llmperf's request since December 2023: write lines from a text, so many tokens."""
    output = maker.workload.output_tokens.draw(maker.chance)
    task = f"Write lines from the text below, in any order, about {output} tokens. Do not stop before that."
    beginning = f"{maker.stamp}{task}\n\n"
    return _poem_chat(maker, beginning, output)


def sonnet_request(maker: Maker) -> Request:
    """vLLM's sonnet data set: a beginning that all prompts share, then lines in random order."""
    output = maker.workload.output_tokens.draw(maker.chance)
    shared = f"[{maker.nonce}] " if maker.nonce else ""
    beginning, _ = maker.fill(
        f"{shared}Pick as many lines as you can from these:\n", poem(), maker.workload.prefix_tokens
    )
    return _poem_chat(maker, beginning + "\n", output)


def random_request(maker: Maker) -> Request:
    """Tokens at random, exactly as many as asked for, answered with exactly as many as asked for."""
    if maker.tokenizer is None:
        raise UsageError(
            "the workload random needs exact token counts, and the server has no /tokenize\n"
            "  fix: give the model's tokenizer with --tokenizer FILE, or use another --workload"
        )
    length = maker.workload.input_tokens.draw(maker.chance)
    # The beginning must differ between runs when prompts are unique; ids are short and need no stamp.
    chance = random.Random(f"{maker.nonce}/{maker.number}/{maker.chance.random()}")
    ids = [maker.any_token(chance) for _ in range(length)]
    output = maker.workload.output_tokens.draw(maker.chance)
    return Request(
        prompt=ids,
        max_tokens=output,
        temperature=maker.workload.temperature,
        ignore_eos=maker.workload.ignore_eos,
        input_tokens=length,
    )


def _poem_chat(maker: Maker, beginning: str, output: int) -> Request:
    target = maker.workload.input_tokens.draw(maker.chance, least=maker.cost(beginning) if maker.tokenizer else 1)
    lines = list(poem())
    maker.chance.shuffle(lines)
    text, tokens = maker.fill(beginning, cycle(lines), target)
    return _chat(maker, [{"role": "user", "content": text}], tokens, output)


def _chat(maker: Maker, messages: list[dict[str, str]], tokens: int, output: int | None = None) -> Request:
    workload = maker.workload
    return Request(
        messages=messages,
        max_tokens=output or workload.output_tokens.draw(maker.chance),
        temperature=workload.temperature,
        ignore_eos=workload.ignore_eos,
        input_tokens=tokens,
    )
