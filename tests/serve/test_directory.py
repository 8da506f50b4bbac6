"""How often one looks where replicas are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from quantserve.serve.directory import follow

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


class Book:
    """What the gateway says of itself."""

    def __init__(self, *, reachable: bool = True, settled: bool = True) -> None:
        self.wanted: list[str] = []
        self.reachable = ["m"] if reachable else []
        self.settled = settled
        self.told: list[Mapping[str, Sequence[Mapping[str, Any]]]] = []

    def update(self, addresses: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self.told.append(addresses)


async def looks(book: Book, count: int) -> float:
    """Seconds until the replicas were asked so often."""
    handle, began = Handle(), time.monotonic()
    following = asyncio.create_task(follow(book, {"m": handle}, CALM_S))
    try:
        await until(lambda: handle.asked >= count)
    finally:
        following.cancel()
    assert book.told[0] == {"m": [THERE]}
    return time.monotonic() - began


def test_calm_replicas_are_asked_seldom() -> None:
    assert run(lambda: looks(Book(), 2)) >= CALM_S


@pytest.mark.parametrize("state", [{"settled": False}, {"reachable": False}])
def test_replicas_that_come_and_go_are_asked_often(state: dict[str, bool]) -> None:
    run(lambda: looks(Book(**state), 8))  # calm ones need twice the time it may take


def test_calm_ends_at_once_when_a_replica_is_missed() -> None:
    async def go() -> None:
        book, handle = Book(), Handle()
        following = asyncio.create_task(follow(book, {"m": handle}, CALM_S))
        await until(lambda: handle.asked == 1)
        book.reachable = []
        await until(lambda: handle.asked >= 8)
        following.cancel()

    run(go)


def test_a_model_is_settled_while_nothing_is_to_be_expected() -> None:
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
