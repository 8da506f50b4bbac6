"""Per-model replica pool: admission, queueing and replica choice.

All requests pass one gateway, which therefore knows the exact number of requests on each replica, without probes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

from quantserve.serve.asgi import Refused
from quantserve.serve.gateway.upstreams.queue import Queue, Waiter
from quantserve.serve.gateway.upstreams.replica_set import Replica, ReplicaSet
from quantserve.serve.transport.client import AppFailed, ReplicaLost, Timing

HEALTH_S: Final = 3.0
RETRY_AFTER_S: Final = (1, 60)


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


class Pool:
    """The replicas of one model and the queue of requests for them.

    Attributes:
        replicas: by id.
        waiting: the queue.
        running: for each request in progress or queued, a function that ends it with an error.
    """

    def __init__(self, model_id: str, limits: Limits, token: str = "", timing: Timing | None = None) -> None:
        self.model_id = model_id
        self.limits = limits
        self.waiting = Queue()
        self.running: set[Callable[[], None]] = set()
        self._set = ReplicaSet(limits.ongoing, token, timing or Timing(), self._wake)
        self._finished: deque[float] = deque(maxlen=64)

    @property
    def replicas(self) -> Mapping[str, Replica]:
        """The known replicas by id."""
        return self._set.replicas

    def update(self, addresses: Sequence[Mapping[str, Any]]) -> None:
        """Set the known replicas.

        Args:
            addresses: each with ``id``, ``host``, ``port`` and maybe ``state``: ``ready``, ``draining``, ``unknown``
                (no answer at the last poll) or ``dead`` (its requests in progress fail at once).
        """
        self._set.update(addresses)

    @property
    def state(self) -> str:
        """Its state in `/status`: ``ready``, ``starting``, ``unhealthy`` or ``stopped``."""
        if any(replica.state in ("ready", "unknown") for replica in self.replicas.values()):
            return "ready"
        if self.limits.wakes and not self.replicas:
            return "starting" if self.waiting else "stopped"
        return "unhealthy" if self._set.had_any else "starting"

    @property
    def wanted(self) -> bool:
        """Whether requests are queued and no replica accepts requests."""
        return bool(self.waiting) and not self._set.usable()

    @property
    def reachable(self) -> bool:
        """Whether requests are accepted: there is a replica, or one is started on demand."""
        return bool(self.replicas) or self.limits.wakes

    @property
    def settled(self) -> bool:
        """Whether no request is queued and all replicas are ready."""
        return not self.waiting and all(replica.state == "ready" for replica in self.replicas.values())

    @property
    def _awaited(self) -> bool:
        """Whether another replica may appear soon: started on demand, or as the successor of a draining one, which the
        next discovery poll finds.
        """
        return self.limits.wakes or any(replica.draining for replica in self.replicas.values())

    @property
    def ongoing(self) -> int:
        """Requests in progress."""
        return self._set.ongoing

    def fail_running(self) -> None:
        """End all requests in progress or queued with an error; see `Directory.fail_running`."""
        for fail in list(self.running):
            fail()

    @asynccontextmanager
    async def slot(
        self, key: str | None = None, avoid: frozenset[str] = frozenset(), *, retry: bool = False
    ) -> AsyncIterator[Replica]:
        """A slot on a replica for one request; waits in the queue for one.

        `ReplicaLost` and `ReplicaDraining` of the body mark the replica as broken or draining.

        Args:
            key: affinity key; requests with the same key go to the same replica if the load allows it.
            avoid: ids of replicas on which this request already failed.
            retry: this request had a slot before: it goes before new requests, and no full queue refuses it.

        Raises:
            Refused: 429, the queue is full or the queue timeout passed; 503, there is no replica.
        """
        replica = await self._acquire(key, avoid, retry)
        try:
            with self._set.noting(replica):
                yield replica
            self._finished.append(monotonic())
        finally:
            replica.ongoing -= 1
            self._wake()

    @asynccontextmanager
    async def visit(self, avoid: frozenset[str] = frozenset()) -> AsyncIterator[Replica]:
        """A replica for a request without engine work, such as a metrics scrape: it needs no slot.

        Args:
            avoid: ids of replicas on which this request already failed.

        Raises:
            Refused: 503, there is no replica.
        """
        usable = self._set.usable(avoid)
        if not usable:
            raise self.unavailable()
        replica = min(usable, key=lambda replica: (replica.broken, replica.unknown, replica.ongoing))
        with self._set.noting(replica):
            yield replica

    async def healthy(self) -> bool:
        """Whether a replica's health check passes within `HEALTH_S`, or a request would start a replica."""
        if self.limits.wakes and not self._set.usable():
            return True
        checks = [asyncio.ensure_future(_healthy(replica)) for replica in self.replicas.values()]
        try:
            async with asyncio.timeout(HEALTH_S):
                for check in asyncio.as_completed(checks):
                    if await check:
                        return True
        except TimeoutError:
            pass
        finally:
            for one in checks:
                one.cancel()
        return False

    async def _acquire(self, key: str | None, avoid: frozenset[str], retry: bool) -> Replica:
        # No queued request could use this slot: it would have got it when the slot became usable.
        if replica := self._set.choose(key, avoid):
            replica.ongoing += 1
            return replica
        if not (self._set.usable(avoid) or self._awaited):
            raise self.unavailable()
        if not retry and 0 <= self.limits.queued <= len(self.waiting):
            raise self._full()
        waiter = self.waiting.add(key, avoid, retry)
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
            self.waiting.remove(waiter)

    def _wake(self) -> None:
        """Assign free slots to queued requests, and refuse those for which no replica is left."""
        while any(self._settle(waiter) for waiter in self.waiting.heads()):
            pass

    def _settle(self, waiter: Waiter) -> bool:
        """Decide about the first request of a line; False when it must wait longer."""
        if not waiter.place.done():  # otherwise its client has disconnected
            if replica := self._set.choose(waiter.key, waiter.avoid):
                replica.ongoing += 1
                waiter.place.set_result(replica)
            elif not (self._set.usable(waiter.avoid) or self._awaited):
                waiter.place.set_exception(self.unavailable())
            else:
                return False
        self.waiting.remove(waiter)
        return True

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
        rate = len(self._finished) / max(1e-3, monotonic() - self._finished[0])
        return int(min(high, max(low, round((len(self.waiting) + 1) / rate))))


async def _healthy(replica: Replica) -> bool:
    try:
        response = await replica.upstream.request("GET", b"/health")
        try:
            while await response.read():
                pass
        finally:
            response.close()
        return response.status == 200
    except (ReplicaLost, AppFailed):
        return False
