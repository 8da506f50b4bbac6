"""Load shapes: how many requests are on their way, when they are sent, and that none is lost or added."""

from __future__ import annotations

from itertools import count, pairwise, repeat
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantserve_bench import Closed, Open, Request, Result, Rounds, Run, Target, Timed, run, run_blocking
from quantserve_bench.load import arrivals

from .fake_server import FakeServer, stream

ASK = Request(prompt="x")
LATE_S = 30.0
"""How late a busy machine may be."""


def requests(number: int) -> list[Request]:
    return [Request(prompt=f"request {i}") for i in range(number)]


def slow(number: int, body: dict[str, Any]) -> Any:
    """Every third answer takes three times as long."""
    return stream([(0.03 if number % 3 else 0.09, ["a"])])


def load(shape: Any, asked: Any, script: Any = slow, **options: Any) -> tuple[FakeServer, Run]:
    with FakeServer(script) as server:
        return server, run_blocking(run(Target(server.url, "m"), asked, shape, **options))


def overlapping(results: list[Result], at: float) -> int:
    return sum(result.start <= at < result.end for result in results)


def test_a_closed_load_holds_its_concurrency() -> None:
    server, done = load(Closed(4), requests(24))
    assert server.most_in_flight == 4
    assert server.connections == 4
    assert len(server.exchanges) == 24
    assert [result.request.prompt for result in done] == [f"request {i}" for i in range(24)]
    middle = done.began + (done.last_launch - done.began) / 2
    assert overlapping(done.results, middle) == 4
    # Whoever is free goes on, without waiting for the slowest of a group.
    assert any(later.start < result.end for result, later in zip(done.results, done.results[4:], strict=False))


def test_more_users_than_requests() -> None:
    server, done = load(Closed(50), requests(3))
    assert (len(done), server.connections) == (3, 3)


def test_users_may_join_one_by_one() -> None:
    _, done = load(Closed(4, ramp_s=0.4), repeat(ASK), max_duration_s=0.5)
    for at, expected in ((0.05, 1), (0.15, 2), (0.25, 3), (0.45, 4)):
        assert overlapping(done.results, done.began + at) <= expected


def test_rounds_wait_for_the_slowest() -> None:
    server, done = load(Rounds(3), requests(8))
    assert server.most_in_flight == 3
    groups = [done.results[i : i + 3] for i in (0, 3, 6)]
    assert [len(group) for group in groups] == [3, 3, 2]
    for before, after in pairwise(groups):
        assert min(result.start for result in after) >= max(result.end for result in before)


def test_no_request_is_sent_after_the_time_and_all_are_waited_for() -> None:
    server, done = load(Closed(2), (Request(prompt=str(i)) for i in count()), max_duration_s=0.3)
    assert len(done) == len(server.exchanges)
    assert done.last_launch - done.began < 0.3 + LATE_S
    assert all(result.ok for result in done)
    assert done.ended >= max(result.end for result in done)


def test_an_open_load_does_not_wait_for_answers() -> None:
    server, done = load(Open(50.0, poisson=False), requests(10), lambda n, b: stream([(0.3, ["a"])]))
    assert server.most_in_flight == 10
    for number, result in enumerate(done):
        assert result.scheduled - done.began == pytest.approx(number / 50)
        assert 0 <= result.start - result.scheduled < LATE_S


def test_waiting_in_the_client_is_seen() -> None:
    shape = Open(1000.0, poisson=False, max_concurrency=1)
    server, done = load(shape, requests(3), lambda n, b: stream([(0.1, ["a"])]))
    assert server.most_in_flight == 1
    waits = [result.start - result.scheduled for result in done]
    assert waits[1] >= 0.09
    assert waits[2] >= 0.19
    assert all(result.end - result.start < waits[2] + LATE_S for result in done)


def test_times_of_a_trace() -> None:
    _, done = load(Timed([0.0, 0.1, 0.1, 0.25]), requests(4), lambda n, b: stream([(0.0, ["a"])]))
    for due, result in zip((0.0, 0.1, 0.1, 0.25), done, strict=True):
        assert 0 <= result.start - done.began - due < LATE_S


def test_the_cost_of_the_client_is_measured() -> None:
    _, done = load(Closed(2), requests(4))
    assert done.cpu_s > 0
    assert 0 <= done.lag_mean_s <= done.lag_max_s
    assert done.client_share == pytest.approx(done.cpu_s / done.duration_s)


rates = st.floats(0.1, 1000)


@settings(deadline=None)
@given(rates, rates, st.floats(0.01, 100), st.integers(1, 300))
def test_even_arrivals_follow_the_integral_of_the_rate(start: float, end: float, ramp_s: float, number: int) -> None:
    """The k-th request comes when the area under the rate is k; the area is summed numerically here."""
    times = arrivals(Open(start, rate_end=end, ramp_s=ramp_s, poisson=False))
    *_, last = (next(times) for _ in range(number))

    def rate(at: float) -> float:
        return start + (end - start) * min(1.0, at / ramp_s)

    inside = min(last, ramp_s)  # on a straight line the midpoint is exact
    area = rate(inside / 2) * inside + end * (last - inside)
    assert area == pytest.approx(number - 1, rel=1e-6, abs=1e-6)


def test_a_ramp_to_nothing_ends() -> None:
    times = list(arrivals(Open(10.0, rate_end=0.0, ramp_s=2.0, poisson=False)))
    assert len(times) in (10, 11)
    assert times[-1] <= 2.0 + 1e-6


def test_poisson_arrivals_have_its_mean_and_its_spread() -> None:
    times = arrivals(Open(20.0, seed=1))
    at = [next(times) for _ in range(20_001)]
    gaps = [b - a for a, b in pairwise(at)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 20, rel=0.03)
    assert deviation == pytest.approx(mean, rel=0.03)  # that of an exponential distribution
    assert at[:5] == [time for time, _ in zip(arrivals(Open(20.0, seed=1)), range(5), strict=False)]
    assert at[1:5] != [time for time, _ in zip(arrivals(Open(20.0, seed=2)), range(5), strict=False)][1:]
