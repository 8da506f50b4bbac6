"""Admission under any sequence of events, in virtual time: no slot stays unused, no request is lost or stuck."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quantserve.serve.asgi import Refused
from quantserve.serve.gateway.upstreams.pool import Limits, Pool
from quantserve.serve.gateway.upstreams.replica_set import BROKEN_S, Replica, ReplicaDraining
from quantserve.serve.transport.client import ReplicaLost

from .virtual_time import VirtualLoop

NAMES = ("a", "b", "c")
QUEUE_S = 30.0
ATTEMPTS = 3
STATES = st.sampled_from(["gone", "dead", "ready", "ready", "draining", "unknown"])


@dataclass(eq=False)
class Client:
    """A request, with the events that happened to it."""

    number: int
    avoid: frozenset[str] = frozenset()
    retry: bool = False
    replica: Replica | None = None
    order: asyncio.Future[type[Exception] | None] | None = None
    ended: list[str] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    @property
    def waits(self) -> bool:
        return not self.ended and self.replica is None


class Admission(RuleBasedStateMachine):
    """Requests, replicas that come, go and fail, and time."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.clients: list[Client] = []

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        async def then_settle() -> None:
            await work
            for _ in range(20 + 5 * len(self.clients)):
                await asyncio.sleep(0)

        self.loop.run_until_complete(then_settle())

    @initialize(
        slots=st.integers(1, 2),
        queued=st.sampled_from([-1, 1, 4]),
        wakes=st.booleans(),
        affinity=st.sampled_from(["none", "session"]),
    )
    def start(self, slots: int, queued: int, wakes: bool, affinity: str) -> None:
        self.pool = Pool("m", Limits(slots, queued, QUEUE_S, wakes, affinity))
        self.states = {"a": "ready", "b": "ready", "c": "gone"}
        self.discover("a", "ready")

    @rule(name=st.sampled_from(NAMES), state=STATES)
    def discover(self, name: str, state: str) -> None:
        self.states[name] = state

        async def work() -> None:
            before = {name for name, replica in self.pool.replicas.items() if replica.draining}
            self.pool.update([{"id": name, "host": "127.0.0.1", "port": 9, "state": state}
                              for name, state in self.states.items() if state != "gone"])  # fmt: skip
            for name in before & set(self.pool.replicas):
                assert self.pool.replicas[name].draining  # an older answer does not revoke it

        self.run(work())

    @rule(key=st.sampled_from([None, None, "u", "v"]), together=st.integers(1, 4))
    def arrive(self, key: str | None, together: int) -> None:
        async def work() -> None:
            for _ in range(together):
                client = Client(len(self.clients))
                self.clients.append(client)
                client.task = asyncio.create_task(self.request(client, key))

        self.run(work())

    async def request(self, client: Client, key: str | None) -> None:
        while True:
            try:
                async with self.pool.slot(key, client.avoid, retry=client.retry) as replica:
                    fresh = [other for other in self.clients if other.waits and not other.retry]
                    assert client.retry or not any(other.number < client.number for other in fresh)
                    client.replica, client.order = replica, self.loop.create_future()
                    try:
                        if error := await client.order:
                            raise error
                    finally:
                        client.replica, client.retry = None, True
                client.ended.append("answered")
                return
            except ReplicaDraining:
                continue
            except ReplicaLost:
                client.avoid |= {replica.id}
                if len(client.avoid) == ATTEMPTS:
                    client.ended.append("refused")
                    return
            except Refused as refused:
                client.ended.append(str(refused.error["code"]))
                return
            except asyncio.CancelledError:
                client.ended.append("left")
                raise

    def running(self) -> list[Client]:
        return [client for client in self.clients if client.replica is not None]

    @precondition(lambda self: self.running())
    @rule(data=st.data(), error=st.sampled_from([None, ReplicaLost, ReplicaLost, ReplicaDraining]))
    def end(self, data: st.DataObject, error: type[Exception] | None) -> None:
        async def work() -> None:
            chosen = data.draw(st.lists(st.sampled_from(self.running()), min_size=1, max_size=3, unique_by=id))
            for client in chosen:
                assert client.order is not None
                client.order.set_result(error)

        self.run(work())

    @precondition(lambda self: any(not client.ended for client in self.clients))
    @rule(data=st.data(), also_end=st.booleans())
    def leave(self, data: st.DataObject, also_end: bool) -> None:
        """A client disconnects, maybe in the same turn in which a slot becomes free."""

        async def work() -> None:
            if also_end and (running := self.running()):
                order = data.draw(st.sampled_from(running)).order
                assert order is not None
                order.set_result(None)
                for _ in range(data.draw(st.integers(0, 3))):
                    await asyncio.sleep(0)
            left = [one for one in self.clients if not one.ended]
            client = data.draw(st.sampled_from([one for one in left if one.waits] or left or self.clients))
            assert client.task is not None
            client.task.cancel()

        self.run(work())

    @rule(seconds=st.sampled_from([0.1, BROKEN_S, QUEUE_S / 2, QUEUE_S]))
    def wait(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @invariant()
    def slots_are_counted(self) -> None:
        counts = dict.fromkeys([client.replica for client in self.running()], 0)
        for client in self.running():
            counts[client.replica] += 1
        for replica in {*self.pool.replicas.values(), *counts}:
            assert replica is not None
            assert replica.ongoing == counts.get(replica, 0) <= self.pool.limits.ongoing
        assert self.pool.ongoing == len(self.running())
        assert len(self.pool.waiting) == sum(client.waits for client in self.clients)
        for client in self.clients:
            assert len(client.ended) <= 1
            refused_when_new = client.ended == ["queue_full"]
            assert not (client.retry and refused_when_new)

    @invariant()
    def nobody_waits_for_a_slot_that_is_free_or_never_comes(self) -> None:
        draining = any(replica.draining for replica in self.pool.replicas.values())
        for client in self.clients:
            if client.waits:
                usable = [one for one in self.pool.replicas.values() if not one.draining and one.id not in client.avoid]
                reached = [one for one in usable if not one.broken] or usable
                assert all(one.ongoing == self.pool.limits.ongoing for one in reached)
                assert usable or draining or self.pool.limits.wakes

    @invariant()
    def a_model_that_scales_from_zero_is_woken(self) -> None:
        usable = any(not replica.draining for replica in self.pool.replicas.values())
        assert self.pool.wanted == (any(client.waits for client in self.clients) and not usable)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for name in NAMES:
                self.discover(name, "ready")
            for _ in range(3 * len(self.clients) + 3):
                for client in self.running():
                    assert client.order is not None
                    if not client.order.done():
                        client.order.set_result(None)
                self.run(asyncio.sleep(BROKEN_S))
            self.run(asyncio.sleep(QUEUE_S))
            assert all(len(client.ended) == 1 for client in self.clients)
            assert (self.pool.ongoing, len(self.pool.waiting)) == (0, 0)
            assert all(client.task and client.task.done() for client in self.clients)
            for client in self.clients:
                assert client.task is not None
                assert client.task.cancelled() or client.task.exception() is None
        self.loop.close()


TestAdmission = Admission.TestCase
TestAdmission.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
