"""The replicas of one model: their states, and which of them gets the next request."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from quantserve.serve.transport.client import ReplicaLost, Timing, Upstream

BROKEN_S: Final = 1.0
"""How long a replica that could not be reached gets no requests, if there are other replicas."""
SLACK: Final = 4
"""A session or prefix stays on its replica until that has so many more requests than the least loaded one."""


class ReplicaDraining(Exception):
    """A replica refused a request because it is shutting down."""


@dataclass(eq=False)
class Replica:
    """A replica and its load.

    Attributes:
        ongoing: requests in progress that this gateway sent.
        draining: it accepts no new requests, and never will again.
        broken: it could not be reached within the last `BROKEN_S`; other replicas are preferred.
        unknown: discovery got no answer from it the last time; it is used like the others.
    """

    id: str
    upstream: Upstream
    ongoing: int = 0
    draining: bool = False
    broken: bool = False
    unknown: bool = False
    recovery: asyncio.TimerHandle | None = None

    @property
    def state(self) -> str:
        """Its state in the metrics."""
        return next((name for name in ("draining", "broken", "unknown") if getattr(self, name)), "ready")


class ReplicaSet:
    """The known replicas of one model.

    Args:
        slots: most requests in progress on a replica.
        token: authenticates connections to replicas.
        timing: timeouts and buffers of these connections.
        changed: called after every change that may make a slot usable.

    Attributes:
        replicas: by id.
        had_any: whether there ever was one.
    """

    def __init__(self, slots: int, token: str, timing: Timing, changed: Callable[[], None]) -> None:
        self.replicas: dict[str, Replica] = {}
        self.had_any = False
        self._removed: dict[str, Replica] = {}
        self._slots = slots
        self._token = token
        self._timing = timing
        self._changed = changed

    def update(self, addresses: Sequence[Mapping[str, Any]]) -> None:
        """Set the known replicas; see `Pool.update`."""
        known = {str(address["id"]): address for address in addresses if address.get("state") != "dead"}
        dead = {str(address["id"]) for address in addresses} - set(known)
        for gone in set(self.replicas) - set(known):
            replica = self._removed[gone] = self.replicas.pop(gone)
            if gone in dead:
                replica.upstream.fail()
            else:
                replica.upstream.close()
        for name, address in known.items():
            replica = self._known(name, str(address["host"]), int(address["port"]))
            replica.draining |= address.get("state") == "draining"  # an older answer does not revoke it
            replica.unknown = address.get("state") == "unknown"
        self._removed = {name: replica for name, replica in self._removed.items() if replica.ongoing}
        self._changed()

    def _known(self, name: str, host: str, port: int) -> Replica:
        """The replica of that id; one that returns still has the requests in progress that it had."""
        replica = self.replicas.get(name)
        if replica is not None and (replica.upstream.host, replica.upstream.port) == (host, port):
            return replica
        upstream = Upstream(host, port, self._token, self._timing)
        replica = replica or self._removed.pop(name, None)
        if replica is None:
            replica = Replica(name, upstream)
        else:
            replica.upstream.close()
            replica.upstream = upstream
        self.replicas[name] = replica
        self.had_any = True
        return replica

    @property
    def ongoing(self) -> int:
        """Requests in progress, also on removed replicas that still respond."""
        return sum(replica.ongoing for replica in (*self.replicas.values(), *self._removed.values()))

    @contextmanager
    def noting(self, replica: Replica) -> Iterator[None]:
        """Mark the replica as broken or draining when a request to it raises `ReplicaLost` or `ReplicaDraining`."""
        try:
            yield
        except ReplicaDraining:
            replica.draining = True
            self._changed()
            raise
        except ReplicaLost:
            self._lost(replica)
            raise

    def _lost(self, replica: Replica) -> None:
        if replica.recovery is not None:
            replica.recovery.cancel()
        replica.broken = True
        replica.recovery = asyncio.get_running_loop().call_later(BROKEN_S, self._recover, replica)
        self._changed()  # when all are broken, all are tried

    def _recover(self, replica: Replica) -> None:
        replica.broken = False
        self._changed()

    def usable(self, avoid: frozenset[str] = frozenset()) -> list[Replica]:
        """Replicas that accept requests, but for those in `avoid`."""
        return [replica for name, replica in self.replicas.items() if not replica.draining and name not in avoid]

    def choose(self, key: str | None, avoid: frozenset[str]) -> Replica | None:
        """The replica with the fewest requests, or the one of the affinity key unless it has `SLACK` more; None when
        none has a free slot.
        """
        usable = self.usable(avoid)
        sound = [replica for replica in usable if not replica.broken] or usable
        free = [replica for replica in sound if replica.ongoing < self._slots]
        free = [replica for replica in free if not replica.unknown] or free
        if not free:
            return None
        least = min(replica.ongoing for replica in free)
        if key is not None:
            own = max(sound, key=lambda replica: hashlib.blake2b(f"{key}\0{replica.id}".encode()).digest())
            if own in free and own.ongoing - least < SLACK:
                return own
        return random.choice([replica for replica in free if replica.ongoing == least])
