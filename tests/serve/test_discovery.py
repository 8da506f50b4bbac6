"""Service discovery: which replicas there are when some are slow, raise or die, and how often they are asked."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError
from ray.serve.exceptions import DeploymentUnavailableError

from quantserve.serve.gateway.deployment import GatewayServer
from quantserve.serve.gateway.middleware.limits import Policy
from quantserve.serve.gateway.upstreams import discovery
from quantserve.serve.gateway.upstreams.directory import Directory
from quantserve.serve.gateway.upstreams.discovery import BACKOFF, CALM_S, HURRY_S, MISSES, POLL_S, Roster, poll_replicas

from .replica import pool_of, run, until
from .virtual_time import run_virtual


def described(name: str = "r1", **fields: object) -> dict[str, Any]:
    return {"id": name, "actor": f"actor-{name}", "host": "127.0.0.1", "port": 9, "draining": False, **fields}


def died(name: str) -> ActorDiedError:
    error = ActorDiedError()
    error.actor_id = f"actor-{name}"
    return error


def states(replicas: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {one["id"]: one["state"] for one in replicas}


SLOW = GetTimeoutError("describe took too long")
RAISED = ValueError("describe raised")
NONSENSE = {"id": "r1"}
INVALID = (
    {"id": None},
    {"host": None},
    {"port": None},
    {"port": "9"},
    {"port": 1 << 16},
    {"port": 0},
    {"cpus": "0"},
    {"cpus": ["0"]},
)
"""Fields with which an answer cannot be used."""


class TestRoster:
    @pytest.mark.parametrize("result", [SLOW, RAISED, NONSENSE, None])
    def test_a_replica_that_is_slow_or_raises_stays_however_often(self, result: object) -> None:
        roster = Roster()
        assert states(roster.update([described()])) == {"r1": "ready"}
        for _ in range(3 * MISSES):
            assert states(roster.update([result])) == {"r1": "unknown"}
        assert roster.unsure
        assert states(roster.update([described()])) == {"r1": "ready"}
        assert not roster.unsure

    @pytest.mark.parametrize("fields", INVALID)
    def test_an_invalid_answer_does_not_reach_the_gateway(self, fields: dict[str, object]) -> None:
        roster = Roster()
        before = roster.update([described()])
        (after,) = roster.update([described(**fields)])
        assert after == {**before[0], "state": "unknown"}

    def test_a_replica_that_is_not_listed_is_removed_after_some_misses_in_succession(self) -> None:
        roster = Roster()
        roster.update([described(), described("r2")])
        for _ in range(2):
            for _ in range(MISSES - 1):
                assert states(roster.update([described()])) == {"r1": "ready", "r2": "unknown"}
            assert states(roster.update([described(), described("r2")])) == {"r1": "ready", "r2": "ready"}
        for _ in range(MISSES - 1):
            roster.update([described()])
        assert states(roster.update([described()])) == {"r1": "ready"}

    def test_misses_of_different_replicas_do_not_add_up(self) -> None:
        roster = Roster()
        roster.update([described(), described("r2")])
        for turn in range(2 * MISSES):
            assert len(roster.update([described("r1" if turn % 2 else "r2")])) == 2

    def test_a_dead_actor_is_reported_once_and_removed(self) -> None:
        roster = Roster()
        roster.update([described(), described("r2")])
        assert states(roster.update([described("r2"), died("r1")])) == {"r2": "ready", "r1": "dead"}
        assert states(roster.update([described("r2")])) == {"r2": "ready"}

    def test_a_slow_replica_is_not_taken_for_the_dead_one(self) -> None:
        roster = Roster()
        roster.update([described(), described("r2"), described("r3")])
        found = states(roster.update([SLOW, died("r1"), described("r3")]))
        assert found == {"r1": "dead", "r2": "unknown", "r3": "ready"}

    def test_the_death_of_an_unknown_actor_removes_nothing(self) -> None:
        roster = Roster()
        roster.update([described()])
        assert states(roster.update([described(), died("other"), ActorDiedError()])) == {"r1": "ready"}

    def test_a_draining_replica_stays_draining_while_it_is_silent(self) -> None:
        roster = Roster()
        roster.update([described(draining=True)])
        assert states(roster.update([SLOW])) == {"r1": "draining"}


class Handle:
    """A deployment's handle; `answer` returns the results of a broadcast."""

    def __init__(self, answer: Callable[[], list[object]] = lambda: [described()]) -> None:
        self.answer = answer
        self.asked: list[tuple[float, int]] = []
        self.gateways: set[str] = set()
        self.woken = 0
        self.clock: Callable[[], float] = lambda: 0.0

    def broadcast(self, method: str, gateway: str, waiting: int) -> Handle:
        assert method == "describe"
        self.asked.append((self.clock(), waiting))
        self.gateways.add(gateway)
        return self

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[object]:
        assert timeout_s > 0
        assert return_exceptions
        return self.answer()

    @property
    def describe(self) -> Handle:
        return self

    async def remote(self) -> None:
        self.woken += 1
        raise RuntimeError("no replica can be started")


