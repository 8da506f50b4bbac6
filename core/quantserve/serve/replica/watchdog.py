"""Hang detection: asks for signs of life, and returns when there are none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

TICK_S: Final = 1.0
LONGEST_INTERVAL_S: Final = 10.0
"""Longest time between two pings; each interrupts the engine."""
PINGS: Final = 8
"""Pings within the timeout, unless it is long."""

logger = logging.getLogger(__name__)


async def watch(
    ping: Callable[[], Awaitable[object]], dead: Callable[[], bool], timeout_s: float, tick_s: float = TICK_S
) -> bool:
    """Return when the watched process has died (False), or answered no ping for `timeout_s` (True).

    A ping that raises is no answer, and is repeated. Time during which this process itself did not run, because it was
    paused or starved, does not count.

    Args:
        ping: returns when the process has answered.
        dead: whether the process has died.
        timeout_s: hang timeout in seconds.
        tick_s: how often `dead` is called, in seconds.
    """
    interval = min(LONGEST_INTERVAL_S, timeout_s / PINGS)
    loop = asyncio.get_running_loop()
    last, silent, since_ping = loop.time(), 0.0, interval
    question: asyncio.Future[object] | None = None
    try:
        while not dead():
            if question is None and since_ping >= interval:
                question, since_ping = asyncio.ensure_future(ping()), 0.0
            await asyncio.sleep(tick_s)
            now = loop.time()
            passed, last = min(now - last, 2 * tick_s), now
            since_ping += passed
            silent += passed
            if question is not None and question.done():
                if failed := question.cancelled() or question.exception():
                    logger.warning("a ping of the engine failed: %r", failed)
                else:
                    silent = 0.0
                question = None
            if silent > timeout_s + interval:
                return True
        return False
    finally:
        if question is not None:
            question.cancel()
