"""Service discovery: the poll interval follows the state of the replicas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from quantserve.serve.directory import poll_replicas

from .replica import pool_of, run, until

CALM_S = 5.0
THERE = {"id": "r1", "host": "127.0.0.1", "port": 9}


class Handle:
    """A deployment's handle, with one replica."""

    asked = 0

    def broadcast(self, method: str) -> Handle:
        assert method == "describe"
        return self

    def results(self, **_: object) -> list[dict[str, Any]]:
        self.asked += 1
        return [THERE]


class Sink:
    """A gateway's status, and the updates it got."""

    def __init__(self, *, reachable: bool = True, settled: bool = True) -> None:
        self.wanted: list[str] = []
        self.reachable = ["m"] if reachable else []
        self.settled = settled
        self.updates: list[Mapping[str, Sequence[Mapping[str, Any]]]] = []

    def update(self, addresses: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self.updates.append(addresses)


async def polls(sink: Sink, count: int) -> float:
    """Seconds until the replicas were polled `count` times."""
    handle, began = Handle(), time.monotonic()
    polling = asyncio.create_task(poll_replicas(sink, {"m": handle}, CALM_S))
    try:
        await until(lambda: handle.asked >= count)
    finally:
        polling.cancel()
    assert sink.updates[0] == {"m": [THERE]}
    return time.monotonic() - began


def test_healthy_replicas_are_polled_rarely() -> None:
    assert run(lambda: polls(Sink(), 2)) >= CALM_S


@pytest.mark.parametrize("state", [{"settled": False}, {"reachable": False}])
def test_changing_replicas_are_polled_often(state: dict[str, bool]) -> None:
    run(lambda: polls(Sink(**state), 8))  # at the slow interval this would time out


def test_a_missing_replica_speeds_up_polling_at_once() -> None:
    async def go() -> None:
        sink, handle = Sink(), Handle()
        polling = asyncio.create_task(poll_replicas(sink, {"m": handle}, CALM_S))
        await until(lambda: handle.asked == 1)
        sink.reachable = []
        await until(lambda: handle.asked >= 8)
        polling.cancel()

    run(go)


def test_a_model_is_settled_while_all_replicas_are_healthy_and_no_request_is_queued() -> None:
    pool = pool_of(r1=9)
    (replica,) = pool.replicas.values()
    assert pool.settled
    replica.draining = True
    assert not pool.settled
    replica.draining, replica.broken_until = False, time.monotonic() + 60
    assert not pool.settled
    replica.broken_until = time.monotonic() - 1
    assert pool.settled
    pool.waiting.append(asyncio.new_event_loop().create_future())
    assert not pool.settled