class Sink:
    """A gateway's status, and the updates it got."""

    def __init__(self, *reachable: str, settled: bool = True, wanted: Sequence[str] = ()) -> None:
        self.wanted = list(wanted)
        self.reachable = list(reachable)
        self.settled = settled
        self.waiting: dict[str, int] = {}
        self.updates: list[Mapping[str, Sequence[Mapping[str, Any]]]] = []

    def update(self, addresses: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self.updates.append(addresses)


class Inline(Executor):
    """Runs work at once, so that virtual time works."""

    def __init__(self, *_: object) -> None: ...

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


@pytest.fixture
def polled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Polls for some seconds of virtual time."""
    monkeypatch.setattr(discovery, "ThreadPoolExecutor", Inline)

    def poll(sink: Sink, seconds: float, **handles: Handle) -> None:
        async def go() -> None:
            for handle in handles.values():
                handle.clock = asyncio.get_running_loop().time
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(poll_replicas(sink, handles), seconds)

        run_virtual(go)

    return poll


def test_healthy_replicas_are_polled_rarely(polled: Callable[..., None]) -> None:
    handle = Handle()
    polled(Sink("m"), 60.0, m=handle)
    assert 60 / (CALM_S + HURRY_S) - 1 <= len(handle.asked) <= 60 / CALM_S + 1


def test_changing_replicas_are_polled_often(polled: Callable[..., None]) -> None:
    unsettled, silent = Handle(), Handle()
    silent.answer = lambda: [described()] if len(silent.asked) == 1 else [SLOW]
    polled(Sink("m", "n", settled=False), 60.0, m=unsettled)
    polled(Sink("m", "n"), 60.0, n=silent)
    for handle in (unsettled, silent):
        assert 60 / (POLL_S + HURRY_S) - 1 <= len(handle.asked) <= 60 / POLL_S + 1


def test_a_model_without_a_replica_is_polled_fast_and_slower_the_longer_that_lasts(polled: Callable[..., None]) -> None:
    def none() -> list[object]:
        raise DeploymentUnavailableError("m")

    failed, good = Handle(none), Handle()
    polled(Sink("good"), 2000.0, failed=failed, good=good)
    times = [when for when, _ in failed.asked]
    gaps = [(before, after - before) for before, after in pairwise(times)]
    assert max(gap for when, gap in gaps if when < 10) < 2 * HURRY_S + 0.01
    assert max(gap / when for when, gap in gaps if when > 100) < 1.5 * BACKOFF + 0.004
    assert min(gap for when, gap in gaps if when > 600) >= CALM_S - 0.01
    assert len(good.asked) <= 2000 / CALM_S + 1  # the failed model costs the others nothing


def test_a_wanted_model_is_woken_and_its_failure_does_not_flood(
    polled: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    handle = Handle(list)
    polled(Sink("m", wanted=["m"]), 60.0, m=handle)
    assert 30 <= handle.woken <= 61
    assert len(handle.asked) >= 55
    assert 1 <= len([one for one in caplog.records if "scaling up" in one.message]) <= 2


def test_the_queue_is_reported_to_the_replicas_by_one_gateway(polled: Callable[..., None]) -> None:
    handle, other, sink = Handle(), Handle(), Sink("m", "n")
    sink.waiting = {"m": 7}
    polled(sink, 10.0, m=handle, n=other)
    assert {waiting for _, waiting in handle.asked} == {7}
    assert {waiting for _, waiting in other.asked} == {0}
    assert len(handle.gateways) == 1


def test_an_exception_of_any_kind_does_not_end_polling(
    polled: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Sink):
        def update(self, addresses: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
            if "bad" in addresses:
                raise BrokenPipeError("the gateway is gone")
            super().update(addresses)

    def raises() -> list[object]:
        raise RuntimeError("Ray is away")

    sink = Broken("bad", "worse", "odd", "good")
    odd = Handle(lambda: [object(), described()])
    polled(sink, 60.0, bad=Handle(), worse=Handle(raises), odd=odd, good=Handle())
    assert len(sink.updates) >= 10
    assert {name for update in sink.updates for name in update} == {"good", "odd"}
    for name in ("bad", "worse"):  # each is logged, and not at each poll
        assert 1 <= len([one for one in caplog.records if f"model {name}:" in one.message]) <= 2


def test_a_poll_that_hangs_does_not_delay_other_models() -> None:
    released = threading.Event()

    def hang() -> list[object]:
        released.wait(30)
        return [described()]

    async def go() -> None:
        sink = Sink(settled=False)
        handles = {f"hung-{number}": Handle(hang) for number in range(40)} | {"good": Handle()}
        polling = asyncio.create_task(poll_replicas(sink, handles))
        try:
            await until(lambda: len(sink.updates) >= 2)
            assert {name for update in sink.updates for name in update} == {"good"}
        finally:
            polling.cancel()
            released.set()

    run(go)


def test_a_busy_replica_keeps_its_requests_and_its_queue() -> None:
    """The whole way, from Ray Serve's results to the admission of requests."""

    async def go() -> None:
        model = {"card": {"id": "m"}, "limits": {"ongoing": 2, "queued": 4}}
        directory, roster = Directory([model], "t"), Roster()
        pool = directory.pools["m"]
        directory.update({"m": roster.update([described()])})
        async with pool.slot(), pool.slot():
            queued = asyncio.create_task(pool.slot().__aenter__())
            await until(lambda: pool.waiting)
            for _ in range(5):
                directory.update({"m": roster.update([SLOW])})
            await asyncio.sleep(0)
            assert not queued.done()
            assert (pool.ongoing, pool.replicas["r1"].state) == (2, "unknown")
            directory.update({"m": roster.update([described()])})
            assert (pool.ongoing, pool.replicas["r1"].state) == (2, "ready")
        await queued
        assert pool.ongoing == 1

    run(go)


def test_a_model_is_settled_while_all_replicas_are_ready_and_no_request_is_queued() -> None:
    async def go() -> None:
        pool = pool_of(r1=9)
        assert pool.settled
        for state in ("draining", "broken", "unknown"):
            setattr(pool.replicas["r1"], state, True)
            assert not pool.settled
            setattr(pool.replicas["r1"], state, False)
        pool.waiting.add(None, frozenset(), False)
        assert not pool.settled

    run(go)


def test_a_gateway_whose_discovery_has_ended_is_unhealthy() -> None:
    async def go() -> None:
        card = {"id": "m", "object": "model", "metadata": {}}
        model = {"card": card, "route": "/m", "aliases": [], "limits": {}, "handle": Handle()}
        server = GatewayServer.__new__(GatewayServer)
        await server.__init__([model], "t", Policy(access_log="off").model_dump(mode="json"))  # type: ignore[misc]
        server.check_health()  # and it has found the replicas before it was ready
        assert list(server._directory.pools["m"].replicas) == ["r1"]
        server._polling.cancel()
        await until(server._polling.done)
        with pytest.raises(RuntimeError, match="discovery"):
            server.check_health()

    run(go)


@pytest.mark.ray
@pytest.mark.alone
@pytest.mark.timeout(120)
def test_ray_serve_reports_slow_raising_and_dead_replicas_as_assumed_here() -> None:
    command = [sys.executable, str(Path(__file__).with_name("discovery_probe.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert done.returncode == 0, done.stderr[-2000:]
    assert dict(map(json.loads, lines)) == {
        "started": ["ready", "ready", "ready"],
        "one slow": ["unknown", "ready", "ready"],
        "fast again": ["ready", "ready", "ready"],
        "one raises": ["ready", "unknown", "ready"],
        "one killed": ["ready", "ready", "dead"],
        "after the death": ["ready", "ready", "gone"],
        "not listed": ["unknown", "unknown", "gone"],
        "removed": ["gone", "gone", "gone"],
    }
