"""HTTP/1.1 to a replica: connections that are kept, bodies that pass as they come.

Every token of every request goes through here, so nothing is copied or parsed that need not be: httptools (which
uvicorn uses, too) takes the framing off, and what has piled up while the client was slow travels together.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from typing import Final

import httptools

Headers = list[tuple[bytes, bytes]]

CONNECT_S: Final = 5.0
IDLE_S: Final = 30.0
"""Kept connections older than this are not used again; a replica closes them after `KEEP_ALIVE_S`."""
KEEP_ALIVE_S: Final = 75
HIGH_WATER: Final = 256 << 10
"""Bytes waiting for a slow client before the replica is no longer read."""
HOP_BY_HOP: Final = frozenset({b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"proxy-authorization",
                               b"proxy-connection", b"transfer-encoding"})  # fmt: skip

OWN: Final = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"x-quantserve-token"}
"""Request headers that are left out, or said anew."""


class ReplicaLost(Exception):
    """A replica cannot be reached, or left before its answer was complete."""


class Response:
    """An answer on its way.

    Attributes:
        status, headers: known when `Upstream.request` returns.
    """

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._chunks: deque[bytes] = deque()
        self._waiting = 0
        self._ready: asyncio.Future[None] | None = None
        self._complete = False
        self._lost = False
        self.status = 0
        self.headers: Headers = []

    async def read(self) -> bytes:
        """What has arrived since the last call, waiting for at least something; empty at the end.

        Raises:
            ReplicaLost: the replica left in the middle.
        """
        while not self._chunks:
            if self._complete:
                return b""
            if self._lost:
                raise ReplicaLost("the replica closed the connection in the middle of its answer")
            await self._wait()
        data = self._chunks.popleft() if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        if self._waiting > HIGH_WATER:
            self._connection.resume()
        self._waiting = 0
        return data

    def close(self) -> None:
        """Give the connection back when the answer is whole, else drop it, which cancels the request."""
        self._connection.release(reusable=self._complete)

    async def _head(self) -> None:
        while not self.status:
            if self._lost:
                raise ReplicaLost("the replica closed the connection before it answered")
            await self._wait()

    async def _wait(self) -> None:
        self._ready = asyncio.get_running_loop().create_future()
        try:
            await self._ready
        finally:
            self._ready = None

    def _wake(self) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def _add(self, data: bytes) -> None:
        self._chunks.append(data)
        self._waiting += len(data)
        if self._waiting > HIGH_WATER:
            self._connection.pause()
        self._wake()


class _Connection(asyncio.Protocol):
    """One connection; the methods in httptools' names are called by its parser."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._headers: Headers = []
        self._head_only = False
        self.idle_since = 0.0
        self.uses = 0

    def send(self, head: bytes, body: bytes, head_only: bool) -> Response:
        assert self._transport is not None
        self._head_only = head_only
        self._response = Response(self)
        self._parser = httptools.HttpResponseParser(self)
        self._headers = []
        self.uses += 1
        self._transport.write(head + body if len(body) < HIGH_WATER else head)
        if len(body) >= HIGH_WATER:
            self._transport.write(body)
        return self._response

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def pause(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        if self.usable and self._transport is not None:
            self._transport.resume_reading()

    def release(self, *, reusable: bool) -> None:
        if self._response is None:
            return
        self._response = None
        if reusable and self.usable:
            self.resume()
            self.idle_since = time.monotonic()
            self._upstream.put_back(self)
        elif self._transport is not None:
            self._transport.abort()

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self._response is None or self._parser is None:
            if self._transport is not None:
                self._transport.abort()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._lose()
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._lose()

    def _lose(self) -> None:
        if self._response is not None and not self._response._complete:
            self._response._lost = True
            self._response._wake()

    # --- the parser's side

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._response is not None and self._parser is not None:
            status = self._parser.get_status_code()
            if status >= 200:
                self._response.status, self._response.headers = status, self._headers
                self._response._complete = self._head_only  # the length that is announced does not come
            self._headers = []
            self._response._wake()

    def on_body(self, body: bytes) -> None:
        if self._response is not None:
            self._response._add(body)

    def on_message_complete(self) -> None:
        if self._response is not None and self._response.status:
            self._response._complete = True
            self._response._wake()


class Upstream:
    """A replica's HTTP server.

    Args:
        host, port: where it listens.
        token: sent with every request; replicas answer nobody without it.
    """

    def __init__(self, host: str, port: int, token: str) -> None:
        self.host = host
        self.port = port
        self._token = token
        self._idle: list[_Connection] = []

    async def request(
        self, method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]] = (), body: bytes = b""
    ) -> Response:
        """Send a request; returns when the head of the answer is there. The caller must `close` the response.

        Args:
            target: raw path and query.
            headers: names in lower case; those of one connection are left out.

        Raises:
            ReplicaLost: nobody listens, or the replica left before it answered.
        """
        head = self._render(method, target, headers, len(body))
        while True:
            connection = self._take() or await self._connect()
            fresh = connection.uses == 0
            response = connection.send(head, body, method == "HEAD")
            try:
                await response._head()
            except ReplicaLost:
                response.close()
                if fresh:
                    raise
                continue  # a kept connection that the replica closed as we used it
            except BaseException:
                response.close()
                raise
            return response

    def put_back(self, connection: _Connection) -> None:
        """Keep a connection for the next request."""
        self._idle.append(connection)

    def close(self) -> None:
        """Drop the connections that are kept."""
        while self._idle:
            connection = self._idle.pop()
            if connection._transport is not None:
                connection._transport.abort()

    def _take(self) -> _Connection | None:
        oldest = time.monotonic() - IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_since > oldest:
                return connection
            if connection._transport is not None:
                connection._transport.abort()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(lambda: _Connection(self), self.host, self.port)
        except (OSError, TimeoutError) as error:
            raise ReplicaLost(f"no connection to the replica: {type(error).__name__}") from None
        return connection

    def _render(self, method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]], length: int) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            method.encode() + b" " + target + b" HTTP/1.1",
            f"host: {host}:{self.port}".encode(),
            b"x-quantserve-token: " + self._token.encode(),
        ]
        lines += [name + b": " + value for name, value in headers if name not in OWN]
        if length or method in ("POST", "PUT", "PATCH"):
            lines.append(b"content-length: %d" % length)
        return b"\r\n".join(lines) + b"\r\n\r\n"
