"""The replica's end of the connection to gateways: an ASGI server for authenticated gateways only."""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
from collections import deque
from typing import Final

from starlette.types import ASGIApp

from quantserve.serve.transport.frames import VERSION, Kind, ProtocolError
from quantserve.serve.transport.incoming import IncomingRequest
from quantserve.serve.transport.link import Link
from quantserve.serve.transport.payloads import SAME, pack_welcome, unpack_hello, unpack_number
from quantserve.text import harmless

LONGEST_HELLO: Final = 1 << 10
"""Longest frame that is accepted before the token."""
HANDSHAKE_TICKS: Final = 2
STRANGERS: Final = 128
"""Most connections without a valid HELLO: one more closes the oldest of them, so that a port scanner or a flood of
connections leaves the engine its open files.
"""
SILENCE_S: Final = 15.0
"""`silence_s` of a connection until HELLO names the gateway's; see `Link`."""
TOGETHER: Final = 16
"""Most frames that are sent in one write, so that the gateway can begin while more are produced."""
LARGE: Final = 16 << 10
"""A frame of so many bytes is sent at once, with those before it."""

logger = logging.getLogger(__name__)


class Listener:
    """Accepts connections of gateways that present the token.

    Args:
        app: gets the requests, one task each.
        token: must be in the first frame of a connection; other connections are closed without a response.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self.token = token.encode()
        self.sessions: set[_Session] = set()
        self.strangers: dict[_Session, None] = {}  # without a valid HELLO so far, oldest first
        self._server: asyncio.Server | None = None

    async def start(self, listening: socket.socket) -> None:
        """Accept connections on a bound socket."""
        self._server = await asyncio.get_running_loop().create_server(lambda: _Session(self), sock=listening)

    def close(self) -> None:
        """Stop accepting connections, and close the open ones after sending what is buffered."""
        if self._server is not None:
            self._server.close()
        for session in list(self.sessions):
            session.close()


class _Session(Link):
    """The connection of one gateway."""

    def __init__(self, listener: Listener) -> None:
        super().__init__("gateway", SILENCE_S, LONGEST_HELLO, HANDSHAKE_TICKS)
        self._listener = listener
        self._requests: dict[int, IncomingRequest] = {}
        self._beginning: deque[IncomingRequest] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsent: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Send a frame, in one write with those that follow in the same turn of the event loop."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(data)
        if len(self._unsent) >= TOGETHER or len(data) > LARGE:
            self._flush()

    def _flush(self) -> None:
        if self._unsent:
            super().write(b"".join(self._unsent))
            self._unsent.clear()

    def close(self) -> None:
        """Close after sending what is buffered."""
        self._flush()
        super().close()

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._listener.sessions.add(self)
        strangers = self._listener.strangers
        strangers[self] = None
        if len(strangers) > STRANGERS:
            oldest = next(iter(strangers))
            del strangers[oldest]
            oldest.abort()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._listener.sessions.discard(self)
        self._listener.strangers.pop(self, None)
        for request in tuple(self._requests.values()):
            request.cancel()
        self._requests.clear()

    def on_frame(self, kind: int, number: int, payload: bytes) -> None:
        if not self._established:
            self._on_hello(kind, number, payload)
        elif number == 0:
            self.on_ping(kind, payload)
        elif (request := self._requests.get(number)) is not None:
            self._on_request_frame(request, kind, payload)
        elif kind == Kind.OPEN:
            self._open(IncomingRequest(self, number, payload))
        elif kind not in (Kind.CANCEL, Kind.CREDIT):  # these may cross the end of the response
            raise ProtocolError(f"a frame of kind {kind} for request {number}, which does not exist")

    def _on_hello(self, kind: int, number: int, payload: bytes) -> None:
        if kind != Kind.HELLO or number:
            raise ProtocolError("the first frame is not HELLO")
        version, silence_s, token = unpack_hello(payload)
        if not hmac.compare_digest(token, self._listener.token):
            raise ProtocolError("wrong token")
        if version != VERSION:
            reason = f"the gateway has protocol version {version}, this replica has {VERSION}; {SAME}"
            self.send(Kind.REFUSED, 0, reason.encode())
            self.close()
            logger.warning("refused gateway %s: %s", self.address, reason)
            return
        self._listener.strangers.pop(self, None)
        self._establish(silence_s)
        self.send(Kind.WELCOME, 0, pack_welcome())

    def _on_request_frame(self, request: IncomingRequest, kind: int, payload: bytes) -> None:
        if kind == Kind.CANCEL:
            request.cancel()
            if not request.received:
                self._requests.pop(request.number)
        elif kind == Kind.CREDIT:
            request.grant(unpack_number(payload))
        elif kind == Kind.BODY and not request.received:
            request.feed(payload)
            self._open(request)
        else:
            raise ProtocolError(f"a frame of kind {kind} out of order in request {request.number}")

    def _open(self, request: IncomingRequest) -> None:
        """Begin a request if it is complete."""
        self._requests[request.number] = request
        if not request.received:
            return
        if request.scope["method"] != "POST":
            self._begin(request)
            return
        if not self._beginning:
            asyncio.get_running_loop().call_soon(self._begin_next)
        self._beginning.append(request)

    def _begin_next(self) -> None:
        """Begin one request per turn of the event loop.

        When many requests arrive together, the first one is in the engine while the last one is still being parsed;
        otherwise all of them would reach the engine as late as the last.
        """
        self._begin(self._beginning.popleft())
        if self._beginning:
            asyncio.get_running_loop().call_soon(self._begin_next)

    def _begin(self, request: IncomingRequest) -> None:
        task = asyncio.get_running_loop().create_task(self._run(request))
        self._tasks.add(task)  # asyncio keeps only weak references to tasks
        task.add_done_callback(self._tasks.discard)

    async def _run(self, request: IncomingRequest) -> None:
        try:
            if not request.left:
                await self._listener.app(request.scope, request.receive, request.send)
        except Exception as error:
            # The layers inside turn errors into responses; this one came after the response had begun.
            logger.warning("response of %s ended early: %s", harmless(request.scope["path"]), type(error).__name__)
        finally:
            request.finish()
            self._requests.pop(request.number, None)
