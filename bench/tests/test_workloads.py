"""Workloads: lengths, repeatability, unique prompts, traces."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantserve.errors import UsageError
from quantserve_bench.load import Closed, Open, Rounds, Timed
from quantserve_bench.prompts import Lengths, in_words, poem
from quantserve_bench.request import Request
from quantserve_bench.session import scaled
from quantserve_bench.tokens import FileTokenizer, Tokenizer
from quantserve_bench.trace import read_trace
from quantserve_bench.workloads import WORKLOADS, Workload, find_workload, requests, shape, warmup_requests

DEMO = Path(__file__).parents[2] / "examples" / "demo-model" / "checkpoint"
CHAT = ("rayllm-2023", "llmperf", "sonnet")


class Words:
    """A tokenizer whose tokens are words with the space behind them; enough to count exactly."""

    name = "words"

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self.words: list[str] = []

    def encode(self, text: str) -> list[int]:
        ids = []
        for line in text.splitlines(keepends=True):
            for word in line.replace(" ", " \0").split("\0"):
                if word not in self.known:
                    self.known[word] = len(self.words)
                    self.words.append(word)
                ids.append(self.known[word])
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i] for i in ids)


def some(
    workload: Workload, tokenizer: Tokenizer | None, count: int = 40, seed: int = 3, nonce: str = ""
) -> list[Request]:
    return list(islice(requests(workload, tokenizer, seed, nonce), count))


def text(request: Request) -> str:
    assert request.messages is not None
    return str(request.messages[-1]["content"])


def test_the_poem_is_there() -> None:
    assert len(poem()) == 518
    assert "Shall I compare thee to a summer's day?" in poem()


@pytest.mark.parametrize("name", CHAT)
def test_the_same_seed_gives_the_same_requests(name: str) -> None:
    workload = WORKLOADS[name]
    assert some(workload, Words()) == some(workload, Words())
    assert some(workload, Words()) != some(workload, Words(), seed=4)
    again = some(workload, Words(), nonce="a")
    assert [request.max_tokens for request in again] == [request.max_tokens for request in some(workload, Words())]


@pytest.mark.parametrize("name", ["rayllm-2023", "llmperf"])
def test_unique_prompts_share_no_beginning(name: str) -> None:
    made = some(WORKLOADS[name], Words(), nonce="ab12")
    beginnings = {text(request)[:12] for request in made}
    assert len(beginnings) == len(made)
    assert not beginnings & {text(request)[:12] for request in some(WORKLOADS[name], Words(), nonce="cd34")}


def test_sonnet_prompts_share_the_prefix() -> None:
    tokenizer = Words()
    made = [text(request) for request in some(WORKLOADS["sonnet"], tokenizer, nonce="ab")]
    shared = next(i for i, letters in enumerate(zip(*made, strict=False)) if len(set(letters)) > 1)
    assert len(tokenizer.encode(made[0][:shared])) in range(195, 215)


@pytest.mark.parametrize("name", ["llmperf", "sonnet"])
def test_prompts_have_the_length_that_was_drawn(name: str) -> None:
    tokenizer = Words()
    for request in some(WORKLOADS[name], tokenizer):
        assert request.input_tokens == len(tokenizer.encode(text(request)))
    fixed = scaled(WORKLOADS[name], 1.0)
    lengths = [request.input_tokens for request in some(fixed, tokenizer, 300)]
    mean = statistics.fmean(length or 0 for length in lengths)
    assert mean == pytest.approx(550, rel=0.05)
    if name == "sonnet":
        assert set(lengths) <= {549, 550, 551}  # tokens of parts do not add up exactly


def test_rayllm_asks_as_it_was_asked_then() -> None:
    workload = WORKLOADS["rayllm-2023"]
    assert (workload.requests, workload.concurrency, workload.rounds, workload.temperature) == (300, 10, True, 0.0)
    made = some(workload, None, 300)
    assert {request.max_tokens for request in made} == {384}
    assert {request.temperature for request in made} == {0.0}
    lines = [text(request).count("\n\n") for request in made]
    assert (min(lines), max(lines)) == (15, 49)
    assert statistics.fmean(request.input_tokens or 0 for request in made) == pytest.approx(430, rel=0.1)
    assert made[0].messages is not None
    assert [message["role"] for message in made[0].messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("number", "words"),
    [(100, "one hundred"), (117, "one hundred and seventeen"), (340, "three hundred and forty"),
     (999, "nine hundred and ninety-nine"), (205, "two hundred and five"), (610, "six hundred and ten")],
)  # fmt: skip
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words


def test_random_prompts_have_exact_lengths_in_the_models_own_tokens() -> None:
    tokenizer = FileTokenizer(str(DEMO))
    made = some(WORKLOADS["random"], tokenizer, nonce="x")
    for request in made:
        assert isinstance(request.prompt, list)
        assert len(request.prompt) == request.input_tokens == 512
        assert (request.max_tokens, request.ignore_eos) == (128, True)
    assert len({str(request.prompt) for request in made}) == len(made)
    specials = {0, 1, 2}  # pad, begin, end
    assert not specials & {token for request in made for token in request.prompt or () if isinstance(token, int)}
    assert some(WORKLOADS["random"], tokenizer, 1, nonce="y")[0].prompt != made[0].prompt
    assert some(WORKLOADS["random"], tokenizer, 1, nonce="x")[0].prompt == made[0].prompt


def test_random_needs_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="--tokenizer FILE"):
        some(WORKLOADS["random"], None)


@settings(deadline=None, max_examples=50)
@given(st.floats(1, 2000), st.floats(0, 500), st.integers(1, 100), st.integers())
def test_lengths_are_at_least_the_minimum(mean: float, deviation: float, least: int, seed: int) -> None:
    chance = random.Random(seed)
    assert all(Lengths(mean, deviation).draw(chance, least) >= least for _ in range(20))
    assert Lengths(mean).draw(chance) == max(1, round(mean))


def test_warm_up_is_short_and_of_its_own() -> None:
    workload = WORKLOADS["llmperf"]
    warm = warmup_requests(workload, Words(), 5, "n")
    assert all(0 < (request.max_tokens or 0) <= 8 for request in warm)
    assert not {text(request) for request in warm} & {text(request) for request in some(workload, Words(), nonce="n")}


def test_shapes() -> None:
    assert shape(WORKLOADS["rayllm-2023"], 10) == Rounds(10)
    assert shape(WORKLOADS["rayllm-2023"], 10, rounds=False) == Closed(10)
    assert shape(WORKLOADS["llmperf"], 4, ramp_s=2.0) == Closed(4, 2.0)
    assert shape(WORKLOADS["llmperf"], 4, rate=3.0, poisson=False, seed=5) == Open(3.0, poisson=False, seed=5)
    assert shape(WORKLOADS["trace"], 4, times=[0.0, 1.0]) == Timed([0.0, 1.0])


def test_an_unknown_workload_names_the_known() -> None:
    with pytest.raises(UsageError, match="did you mean 'llmperf'"):
        find_workload("lmperf")


def trace(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_trace(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        {"timestamp": 12.0, "input_length": 30, "output_length": 7},
        "",
        {"timestamp": 11.5, "prompt": "hello", "max_tokens": 4},
        {"timestamp": 12.5, "messages": [{"role": "user", "content": "hi"}]},
    )
    made, times = read_trace(path, WORKLOADS["trace"], FileTokenizer(str(DEMO)), seed=1, nonce="")
    assert times == [0.0, 0.5, 1.0]
    assert (made[0].prompt, made[0].max_tokens, made[0].ignore_eos) == ("hello", 4, False)
    assert (made[1].input_tokens, made[1].max_tokens, made[1].ignore_eos) == (30, 7, True)
    assert made[2].messages == [{"role": "user", "content": "hi"}]
    _, in_ms = read_trace(path, WORKLOADS["trace"], None, seed=1, nonce="", unit="ms", limit=2)
    assert in_ms == pytest.approx([0.0, 0.0005])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":1: not JSON"),
        ("[1]", ":1: not a JSON object"),
        ({"timestamp": 0, "input_lenght": 3}, "did you mean 'input_length'"),
        ({"timestamp": "x", "prompt": "a"}, "timestamp must be a number, got 'x'"),
        ({"timestamp": 0, "input_length": 3}, "needs prompt or messages, or input_length and output_length"),
        (
            {"timestamp": 0, "prompt": "a", "max_tokens": 0},
            "the output length must be a number of tokens above 0, got 0",
        ),
        ("", "the file has no requests"),
    ],
)
def test_a_wrong_trace_line_is_reported_with_its_number(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_trace(trace(tmp_path, line), WORKLOADS["trace"], None, 0, "")
    with pytest.raises(UsageError, match="cannot be read"):
        read_trace(tmp_path / "missing", WORKLOADS["trace"], None, 0, "")


def test_a_tokenizer_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"give the path of a tokenizer\.json"):
        FileTokenizer(str(tmp_path))
