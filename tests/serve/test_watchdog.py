"""Hang detection, in virtual time and without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from quantserve.serve.replica.watchdog import LONGEST_INTERVAL_S, PINGS, watch

from .virtual_time import VirtualLoop, run_virtual

TIMEOUT_S = 120.0


def watched(
    ping: Callable[[], Awaitable[None]], seconds: float = 1e6, timeout_s: float = TIMEOUT_S
) -> tuple[bool, float]:
    """The result and the time it took; the process dies after some seconds."""

    async def go() -> tuple[bool, float]:
        loop = asyncio.get_running_loop()
        return await watch(ping, lambda: loop.time() >= seconds, timeout_s), loop.time()

    result: tuple[bool, float] = run_virtual(go)
    return result


async def hang() -> None:
    await asyncio.Event().wait()


async def fail() -> None:
    raise RuntimeError("the engine is busy with something else")


def test_an_engine_that_answers_is_not_hung_and_seldom_asked() -> None:
    asked = 0

    async def answer() -> None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(30)  # a long prefill

    assert watched(answer, 10_000.0)[0] is False
    assert asked <= 10_000 / 30 + 1
    asked = 0

    async def at_once() -> None:
        nonlocal asked
        asked += 1

    assert watched(at_once, 10_000.0)[0] is False
    assert 10_000 / (LONGEST_INTERVAL_S + 1) - 2 <= asked <= 10_000 / LONGEST_INTERVAL_S + 1


@pytest.mark.parametrize("ping", [hang, fail])
@pytest.mark.parametrize("timeout_s", [12.0, 120.0])
def test_without_an_answer_it_is_hung(ping: Callable[[], Awaitable[None]], timeout_s: float) -> None:
    hung, when = watched(ping, timeout_s=timeout_s)
    assert hung
    assert timeout_s < when <= timeout_s * (1 + 1 / PINGS) + 3


def test_pings_that_fail_now_and_then_do_not_turn_it_off() -> None:
    asked = 0

    async def flaky() -> None:
        nonlocal asked
        asked += 1
        if asked > 200:
            await hang()
        if asked % 2:
            raise RuntimeError("busy")

    hung, when = watched(flaky)
    assert hung
    assert asked == 201
    assert when > 200 * LONGEST_INTERVAL_S


def test_a_ping_that_is_cancelled_by_the_engine_is_no_answer() -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    assert watched(cancelled)[0] is True


def test_a_pause_of_the_own_process_is_not_a_hang() -> None:
    async def go() -> bool:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.call_later(50, lambda: setattr(loop, "now", loop.now + 3600))  # as after SIGSTOP and SIGCONT
        return await watch(lambda: asyncio.sleep(0), lambda: loop.time() > 8000, TIMEOUT_S)

    assert run_virtual(go) is False


def test_the_death_of_the_engine_is_noticed_within_a_tick() -> None:
    assert watched(hang, 50.0) == (False, 50.0)
