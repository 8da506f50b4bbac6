"""One result for all callers of an interval."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """Calls a function at most once per interval; concurrent and later callers get the same result.

    An exception goes to the callers that waited for it, and is not kept.

    Args:
        function: the function.
        interval_s: seconds its result is reused.
    """

    def __init__(self, function: Callable[[], Awaitable[T]], interval_s: float) -> None:
        self._function = function
        self._interval_s = interval_s
        self._running: asyncio.Task[T] | None = None
        self._until = 0.0

    async def __call__(self) -> T:
        """The result of a call that is in progress or recent, else of a new one."""
        if self._running is None or (self._running.done() and time.monotonic() >= self._until):
            self._running = asyncio.ensure_future(self._call())
        return await asyncio.shield(self._running)

    async def _call(self) -> T:
        self._until = 0.0
        result = await self._function()
        self._until = time.monotonic() + self._interval_s
        return result
