"""A replica as the gateway sees it: connects to it, once for all requests, and again when the connection is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from quantserve.serve.transport.connection import DEFAULT_TIMING, AppFailed, Connection, ReplicaLost, Response, Timing
from quantserve.serve.transport.payloads import pack_head

__all__ = ["AppFailed", "ReplicaLost", "Response", "Timing", "Upstream"]

BACKOFF_S: Final = (0.5, 4.0)
"""First and longest pause between attempts to connect; it doubles."""
NOT_FORWARDED: Final = frozenset({b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"proxy-authorization",
                                  b"proxy-connection", b"transfer-encoding", b"expect"})  # fmt: skip
"""Hop-by-hop request headers."""


class Upstream:
    """A replica.

    All requests share one connection, and one attempt to connect. When an attempt fails or the replica is lost, further
    attempts follow in the background, and requests fail at once until one succeeds.

    Args:
        host, port: its address.
        token: authenticates the connection; replicas close connections without it.
        timing: timeouts and buffers.
    """

    def __init__(self, host: str, port: int, token: str, timing: Timing = DEFAULT_TIMING) -> None:
        self.host = host
        self.port = port
        self.timing = timing
        self._token = token
        self._connection: Connection | None = None
        self._connections: set[Connection] = set()  # also those that were closed and still have requests
        self._dialing: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()
        self._error = ""
        self._closed = False

    async def request(
        self, method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]] = (), body: bytes = b""
    ) -> Response:
        """Send a request; returns when status and headers have arrived. The caller must `close` the response.

        Args:
            target: raw path and query.
            headers: names in lower case; hop-by-hop headers are removed.

        Raises:
            ReplicaLost: connecting failed, or the connection closed before the response began.
            AppFailed: the app ended without a response.
            ValueError: method, target or a length is not allowed in the protocol.
        """
        first = method.encode() + b" " + target
        head = pack_head(first, [pair for pair in headers if pair[0] not in NOT_FORWARDED])
        retried = False
        while True:
            connection = await self._connect()
            kept = connection.used
            response = connection.begin()
            try:
                await connection.transmit(response, head, body)
                await response.head()
            except BaseException as error:
                response.close()
                if isinstance(error, ReplicaLost) and kept and not retried and not connection.reason:
                    retried = True  # the replica may have closed it while it was idle
                    continue
                raise
            return response

    def close(self) -> None:
        """Close the connection when the responses in progress are complete."""
        self._closed = True
        if self._connection is not None:
            self._connection.retire()
            self._connection = None

    def fail(self) -> None:
        """Close the connection at once; responses in progress raise `ReplicaLost`. For a replica known to be dead."""
        self._closed = True
        self._connection = None
        self._error = f"replica {self.host}:{self.port} is dead"
        if self._dialing is not None:
            self._dialing.cancel()
        self._tried.set()
        for connection in tuple(self._connections):
            connection.fail("discovery reports that it is dead")

    async def _connect(self) -> Connection:
        while self._connection is None or not self._connection.usable:
            if self._error:
                raise ReplicaLost(self._error)
            if self._dialing is None or self._dialing.done():
                self._tried.clear()
                self._dialing = asyncio.create_task(self._dial())
            await self._tried.wait()
        return self._connection

    async def _dial(self) -> None:
        """Connect; after a failure try again with back-off until it succeeds or this upstream is closed."""
        pause, longest = BACKOFF_S
        while True:
            try:
                self._connection = await self._attempt()
                self._error = ""
            except ReplicaLost as lost:
                self._error = str(lost)
            finally:
                self._tried.set()
            if self._closed and self._connection is not None:  # by now; the requests that wait for it are still sent
                asyncio.get_running_loop().call_later(BACKOFF_S[0], self._connection.retire)
            if self._closed or not self._error:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _attempt(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.timing.connect_s):
                _, connection = await loop.create_connection(self._make, self.host, self.port)
        except TimeoutError:
            raise ReplicaLost(f"cannot connect to {self.host}:{self.port} within {self.timing.connect_s:g} s") from None
        except Exception as error:
            raise ReplicaLost(f"cannot connect to {self.host}:{self.port}: {type(error).__name__}") from None
        self._connections.add(connection)
        try:
            await connection.welcome
        except asyncio.CancelledError:
            connection.close()
            raise
        return connection

    def _make(self) -> Connection:
        return Connection(self._token, self.timing, self._on_lost)

    def _on_lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if connection is self._connection and connection.silent:  # new requests do not wait for a connect timeout
            self._error = connection.loss
            self._dialing = asyncio.create_task(self._dial())
