"""Admission: limits, the queue and its timeout, and the choice of the replica."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.serve.asgi import Refused
from quantserve.serve.gateway.middleware.limits import Policy, layers
from quantserve.serve.gateway.upstreams import pool as replicas
from quantserve.serve.gateway.upstreams.pool import HEALTH_S, Limits, Pool
from quantserve.serve.gateway.upstreams.proxy import RemoteModel, affinity_key
from quantserve.serve.gateway.upstreams.queue import Queue

from .asgi_client import request
from .replica import SYSTEM, Replica, pool_of, post, run, served, until, unused_port

TIMED_OUT = r"Timed out after 0\.2 s in the queue of model `m`\. Retry in \d+ s\."


def public(app: ASGIApp) -> ASGIApp:
    """The app behind the layers of the public address, which read the body."""
    return layers(app, Policy(access_log="off"))


def test_a_full_model_refuses_at_once_and_in_order() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            app = RemoteModel(pool_of(Limits(ongoing=2, queued=1), r=port))
            begun = [asyncio.create_task(post(app)) for _ in range(3)]
            await until(lambda: len(replica.requests) == 2 and app.pool.waiting)
            refused = await post(app)  # while the others are held: it has waited for none of them
            assert len(replica.requests) == 2
            assert (refused.status, refused.error["code"], refused.error["type"]) == (
                429,
                "queue_full",
                "rate_limit_error",
            )
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.error["message"].startswith("Model `m` is at capacity (2 running, 1 queued). Retry in ")
            replica.hold.set()
            assert [answer.status for answer in await asyncio.gather(*begun)] == [200, 200, 200]
            assert (await post(app)).status == 200
            assert app.pool.ongoing == 0

    run(work)


def test_a_model_at_capacity_still_returns_metrics() -> None:
    async def work() -> None:
        async with served(Replica()) as port:
            pool = pool_of(Limits(ongoing=1, queued=0), r=port)
            async with pool.slot():
                assert (await post(RemoteModel(pool))).status == 429
                assert (await request(RemoteModel(pool), "GET", "/metrics")).status == 200
                assert pool.ongoing == 1
        pool.update([])
        assert (await request(RemoteModel(pool), "GET", "/metrics")).status == 503

    run(work)


def test_the_queue_is_first_in_first_out() -> None:
    async def work() -> None:
        pool = Pool("demo", Limits(ongoing=2, queued=100))
        pool.update([{"id": "r", "host": "127.0.0.1", "port": 9}])
        served: list[int] = []

        async def client(number: int) -> None:
            async with pool.slot():
                served.append(number)
                for _ in range(number % 3):
                    await asyncio.sleep(0)

        tasks: list[asyncio.Task[None]] = []
        for number in range(200):  # they come faster than they are served, at whatever moment of the others' turns
            tasks.append(asyncio.create_task(client(number)))
            if number % 2:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        # Two have places at a time, of whom either may notice first.
        assert max(abs(place - number) for place, number in enumerate(served)) <= 2
        assert (pool.ongoing, len(pool.waiting)) == (0, 0)

    run(work)


def test_a_request_that_had_a_slot_goes_before_new_ones() -> None:
    async def work() -> None:
        pool = Pool("demo", Limits(ongoing=1, queued=1))
        pool.update([{"id": "r", "host": "127.0.0.1", "port": 9}])
        served: list[str] = []

        async def client(name: str, retry: bool = False) -> None:
            async with pool.slot(retry=retry):
                served.append(name)

        async with pool.slot():
            tasks = [asyncio.create_task(client("new")), asyncio.create_task(client("moved", retry=True))]
            await until(lambda: len(pool.waiting) == 2)
        await asyncio.gather(*tasks)
        assert served == ["moved", "new"]

    run(work)


def test_a_long_queue_is_served_in_linear_time() -> None:
    async def work(length: int) -> float:
        queue = Queue()
        waiters = [queue.add(None, frozenset(), False) for _ in range(length)]
        began = time.process_time()
        for waiter in waiters[1::3]:  # some leave from the middle
            queue.remove(waiter)
        while heads := queue.heads():
            queue.remove(heads[0])
        assert len(queue) == 0
        return time.process_time() - began

    short, long = run(lambda: work(2_000)), run(lambda: work(40_000))
    assert long < 100 * short  # linear: 20 times; quadratic: 400 times


def test_retry_after_counts_only_requests_that_were_served(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(replicas, "monotonic", lambda: now)

    async def work() -> None:
        nonlocal now
        pool = Pool("demo", Limits(ongoing=1, queued=1))
        pool.update([{"id": "r", "host": "127.0.0.1", "port": 9}])
        for _ in range(4):
            async with pool.slot():
                now += 5
        for _ in range(100):
            with contextlib.suppress(asyncio.CancelledError):
                async with pool.slot():
                    raise asyncio.CancelledError  # its client has disconnected
        async with pool.slot():
            queued = asyncio.create_task(pool.slot().__aenter__())
            await until(lambda: pool.waiting)
            with pytest.raises(Refused) as refused:
                await pool.slot().__aenter__()
        await queued
        assert refused.value.headers == {"retry-after": "8"}  # two requests, at 4 in 15 s

    run(work)


@pytest.mark.parametrize("wakes", [True, False])
def test_a_draining_replica_does_not_keep_a_model_from_being_started(wakes: bool) -> None:
    async def work() -> None:
        replica = Replica()
        async with served(replica) as port:
            pool = pool_of(Limits(wakes=wakes))
            pool.update([{"id": "old", "host": "127.0.0.1", "port": 9, "state": "draining"}])
            waiting = asyncio.create_task(post(RemoteModel(pool)))
            await until(lambda: pool.waiting)
            assert pool.wanted
            pool.update([{"id": "new", "host": "127.0.0.1", "port": port}])
            assert (await waiting).status == 200

    run(work)


def test_the_health_check_takes_the_first_healthy_replica_and_is_bounded() -> None:
    async def work() -> None:
        class Ill(Replica):
            async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
                if self.name == "hangs":
                    await asyncio.Event().wait()
                raise RuntimeError("the app is broken")

        async with served(Ill("hangs")) as a, served(Ill("fails")) as b, served(Replica()) as c:
            async with asyncio.timeout(HEALTH_S):
                assert await pool_of(a=a, b=b, c=c, dead=unused_port()).healthy()
            async with asyncio.timeout(3 * HEALTH_S):
                assert not await pool_of(a=a, b=b, dead=unused_port()).healthy()

    run(work)


def test_a_slot_given_to_a_disconnected_client_goes_to_the_next() -> None:
    async def work() -> None:
        pool = Pool("demo", Limits(ongoing=1))
        pool.update([{"id": "r", "host": "127.0.0.1", "port": 9}])

        async def client(release: asyncio.Event) -> None:
            async with pool.slot():
                await release.wait()

        release = [asyncio.Event() for _ in range(3)]
        tasks = [asyncio.create_task(client(event)) for event in release]
        await until(lambda: len(pool.waiting) == 2)
        release[0].set()
        while len(pool.waiting) == 2:
            await asyncio.sleep(0)
        assert pool.ongoing == 1  # the second has the slot and does not know it yet
        tasks[1].cancel()
        await until(lambda: not pool.waiting)
        assert pool.ongoing == 1
        release[2].set()
        await tasks[2]
        assert pool.ongoing == 0

    run(work)


def test_waiting_ends() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            app = RemoteModel(pool_of(Limits(ongoing=1, queued=5, queue_s=0.2), r=port))
            first = asyncio.create_task(post(app))
            await until(lambda: replica.requests)
            refused = await post(app)
            assert (refused.status, refused.error["code"]) == (429, "queue_timeout")
            assert re.fullmatch(TIMED_OUT, refused.error["message"])
            assert not app.pool.waiting
            replica.hold.set()
            assert (await first).status == 200

    run(work)


def test_busy_status_and_retry_are_the_configs() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            app = RemoteModel(pool_of(Limits(ongoing=1, queued=0, busy_status=503, retry_after_s=7), r=port))
            first = asyncio.create_task(post(app))
            await until(lambda: replica.requests)
            refused = await post(app)
            assert (refused.status, refused.headers["retry-after"]) == (503, "7")
            replica.hold.set()
            await first

    run(work)


def test_the_least_loaded_replica_is_next() -> None:
    async def work() -> None:
        replicas = [Replica("a"), Replica("b")]
        for replica in replicas:
            replica.hold = asyncio.Event()
        async with served(replicas[0]) as a, served(replicas[1]) as b:
            app = RemoteModel(pool_of(a=a, b=b))
            tasks = []
            for sent in range(1, 21):
                tasks.append(asyncio.create_task(post(app)))
                await until(lambda sent=sent: sum(len(replica.requests) for replica in replicas) == sent)  # type: ignore[misc]
            assert [len(replica.requests) for replica in replicas] == [10, 10]
            for replica in replicas:
                assert replica.hold is not None
                replica.hold.set()
            await asyncio.gather(*tasks)

    run(work)


@pytest.mark.parametrize(
    ("affinity", "bodies", "together"),
    [
        ("session", [{"user": "u", "prompt": str(i)} for i in range(8)], True),
        ("prefix", [{"prompt": "x" * 600 + str(i)} for i in range(8)], True),
        ("prefix", [{"messages": [SYSTEM, {"role": "user", "content": str(i)}]} for i in range(8)], True),
        ("none", [{"user": "u"}] * 8, False),
    ],
)  # fmt: skip
def test_affinity(affinity: str, bodies: list[dict[str, Any]], together: bool) -> None:
    async def work() -> None:
        replicas = [Replica("a"), Replica("b"), Replica("c")]
        async with served(replicas[0]) as a, served(replicas[1]) as b, served(replicas[2]) as c:
            app = public(RemoteModel(pool_of(Limits(affinity=affinity), a=a, b=b, c=c)))
            for body in bodies:
                assert (await post(app, body)).status == 200
            counts = sorted(len(replica.requests) for replica in replicas)
            assert (counts == [0, 0, 8]) is together

    run(work)


def test_affinity_yields_to_load() -> None:
    async def work() -> None:
        replicas = [Replica("a"), Replica("b")]
        for replica in replicas:
            replica.hold = asyncio.Event()
        async with served(replicas[0]) as a, served(replicas[1]) as b:
            app = public(RemoteModel(pool_of(Limits(affinity="session"), a=a, b=b)))
            tasks = [asyncio.create_task(post(app, {"user": "u"})) for _ in range(20)]
            await until(lambda: sum(len(replica.requests) for replica in replicas) == 20)
            assert min(len(replica.requests) for replica in replicas) >= 6
            for replica in replicas:
                assert replica.hold is not None
                replica.hold.set()
            await asyncio.gather(*tasks)

    run(work)


def test_affinity_key_needs_text() -> None:
    assert affinity_key({"user": 5, "prompt": [1, 2]}, "prefix") is None
    assert affinity_key({"messages": []}, "prefix") is None
    assert affinity_key({"prompt": "a"}, "session") is None


def test_a_client_that_disconnects_leaves_the_queue() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            app = RemoteModel(pool_of(Limits(ongoing=1, queued=1), r=port))
            first = asyncio.create_task(post(app))
            await until(lambda: replica.requests)
            second = asyncio.create_task(post(app))
            await until(lambda: app.pool.waiting)
            second.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await second
            assert not app.pool.waiting
            third = asyncio.create_task(post(app))
            await until(lambda: app.pool.waiting)
            replica.hold.set()
            assert [(await task).status for task in (first, third)] == [200, 200]

    run(work)


def test_a_model_at_zero_is_wanted_and_its_request_waits() -> None:
    async def work() -> None:
        replica = Replica()
        async with served(replica) as port:
            pool = pool_of(Limits(wakes=True))
            waiting = asyncio.create_task(post(RemoteModel(pool)))
            await until(lambda: pool.wanted)
            pool.update([{"id": "r", "host": "127.0.0.1", "port": port}])
            assert (await waiting).status == 200
            assert not pool.wanted

    run(work)


def test_losing_the_last_replica_refuses_queued_requests() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            pool = pool_of(Limits(ongoing=1, queued=5), r=port)
            first = asyncio.create_task(post(RemoteModel(pool)))
            await until(lambda: replica.requests)
            second = asyncio.create_task(post(RemoteModel(pool)))
            await until(lambda: pool.waiting)
            pool.update([])
            assert (await second).status == 503
            replica.hold.set()
            assert (await first).status == 200  # what runs may finish

    run(work)


def test_without_a_replica_the_answer_is_503_at_once() -> None:
    async def work() -> None:
        for pool in (pool_of(), pool_of(dead=unused_port())):
            answer = await post(RemoteModel(pool))  # at once: to wait is 30 s, more than `run` allows
            assert (answer.status, answer.error["code"]) == (503, "model_unavailable")
            assert answer.headers["retry-after"] == "5"

    run(work)
