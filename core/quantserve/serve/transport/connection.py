"""The gateway's end of a connection to a replica: sends requests and receives their responses.

Every token of every request passes this module, so it avoids copying and parsing, and data that was buffered for a slow
client is sent in one piece.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from quantserve.serve.transport.frames import DATA, MAX_PAYLOAD, VERSION, Headers, Kind, ProtocolError
from quantserve.serve.transport.link import HANGS, TICKS, Link
from quantserve.serve.transport.payloads import (
    SAME,
    pack_hello,
    pack_number,
    pack_request,
    unpack_answer,
    unpack_welcome,
)

LONGEST_REFUSAL: Final = 1 << 10
"""Longest reason of a refusal, in bytes."""
NUMBERS: Final = 1 << 32
"""Request numbers wrap around here."""


@dataclass(frozen=True)
class Timing:
    """Timeouts and buffers of the connection to a replica.

    Attributes:
        connect_s: connect timeout in seconds.
        silence_s: seconds until a replica whose host has vanished counts as lost. A replica whose host responds, but
            whose process does not, counts as lost after `link.HANGS` times as long.
        buffer_bytes: most bytes of a response that are buffered for a slow client.
    """

    connect_s: float = 5.0
    silence_s: float = 15.0
    buffer_bytes: int = 256 << 10


DEFAULT_TIMING: Final = Timing()


class ReplicaLost(Exception):
    """A replica cannot be reached, or its connection closed before the response was complete."""


class AppFailed(Exception):
    """The replica's app ended without a complete response; the replica and its connection still work."""


class Response:
    """A response that is being received.

    Attributes:
        number: of the request.
        status, headers: known when `head` returns.
    """

    def __init__(self, connection: Connection, number: int, window: int) -> None:
        self._connection = connection
        self.number = number
        self._chunks: deque[bytes] = deque()
        self._window = window  # bytes that the replica may still send
        self._read = 0  # bytes read since the last CREDIT
        self._credit_at = window // 2
        self._ready: asyncio.Future[None] | None = None
        self._receiving = False  # between status and end
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
        self._read += len(data)
        if self._read > self._credit_at and not self._complete:
            self._connection.send(Kind.CREDIT, self.number, pack_number(self._read))
            self._window += self._read
            self._read = 0
        return data

    def close(self) -> None:
        """Stop receiving; an incomplete response is cancelled in the replica."""
        if self._connection.forget(self.number) and not (self._complete or self._error):
            self._connection.send(Kind.CANCEL, self.number)

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
        self._ready = self._connection.loop.create_future()
        try:
            await self._ready
        finally:
            self._ready = None

    def on_frame(self, kind: int, payload: bytes) -> None:
        """Handle a frame of this response.

        Raises:
            ProtocolError: it must not come now.
        """
        if kind == DATA and self._receiving:
            self._window -= len(payload)
            if self._window < 0:
                raise ProtocolError(f"more data than was granted to response {self.number}")
            if payload:
                self._chunks.append(payload)
        elif self._complete or self._error:
            raise ProtocolError(f"a frame of kind {kind} after the end of response {self.number}")
        elif kind == Kind.END and self.status:
            self._complete = True
            self._receiving = False
        elif kind == Kind.ANSWER and not self.status:
            self.status, self.headers = unpack_answer(payload)
            self._receiving = True
        elif kind == Kind.FAILED:
            self._error = AppFailed("the replica's app ended without a complete response")
            self._receiving = False
        else:
            raise ProtocolError(f"a frame of kind {kind} out of order in response {self.number}")
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def lose(self, reason: str) -> None:
        """The connection is lost."""
        if not self._complete:
            self._error = ReplicaLost(reason)
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)


class Connection(Link):
    """A connection to a replica, shared by all requests to it.

    Attributes:
        loop: the event loop.
        welcome: done when the replica has accepted the connection; raises ReplicaLost when it has not.
        used: whether a request was sent.
    """

    def __init__(self, token: str, timing: Timing, on_lost: Callable[[Connection], None]) -> None:
        super().__init__("replica", timing.silence_s, MAX_PAYLOAD, handshake_ticks=TICKS * HANGS)
        self._token = token
        self._timing = timing
        self._on_lost = on_lost
        self._answers: dict[int, Response] = {}
        self._numbers = itertools.count(1)
        self._retired = False
        self.loop = asyncio.get_running_loop()  # asking for it costs a system call, which each token would pay
        self.welcome: asyncio.Future[None] = self.loop.create_future()
        self.used = False

    def begin(self) -> Response:
        """The response to a request that `transmit` sends."""
        number = 0
        while not number or number in self._answers:
            number = next(self._numbers) % NUMBERS
        response = self._answers[number] = Response(self, number, self._timing.buffer_bytes)
        if not self.usable:  # the connection was lost meanwhile
            response.lose(self.loss)
        return response

    async def transmit(self, response: Response, head: bytes, body: bytes) -> None:
        """Send a request; returns when all of it is in the send buffer.

        Raises:
            ValueError: the protocol does not allow it; see `pack_request`.
        """
        for kind, payload in pack_request(head, body, self._timing.buffer_bytes):
            if not self.usable:
                return
            self.used = True
            if kind == Kind.OPEN and self.free:
                self.send(kind, response.number, payload)
            else:
                await self.send_in_turn(kind, response.number, payload)

    def forget(self, number: int) -> bool:
        """Remove a response; returns whether it was known."""
        known = self._answers.pop(number, None) is not None
        self._close_if_retired()
        return known

    def retire(self) -> None:
        """Close when the responses in progress are complete."""
        self._retired = True
        self._close_if_retired()

    def _close_if_retired(self) -> None:
        if self._retired and not self._answers:
            self.close()

    @property
    def loss(self) -> str:
        """Message about the loss of this connection."""
        return f"the connection to replica {self.address} was lost" + (f": {self.reason}" if self.reason else "")

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Introduce this gateway."""
        super().connection_made(transport)
        self.send(Kind.HELLO, 0, pack_hello(self._timing.silence_s, self._token.encode()))
        self._introduced = True

    def on_frame(self, kind: int, number: int, payload: bytes) -> None:
        """Handle a frame; those of responses that were closed are ignored."""
        if response := self._answers.get(number):
            response.on_frame(kind, payload)
        elif number == 0:
            self._on_control(kind, payload)
        elif not self._established or not Kind.ANSWER <= kind <= Kind.FAILED:
            raise ProtocolError(f"a frame of kind {kind} for request {number}, which does not exist")

    def _on_control(self, kind: int, payload: bytes) -> None:
        if self._established or kind not in (Kind.WELCOME, Kind.REFUSED):
            self.on_ping(kind, payload)
        elif kind == Kind.REFUSED:
            self.fail(f"it refused the connection: {payload[:LONGEST_REFUSAL].decode('utf-8', 'replace')}")
        elif (version := unpack_welcome(payload)) != VERSION:
            self.fail(f"it has protocol version {version}, this gateway has {VERSION}; {SAME}")
        else:
            self._establish(self._timing.silence_s)
            if not self.welcome.done():
                self.welcome.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """All responses in progress are lost."""
        super().connection_lost(error)
        if not self._established and not self.reason:
            self.reason = f"it closed before WELCOME, as for another token or an older protocol; {SAME}"
        if not self.welcome.done():
            self.welcome.set_exception(ReplicaLost(self.loss))
            self.welcome.exception()  # nobody has to wait for it
        for response in self._answers.values():
            response.lose(self.loss)
        self._on_lost(self)
