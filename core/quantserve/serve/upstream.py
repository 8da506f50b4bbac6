"""The gateway's end of the connection to a replica: sends requests and receives their responses.

Every token of every request passes this module, so it avoids copying and parsing, and data that was buffered for a slow
client is sent in one piece.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, cast

from quantserve.serve.wire import Frames, Headers, Kind, frame, pack_request, unpack_head

CONNECT_S: Final = 5.0
HIGH_WATER: Final = 256 << 10
"""Bytes buffered for a slow client before PAUSE is sent to the replica."""
KEEPALIVE: Final = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""TCP keepalive, in seconds and probes: an idle connection to a lost node fails after 25 s."""
NUMBERS: Final = 1 << 32
"""Request numbers wrap around here."""
NOT_FORWARDED: Final = frozenset({b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"proxy-authorization",
                                  b"proxy-connection", b"transfer-encoding", b"expect"})  # fmt: skip
"""Hop-by-hop request headers."""


@dataclass(frozen=True)
class Timing:
    """Timeouts and buffers of the connection to a replica.

    Attributes:
        connect_s: connect timeout in seconds.
        silence_s: seconds without a sign of life until the connection counts as lost.
        buffer_bytes: bytes of a response buffered for a slow client before the replica pauses it.
    """

    connect_s: float = 5.0
    silence_s: float = 15.0
    buffer_bytes: int = 256 << 10


class ReplicaLost(Exception):
    """A replica cannot be reached, or its connection closed before the response was complete."""


class AppFailed(Exception):
    """The replica's app ended without a complete response; the replica and its connection still work."""


class Response:
    """A response that is being received.

    Attributes:
        status, headers: known when `Upstream.request` returns.
    """

    def __init__(self, connection: _Connection, number: int) -> None:
        self._connection = connection
        self._number = number
        self._chunks: deque[bytes] = deque()
        self._waiting = 0
        self._paused = False
        self._ready: asyncio.Future[None] | None = None
        self._complete = False
        self._error: ReplicaLost | AppFailed | None = None
        self.status = 0
        self.headers: Headers = []

    async def read(self) -> bytes:
        """Data received since the last call; waits for at least one byte; empty at the end.

        Raises:
            ReplicaLost: the connection closed before the end.
            AppFailed: the app ended before the end.
        """
        while not self._chunks:
            if self._complete:
                return b""
            if self._error:
                raise self._error
            await self._wait()
        data = self._chunks.popleft() if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._waiting = 0
        if self._paused:
            self._paused = False
            self._connection.send(Kind.RESUME, self._number)
        return data

    def close(self) -> None:
        """Stop receiving; an incomplete response is cancelled in the replica."""
        if self._connection.forget(self._number) and not self._complete:
            self._connection.send(Kind.CANCEL, self._number)

    async def head(self) -> None:
        """Wait for status and headers.

        Raises:
            ReplicaLost: the connection closed before the response began.
            AppFailed: the app ended without a response.
        """
        while not self.status:
            if self._error:
                raise self._error
            await self._wait()

    async def _wait(self) -> None:
        self._ready = asyncio.get_running_loop().create_future()
        try:
            await self._ready
        finally:
            self._ready = None

    def on_frame(self, kind: int, payload: bytes) -> None:
        """Handle a frame of this response."""
        if kind == Kind.DATA:
            self._chunks.append(payload)
            self._waiting += len(payload)
            if self._waiting > HIGH_WATER and not self._paused:
                self._paused = True
                self._connection.send(Kind.PAUSE, self._number)
        elif kind == Kind.END:
            self._complete = True
        elif kind == Kind.ANSWER:
            status, self.headers = unpack_head(payload)
            self.status = int(status)
        else:
            self._error = AppFailed("the replica's app ended without a complete response")
        self._notify()

    def lose(self) -> None:
        """The connection is lost."""
        self._error = ReplicaLost("the connection to the replica was lost before its response was complete")
        self._notify()

    def _notify(self) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)


class _Connection(asyncio.Protocol):
    """The connection to a replica, shared by all requests to it."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._transport: asyncio.Transport | None = None
        self._frames = Frames()
        self._answers: dict[int, Response] = {}
        self._numbers = itertools.count(1)
        self._closing = False
        self.used = False

    def open(self, payload: bytes) -> Response:
        """Send a request."""
        number = next(self._numbers) % NUMBERS
        response = self._answers[number] = Response(self, number)
        if self.usable:
            self.used = True
            self.send(Kind.OPEN, number, payload)
        else:  # the connection was lost meanwhile
            response.lose()
        return response

    def send(self, kind: Kind, number: int, payload: bytes = b"") -> None:
        if self._transport is not None and self.usable:
            self._transport.write(frame(kind, number, payload))

    def forget(self, number: int) -> bool:
        """Remove a response; returns whether it was known."""
        known = self._answers.pop(number, None) is not None
        if self._closing and not self._answers and self._transport is not None:
            self._transport.close()
        return known

    def close_after_use(self) -> None:
        """Close when the responses to the requests sent from now on are complete."""
        self._closing = True

    def close(self) -> None:
        """Close when the responses in progress are complete."""
        self.close_after_use()
        if not self._answers and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        wire = transport.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.send(Kind.HELLO, 0, self._token.encode())

    def data_received(self, data: bytes) -> None:
        for kind, number, payload in self._frames.feed(data):
            if (response := self._answers.get(number)) is not None:  # otherwise its client has disconnected
                response.on_frame(kind, payload)

    def connection_lost(self, error: Exception | None) -> None:
        for response in self._answers.values():
            response.lose()


class Upstream:
    """A replica.

    Args:
        host, port: its address.
        token: authenticates the connection; replicas close connections without it.
        timing: timeouts and buffers.
    """

    def __init__(self, host: str, port: int, token: str, timing: Timing = Timing()) -> None:
        self.timing = timing
        self.host = host
        self.port = port
        self._token = token
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
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
        """
        payload = pack_request(method, target, [pair for pair in headers if pair[0] not in NOT_FORWARDED], body)
        while True:
            connection = await self._connect()
            kept = connection.used
            response = connection.open(payload)
            try:
                await response.head()
            except BaseException as error:
                response.close()
                if isinstance(error, ReplicaLost) and kept and not connection.usable:
                    continue  # it may have been closed while idle: retry once on a new one
                raise
            return response

    def close(self) -> None:
        """Close the connection when the responses in progress are complete."""
        self._closed = True
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def fail(self) -> None:
        """Close the connection at once; responses in progress raise `ReplicaLost`. For a replica known to be dead."""
        connection = self._connection
        self.close()
        if connection is not None:
            connection.abort()

    async def _connect(self) -> _Connection:
        if self._connection is not None and self._connection.usable:
            return self._connection
        async with self._connecting:
            if self._connection is not None and self._connection.usable:
                return self._connection
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout(CONNECT_S):
                    made = await loop.create_connection(lambda: _Connection(self._token), self.host, self.port)
            except (OSError, TimeoutError) as error:
                raise ReplicaLost(f"cannot connect to {self.host}:{self.port}: {type(error).__name__}") from None
            if self._closed:  # close() was called meanwhile; this request is still sent
                made[1].close_after_use()
                return made[1]
            self._connection = made[1]
            return self._connection
