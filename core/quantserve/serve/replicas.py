"""Per-model replica pool: admission, queueing and replica choice.

All requests pass one gateway, which therefore knows the exact number of requests on each replica, without probes.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from quantserve.serve.asgi import Refused
from quantserve.serve.upstream import AppFailed, ReplicaLost, Timing, Upstream

BROKEN_S: Final = 1.0
"""How long a replica that could not be reached gets no requests, if there are other replicas."""
HEALTH_S: Final = 3.0
SLACK: Final = 4
"""A session or prefix stays on its replica until that has so many more requests than the least loaded one."""
RETRY_AFTER_S: Final = (1, 60)


@dataclass(eq=False)
class Replica:
    """A replica and its load.

    Attributes:
        ongoing: requests in progress that this gateway sent.
        draining: it accepts no new requests.
        broken_until: time (monotonic) until which other replicas are preferred.
    """

    id: str
    upstream: Upstream
    ongoing: int = 0
    draining: bool = False
    broken_until: float = 0.0


@dataclass(frozen=True)
class Limits:
    """Admission limits of one model.

    Attributes:
        ongoing: requests in progress per replica.
        queued: most requests in the queue; -1 is no limit.
        queue_s: queue timeout in seconds.
        wakes: whether a queued request starts a replica when there is none (the model scales to zero).
        affinity: which requests stay together on a replica: ``none``, ``session`` or ``prefix``.
        busy_status: HTTP status of a request that is refused for lack of capacity, 429 or 503.
        retry_after_s: ``Retry-After`` of such a refusal; None estimates it from the queue and the recent throughput.
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
    """A queued request, with its affinity key and the replicas to avoid; see `Pool.slot`."""

    key: str | None
    avoid: frozenset[str]
    place: asyncio.Future[Replica] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def given(self) -> Replica | None:
        """The replica whose slot this request already holds, if any."""
        done = self.place.done() and not self.place.cancelled() and not self.place.exception()
        return self.place.result() if done else None


@dataclass
class Pool:
    """The replicas of one model and the queue of requests for them.

    Attributes:
        running: for each request in progress or queued, a function that ends it with an error.
    """

    model_id: str
    limits: Limits
    token: str = ""
    timing: Timing = field(default_factory=Timing)
    running: set[Callable[[], None]] = field(default_factory=set)
    replicas: dict[str, Replica] = field(default_factory=dict)
    waiting: deque[_Waiter] = field(default_factory=deque)
    _finished: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def update(self, addresses: Sequence[Mapping[str, Any]]) -> None:
        """Set the running replicas: each with ``id``, ``host``, ``port`` and maybe ``draining``."""
        known = {str(address["id"]): address for address in addresses}
        for gone in set(self.replicas) - set(known):
            self.replicas.pop(gone).upstream.close()
        for name, address in known.items():
            if name not in self.replicas:
                upstream = Upstream(str(address["host"]), int(address["port"]), self.token, self.timing)
                self.replicas[name] = Replica(name, upstream)
            self.replicas[name].draining = bool(address.get("draining"))
        self._wake()

    @property
    def wanted(self) -> bool:
        """Whether requests are queued and there is no replica."""
        return bool(self.waiting) and not self.replicas

    @property
    def reachable(self) -> bool:
        """Whether requests are accepted: there is a replica, or one is started on demand."""
        return bool(self.replicas) or self.limits.wakes

    @property
    def settled(self) -> bool:
        """Whether no request is queued, and no replica is draining or failed within the last `BROKEN_S`."""
        now = time.monotonic()
        return not self.waiting and not any(one.draining or one.broken_until > now for one in self.replicas.values())

    @property
    def _awaited(self) -> bool:
        """Whether another replica may appear soon: started on demand, or as the successor of a draining one, which the
        next discovery poll finds.
        """
        return self.limits.wakes or any(replica.draining for replica in self.replicas.values())

    @property
    def ongoing(self) -> int:
        """Requests in progress, on all replicas."""
        return sum(replica.ongoing for replica in self.replicas.values())

    def fail_running(self) -> None:
        """End all requests in progress or queued with an error; see `Directory.fail_running`."""
        for fail in list(self.running):
            fail()

    @asynccontextmanager
    async def slot(self, key: str | None = None, avoid: frozenset[str] = frozenset()) -> AsyncIterator[Replica]:
        """A slot on a replica for one request; waits in the queue for one.

        Args:
            key: affinity key; requests with the same key go to the same replica if the load allows it.
            avoid: ids of replicas on which this request already failed.

        Raises:
            Refused: 429, the queue is full or the queue timeout passed; 503, there is no replica.
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
        """A replica for a request without engine work, such as a metrics scrape: it needs no slot.

        Args:
            avoid: ids of replicas on which this request already failed.

        Raises:
            Refused: 503, there is no replica.
        """
        usable = self._usable(avoid)
        if not usable:
            raise self.unavailable()
        yield min(usable, key=lambda replica: (replica.broken_until > time.monotonic(), replica.ongoing))

    async def healthy(self) -> bool:
        """Whether a replica's health check passes, or a request would start a replica."""
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
        except (ReplicaLost, AppFailed, TimeoutError):
            return False

    async def _acquire(self, key: str | None, avoid: frozenset[str]) -> Replica:
        # First in, first out: a new request does not overtake the queue.
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
            if replica := waiter.given:  # a slot was assigned just before the timeout
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
        """The replica with the fewest requests, or the one of the affinity key unless it has `SLACK` more."""
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
        """Assign free slots to queued requests, in order."""
        for waiter in tuple(self.waiting):
            if waiter.place.done():  # its client has disconnected
                continue
            if replica := self._choose(waiter.key, waiter.avoid):
                replica.ongoing += 1
                waiter.place.set_result(replica)
            elif not (self._usable(waiter.avoid) or self._awaited):
                waiter.place.set_exception(self.unavailable())
            elif waiter.avoid:  # a later request that avoids no replica may still find a slot
                continue
            else:
                break
            self.waiting.remove(waiter)

    def unavailable(self) -> Refused:
        """The error of a model that has no replica."""
        message = f"The model `{self.model_id}` is temporarily unavailable: no replica is ready. Retry in 5 s."
        return Refused(503, message, code="model_unavailable", headers={"retry-after": "5"})

    def _full(self) -> Refused:
        load = f"{self.ongoing} running, {len(self.waiting)} queued"
        return self._busy(f"Model `{self.model_id}` is at capacity ({load}).", "queue_full")

    def _too_long(self) -> Refused:
        waited = f"{self.limits.queue_s:g} s"
        return self._busy(f"Timed out after {waited} in the queue of model `{self.model_id}`.", "queue_timeout")

    def _busy(self, message: str, code: str) -> Refused:
        given = self.limits.retry_after_s
        retry = self._retry_after() if given is None else max(1, round(given))
        headers = {"retry-after": str(retry)}
        return Refused(self.limits.busy_status, f"{message} Retry in {retry} s.", code=code, headers=headers)

    def _retry_after(self) -> int:
        """Seconds until the current queue is served, at the rate of the last 64 completed requests."""
        low, high = RETRY_AFTER_S
        if len(self._finished) < 2:
            return low
        rate = len(self._finished) / max(1e-3, time.monotonic() - self._finished[0])
        return int(min(high, max(low, round((len(self.waiting) + 1) / rate))))
