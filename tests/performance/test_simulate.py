"""The scheduler's steps, against cases worked by hand: every step takes one second for each 10 tokens begun."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantserve.errors import UsageError
from quantserve.predict.simulate import Limits, Run, simulate
from quantserve.predict.step import Batch
from quantserve.predict.workload import WORKLOADS, Workload, find_workload

WIDE = Limits(sequences=100, step_tokens=1000)


def second(batch: Batch) -> float:
    """Every step takes one second."""
    return 1.0


def by_tokens(batch: Batch) -> float:
    """A tenth of a second a token."""
    return batch.tokens / 10


def load(tokens_in: int, tokens_out: int, users: int, requests: int = 0, rounds: bool = False) -> Workload:
    return Workload("w", tokens_in, tokens_out, users, requests or users, rounds)


def times(run: Run) -> list[tuple[float, float]]:
    return sorted((request.first - request.arrival, request.last - request.arrival) for request in run.requests)


def test_one_request_is_a_prompt_and_its_decode_steps() -> None:
    run = simulate(load(100, 11, 1), WIDE, second)
    assert times(run) == [(1, 11)]
    assert run.duration == 11


def test_prompts_that_fit_one_step_come_out_together() -> None:
    run = simulate(load(100, 5, 4), WIDE, by_tokens)
    assert times(run) == [(40, 40 + 4 * 0.4)] * 4


def test_a_long_prompt_is_cut_into_chunks_beside_decoding() -> None:
    """The second of two prompts of 60 in steps of 100: 40 tokens of it beside the first, the last 20 beside a token."""
    run = simulate(load(60, 3, 2), replace(WIDE, step_tokens=100), by_tokens)
    first, second_one = times(run)
    assert first[0] == 10
    assert second_one[0] == pytest.approx(10 + 2.1)
    # The first waits for that step, then one with both; the second needs two more after its first token.
    assert first[1] == pytest.approx(10 + 2.1 + 0.2)
    assert second_one[1] == pytest.approx(10 + 2.1 + 0.2 + 0.1)


def test_in_2023_prompts_kept_decoding_waiting() -> None:
    """Two prompts fit a step, so the third runs alone, and nobody decodes before."""
    limits = Limits(sequences=100, step_tokens=130, prefill_first=True)
    run = simulate(load(60, 2, 3), limits, by_tokens)
    assert times(run) == [(12, 18.3), (12, 18.3), (18, 18.3)]


def test_requests_beyond_max_num_seqs_wait() -> None:
    run = simulate(load(10, 10, 4), replace(WIDE, sequences=2), second)
    assert times(run) == [(1, 10), (1, 10), (11, 20), (11, 20)]
    assert run.most_running == 2


def test_requests_beyond_the_cache_wait() -> None:
    run = simulate(load(10, 10, 3), replace(WIDE, cache_tokens=45), second)
    assert run.most_running == 2
    assert times(run)[2] == (11, 20)


def test_a_request_larger_than_the_cache_still_ends() -> None:
    assert simulate(load(10, 10, 2), replace(WIDE, cache_tokens=5), second).most_running == 1


def test_clients_go_on_or_wait_for_each_other() -> None:
    closed = simulate(load(10, 10, 2, requests=4), WIDE, second)
    rounds = simulate(load(10, 10, 2, requests=4, rounds=True), WIDE, second)
    assert closed.duration == rounds.duration == 20
    lengths = WORKLOADS["llmperf"]
    assert simulate(replace(lengths, rounds=True), WIDE, second).duration > simulate(lengths, WIDE, second).duration


def test_what_lies_before_the_engine_delays_every_request() -> None:
    run = simulate(load(10, 10, 1, requests=3), WIDE, second, arrival_s=5)
    assert run.duration == 3 * (5 + 10)
    assert times(run) == [(1, 10)] * 3


@settings(max_examples=60, deadline=None)
@given(
    tokens_in=st.integers(1, 300),
    tokens_out=st.integers(1, 40),
    users=st.integers(1, 20),
    requests=st.integers(1, 50),
    sequences=st.integers(1, 20),
    step_tokens=st.integers(30, 400),
    cache=st.integers(0, 3000),
    old=st.booleans(),
    rounds=st.booleans(),
    spread=st.floats(0, 30),
)
def test_every_token_of_every_request_comes_out_in_order(
    tokens_in: int,
    tokens_out: int,
    users: int,
    requests: int,
    sequences: int,
    step_tokens: int,
    cache: int,
    old: bool,
    rounds: bool,
    spread: float,
) -> None:
    workload = replace(load(tokens_in, tokens_out, users, requests, rounds), output_spread=spread)
    limits = Limits(sequences, step_tokens, cache, old)
    run = simulate(workload, limits, by_tokens, 0.5)
    assert sorted((r.prompt, r.wanted) for r in run.requests) == sorted(workload.lengths())
    for request in run.requests:
        assert request.produced == request.wanted
        assert 0.5 <= request.arrival < request.first <= request.last <= run.duration
    assert run.most_running <= min(users, sequences)
    # The engine computes every token once: prompts, and every answer but its last token.
    work = sum(r.prompt + r.wanted - 1 for r in run.requests) / 10
    assert run.duration >= work * (1 - 1e-9)


def test_lengths_that_are_known_are_taken_as_they_are() -> None:
    known = ((10, 1), (10, 30), (20, 2))
    workload = Workload("w", 13, 11, 1, known=known, output_spread=5)
    run = simulate(workload, WIDE, second)
    assert [(r.prompt, r.wanted) for r in run.requests] == list(known)
    assert run.duration == 1 + 30 + 2  # a second for every step, the first of which brings the first token
    assert "known" not in workload.to_json()


def test_more_clients_never_lower_throughput_of_an_engine_with_fixed_steps() -> None:
    rates = []
    for users in (1, 2, 4, 8, 16):
        run = simulate(Workload("w", 10, 20, users, 64), WIDE, second)
        rates.append(sum(r.produced for r in run.requests) / run.duration)
    assert all(after > before for before, after in pairwise(rates))


def test_workloads_are_named_or_written() -> None:
    assert find_workload("512/128/16") == Workload("512/128/16", 512, 128, 16)
    assert find_workload("rayllm-2023").requests == 300
    assert find_workload("llmperf").lengths() == find_workload("llmperf").lengths()
    for wrong in ("chatt", "0/1/1", "1/2", "1/2/5000", "a/b/c"):
        with pytest.raises(UsageError, match="IN/OUT/CONCURRENCY"):
            find_workload(wrong)
