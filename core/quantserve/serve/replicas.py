"""Which replicas a model has, which one gets the next request, and how many may wait: the front door's book.

All requests pass one front door, so it knows exactly how many each replica has, and needs neither probes nor guesses.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from quantserve.serve.asgi import Refused
from quantserve.serve.upstream import ReplicaLost, Upstream

BROKEN_S: Final = 1.0
"""How long a replica that could not be reached is passed over, when there are others."""
HEALTH_S: Final = 3.0
SLACK: Final = 4
"""A session or prefix stays on its replica until that has so many more requests than the least loaded one."""
RETRY_AFTER_S: Final = (1, 60)


@dataclass(eq=False)
class Replica:
    """A replica as the front door sees it.

    Attributes:
        ongoing: requests in progress that came through this front door.
        draining: it takes no new requests.
        broken_until: time (monotonic) until which it is passed over.
    """

    id: str
    upstream: Upstream
    ongoing: int = 0
    draining: bool = False
    broken_until: float = 0.0


@dataclass(frozen=True)
class Limits:
    """How much one model takes at a time.

    Attributes:
        ongoing: requests in progress per replica.
        queued: requests waiting for a replica; -1 is no limit.
        queue_s: longest wait.
        wakes: whether a model without replicas gets one when a request waits (it was scaled to zero).
        affinity: what keeps requests together on a replica: ``none``, ``session`` or ``prefix``.
        busy_status: HTTP status of a request that finds no place, 429 or 503.
        retry_after_s: what such a request is told; None tells it how long the queue takes at the rate of late.
    """

    ongoing: int = 256
    queued: int = 256
    queue_s: float = 30.0
    wakes: bool = False
    affinity: str = "none"
    busy_status: int = 429
    retry_after_s: float | None = None


@dataclass(eq=False)
class _Waiter:
    """A request that waits for a place, and what is known about where it may go; see `Pool.slot`."""

    key: str | None
    avoid: frozenset[str]
    place: asyncio.Future[Replica] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def given(self) -> Replica | None:
        """The place, which is taken already."""
        done = self.place.done() and not self.place.cancelled() and not self.place.exception()
        return self.place.result() if done else None


@dataclass
class Pool:
    """The replicas of one model and the requests that wait for them."""

    model_id: str
    limits: Limits
    token: str = ""
    replicas: dict[str, Replica] = field(default_factory=dict)
    waiting: deque[_Waiter] = field(default_factory=deque)
    _finished: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def update(self, addresses: Sequence[Mapping[str, Any]]) -> None:
        """Take in which replicas run now: each with ``id``, ``host`` and ``port``."""
        known = {str(address["id"]): address for address in addresses}
        for gone in set(self.replicas) - set(known):
            self.replicas.pop(gone).upstream.close()
        for name, address in known.items():
            if name not in self.replicas:
                upstream = Upstream(str(address["host"]), int(address["port"]), self.token)
                self.replicas[name] = Replica(name, upstream)
            self.replicas[name].draining = bool(address.get("draining"))
        self._wake()

    @property
    def wanted(self) -> bool:
        """Whether requests wait while there is no replica at all."""
        return bool(self.waiting) and not self.replicas

    @property
    def reachable(self) -> bool:
        """Whether requests are taken: there is a replica, or one is started for them."""
        return bool(self.replicas) or self.limits.wakes

    @property
    def settled(self) -> bool:
        """Whether no request waits for a replica, and none is draining or could not be reached of late."""
        now = time.monotonic()
        return not self.waiting and not any(one.draining or one.broken_until > now for one in self.replicas.values())

    @property
    def _awaited(self) -> bool:
        """Whether there may soon be another replica: one is started for those who wait, or takes over from one that is
        being stopped, which the next look for replicas will tell.
        """
        return self.limits.wakes or any(replica.draining for replica in self.replicas.values())

    @property
    def ongoing(self) -> int:
        """Requests in progress, on all replicas."""
        return sum(replica.ongoing for replica in self.replicas.values())

    @asynccontextmanager
    async def slot(self, key: str | None = None, avoid: frozenset[str] = frozenset()) -> AsyncIterator[Replica]:
        """A place on a replica for one request.

        Args:
            key: requests with the same key go to the same replica where the load allows.
            avoid: ids of replicas that failed this request already.

        Raises:
            Refused: 429, all places and the queue are full, or the wait was too long; 503, there is no replica.
        """
        replica = await self._acquire(key, avoid)
        try:
            yield replica
        finally:
            replica.ongoing -= 1
            self._finished.append(time.monotonic())
            self._wake()

    @asynccontextmanager
    async def visit(self, avoid: frozenset[str] = frozenset()) -> AsyncIterator[Replica]:
        """A replica for a request that costs its engine nothing, such as one for metrics: it needs no place.

        Args:
            avoid: ids of replicas that failed this request already.

        Raises:
            Refused: 503, there is no replica.
        """
        usable = self._usable(avoid)
        if not usable:
            raise self.unavailable()
        yield min(usable, key=lambda replica: (replica.broken_until > time.monotonic(), replica.ongoing))

    async def healthy(self) -> bool:
        """Whether any replica answers and says that its engine is well, or a request would wake one."""
        if self.limits.wakes and not self._usable(frozenset()):
            return True
        return any(await asyncio.gather(*(self._healthy(replica) for replica in list(self.replicas.values()))))

    @staticmethod
    async def _healthy(replica: Replica) -> bool:
        try:
            async with asyncio.timeout(HEALTH_S):
                response = await replica.upstream.request("GET", b"/health")
                try:
                    while await response.read():
                        pass
                finally:
                    response.close()
                return response.status == 200
        except (ReplicaLost, TimeoutError):
            return False

    async def _acquire(self, key: str | None, avoid: frozenset[str]) -> Replica:
        # Those who came first are served first: nobody overtakes the queue.
        if not self.waiting and (replica := self._choose(key, avoid)):
            replica.ongoing += 1
            return replica
        if not (self._usable(avoid) or self._awaited):
            raise self.unavailable()
        if 0 <= self.limits.queued <= len(self.waiting):
            raise self._full()
        waiter = _Waiter(key, avoid)
        self.waiting.append(waiter)
        try:
            async with asyncio.timeout(self.limits.queue_s):
                return await waiter.place
        except TimeoutError:
            if replica := waiter.given:  # at the last moment
                return replica
            raise self._too_long() from None
        except asyncio.CancelledError:
            if replica := waiter.given:
                replica.ongoing -= 1
                self._wake()
            raise
        finally:
            if waiter in self.waiting:
                self.waiting.remove(waiter)

    def _usable(self, avoid: frozenset[str]) -> list[Replica]:
        return [replica for name, replica in self.replicas.items() if not replica.draining and name not in avoid]

    def _choose(self, key: str | None, avoid: frozenset[str]) -> Replica | None:
        """The replica with the fewest requests, or the key's own while that is not much busier."""
        now = time.monotonic()
        usable = self._usable(avoid)
        sound = [replica for replica in usable if replica.broken_until <= now] or usable
        free = [replica for replica in sound if replica.ongoing < self.limits.ongoing]
        if not free:
            return None
        least = min(replica.ongoing for replica in free)
        if key is not None:
            own = max(sound, key=lambda replica: hashlib.blake2b(f"{key}\0{replica.id}".encode()).digest())
            if own.ongoing < self.limits.ongoing and own.ongoing - least < SLACK:
                return own
        return random.choice([replica for replica in free if replica.ongoing == least])

    def _wake(self) -> None:
        """Give those who wait the places there are, in their order."""
        for waiter in tuple(self.waiting):
            if waiter.place.done():  # its client has just left
                continue
            if replica := self._choose(waiter.key, waiter.avoid):
                replica.ongoing += 1
                waiter.place.set_result(replica)
            elif not (self._usable(waiter.avoid) or self._awaited):
                waiter.place.set_exception(self.unavailable())
            elif waiter.avoid:  # who avoids nothing may find one
                continue
            else:
                break
            self.waiting.remove(waiter)

    def unavailable(self) -> Refused:
        """The error of a model that has no replica."""
        message = f"the model `{self.model_id}` is not available at the moment; try again"
        return Refused(503, message, code="model_unavailable", headers={"retry-after": "5"})

    def _full(self) -> Refused:
        load = f"{self.ongoing} requests in progress and {len(self.waiting)} waiting"
        return self._busy(f"the model `{self.model_id}` is busy: {load}, which is all it takes", "queue_full")

    def _too_long(self) -> Refused:
        waited = f"within {self.limits.queue_s:g} s"
        return self._busy(f"the model `{self.model_id}` had no place for this request {waited}", "queue_timeout")

    def _busy(self, message: str, code: str) -> Refused:
        given = self.limits.retry_after_s
        retry = self._retry_after() if given is None else max(1, round(given))
        headers = {"retry-after": str(retry)}
        return Refused(self.limits.busy_status, f"{message}; try again in {retry} s", code=code, headers=headers)

    def _retry_after(self) -> int:
        """Seconds until those who wait now will have been served, at the rate of late."""
        low, high = RETRY_AFTER_S
        if len(self._finished) < 2:
            return low
        rate = len(self._finished) / max(1e-3, time.monotonic() - self._finished[0])
        return int(min(high, max(low, round((len(self.waiting) + 1) / rate))))
