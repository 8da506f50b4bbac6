"""The queue of one model: requests that wait for a slot on a replica."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantserve.serve.gateway.upstreams.replica_set import Replica


@dataclass(eq=False)
class Waiter:
    """A queued request.

    Attributes:
        key: affinity key.
        avoid: ids of replicas on which it already failed.
        retry: it had a slot before, and goes before requests that had none.
        number: order of arrival.
        place: resolves to the replica whose slot the request got.
    """

    key: str | None
    avoid: frozenset[str]
    retry: bool
    number: int
    place: asyncio.Future[Replica] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def given(self) -> Replica | None:
        """The replica whose slot this request already holds, if any."""
        done = self.place.done() and not self.place.cancelled() and not self.place.exception()
        return self.place.result() if done else None


class Queue:
    """First in, first out: retries first, then new requests.

    Requests that avoid the same replicas form a line, of which only the first can be next. There are few lines, so that
    finding the next request and removing one take constant time however long the queue is.
    """

    def __init__(self) -> None:
        self._lines: dict[tuple[bool, frozenset[str]], OrderedDict[Waiter, None]] = {}
        self._numbers = itertools.count()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, key: str | None, avoid: frozenset[str], retry: bool) -> Waiter:
        """Append a request."""
        waiter = Waiter(key, avoid, retry, next(self._numbers))
        self._lines.setdefault((retry, avoid), OrderedDict())[waiter] = None
        self._length += 1
        return waiter

    def remove(self, waiter: Waiter) -> None:
        """Remove a request if it is still there."""
        line = self._lines.get((waiter.retry, waiter.avoid), OrderedDict())
        if waiter not in line:
            return
        del line[waiter]
        self._length -= 1
        if not line:
            del self._lines[waiter.retry, waiter.avoid]

    def heads(self) -> list[Waiter]:
        """The first request of each line, in the order in which they get slots."""
        return sorted((next(iter(line)) for line in self._lines.values()), key=lambda one: (not one.retry, one.number))
