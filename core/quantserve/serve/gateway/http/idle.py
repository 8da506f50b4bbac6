"""The idle client connections of the gateway, which make room for new ones."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import Final

MOST_CLOSING: Final = 32
"""Most connections that are being closed at one time: each still has its open file."""
LOOKED_AT: Final = 8
"""Most connections looked at for each new one."""


class IdleConnections:
    """The connections that wait for their next request, in the order in which they became idle."""

    def __init__(self) -> None:
        self._idle: dict[asyncio.Transport, None] = {}
        self._closing: set[asyncio.Transport] = set()

    def add(self, transport: asyncio.Transport) -> None:
        """Add a connection whose response is complete."""
        self._idle[transport] = None

    def remove(self, transport: asyncio.Transport) -> None:
        """Remove a connection that has a request, or is closed; nothing happens if it is not there."""
        self._idle.pop(transport, None)
        self._closing.discard(transport)

    def close_one(self) -> bool:
        """Close the connection that is idle for the longest time; returns whether there is one.

        A connection that is still sending a response is passed over.
        """
        if len(self._closing) >= MOST_CLOSING:
            return False
        for transport in list(islice(self._idle, LOOKED_AT)):
            del self._idle[transport]
            if transport.get_write_buffer_size() == 0:
                self._closing.add(transport)
                transport.close()
                return True
            self._idle[transport] = None
        return False
