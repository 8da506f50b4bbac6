"""The replica's end of the connection to gateways: an ASGI server for authenticated gateways only."""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
from collections import deque
from typing import Final
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Message, Scope

from quantserve.serve.asgi import request_scope
from quantserve.serve.link import Link
from quantserve.serve.wire import (
    DATA,
    MAX_PAYLOAD,
    MAX_WINDOW,
    SAME,
    VERSION,
    Bytes,
    Kind,
    ProtocolError,
    RequestReader,
    frame,
    pack_answer,
    pack_welcome,
    pieces,
    unpack_hello,
    unpack_number,
)
from quantserve.text import harmless

LONGEST_HELLO: Final = 1 << 10
"""Longest frame that is accepted before the token."""
HANDSHAKE_TICKS: Final = 2
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
        self._requests: dict[int, _Request] = {}
        self._beginning: deque[_Request] = deque()
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

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._listener.sessions.discard(self)
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
            self._open(_Request(self, number, payload))
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
        self._establish(silence_s)
        self.send(Kind.WELCOME, 0, pack_welcome())

    def _on_request_frame(self, request: _Request, kind: int, payload: bytes) -> None:
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

    def _open(self, request: _Request) -> None:
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

    def _begin(self, request: _Request) -> None:
        task = asyncio.get_running_loop().create_task(self._run(request))
        self._tasks.add(task)  # asyncio keeps only weak references to tasks
        task.add_done_callback(self._tasks.discard)

    async def _run(self, request: _Request) -> None:
        try:
            if not request.left:
                await self._listener.app(request.scope, request.receive, request.send)
        except Exception as error:
            # The layers inside turn errors into responses; this one came after the response had begun.
            logger.warning("response of %s ended early: %s", harmless(request.scope["path"]), type(error).__name__)
        finally:
            request.finish()
            self._requests.pop(request.number, None)


class _Request:
    """One request: its ASGI scope and channels.

    Attributes:
        received: whether the request has arrived completely.
        scope: ASGI scope of a request that has arrived.
    """

    def __init__(self, session: _Session, number: int, payload: bytes) -> None:
        self.number = number
        self.received = False
        self.scope: Scope = {}
        self._session = session
        self._reader: RequestReader | None = RequestReader(payload)
        self._window = self._reader.window
        self._body: bytes | None = None
        self._head_only = False
        self._gone = asyncio.Event()
        self._granted = asyncio.Event()
        self._done = False
        self.feed(b"")

    def feed(self, payload: bytes) -> None:
        """Take a further piece of the request.

        Raises:
            ProtocolError: it is malformed.
        """
        assert self._reader is not None
        self._reader.feed(payload)
        if not self._reader.complete:
            return
        method, target, headers, self._body = self._reader.request()
        path, _, query = target.partition(b"?")
        self.scope = request_scope(method, unquote_to_bytes(path).decode("utf-8", "replace"), headers, query)
        self.scope["raw_path"] = path
        self._head_only = method == "HEAD"
        self._reader = None
        self.received = True

    @property
    def left(self) -> bool:
        """Whether the client has disconnected."""
        return self._gone.is_set()

    def cancel(self) -> None:
        """The client has disconnected."""
        self._done = True
        self._gone.set()
        self._granted.set()

    def grant(self, size: int) -> None:
        """Allow `size` more bytes of the response.

        Raises:
            ProtocolError: that is too much.
        """
        self._window += size
        if self._window > MAX_WINDOW:
            raise ProtocolError(f"a window of {self._window} bytes; the limit is {MAX_WINDOW}")
        self._granted.set()

    async def receive(self) -> Message:
        """ASGI: the body, then the disconnect, when the client disconnects or the response is complete."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """ASGI: send a part of the response; waits while the client or the connection is slow.

        Raises:
            ValueError: the protocol does not allow this head.
        """
        if self._done:
            return
        if message["type"] == "http.response.start":
            await self._send(Kind.ANSWER, pack_answer(message["status"], message.get("headers", ())))
            return
        body = b"" if self._head_only else message.get("body", b"")
        last = not message.get("more_body")
        size = len(body)
        if size <= self._window and size <= MAX_PAYLOAD and self._session.free:
            self._window -= size
            data = frame(DATA, self.number, body) if size else b""
            if last:
                data += frame(Kind.END, self.number)
            if data:
                self._session.write(data)
        else:
            await self._send_pieces(body)
            if last and not self._done:
                await self._send(Kind.END)
        if last:
            self._done = True
            self._gone.set()

    async def _send_pieces(self, body: Bytes) -> None:
        for piece in pieces(body):
            while piece and not self._done:
                if self._window <= 0:
                    self._granted.clear()
                    await self._granted.wait()
                    continue
                part, piece = piece[: self._window], piece[self._window :]
                self._window -= len(part)
                await self._session.send_in_turn(Kind.DATA, self.number, part)

    async def _send(self, kind: Kind, payload: Bytes = b"") -> None:
        if self._session.free:
            self._session.send(kind, self.number, payload)
        else:
            await self._session.send_in_turn(kind, self.number, payload)

    def finish(self) -> None:
        """The app has returned: report an incomplete response as failed."""
        if not self._done:
            self._done = True
            self._session.send(Kind.FAILED, self.number)
