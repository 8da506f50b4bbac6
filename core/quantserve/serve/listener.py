"""The replica's end of the connection to gateways: an ASGI server for authenticated gateways only."""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
from collections import deque
from typing import Final, cast
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Message

from quantserve.serve.asgi import request_scope
from quantserve.serve.wire import Frames, Kind, frame, pack_head, unpack_request
from quantserve.text import harmless

LONGEST_HELLO: Final = 1 << 10
"""Longest frame that is accepted before the token."""
HELLO_S: Final = 5.0
TOGETHER: Final = 16
"""Most frames that are sent in one write, so that the gateway can begin while more are produced."""

logger = logging.getLogger(__name__)


class Listener:
    """Accepts connections of gateways that present the token.

    Args:
        app: gets the requests, one task each.
        token: must be the first frame of a connection; other connections are closed without a response.
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


class _Session(asyncio.Protocol):
    """The connection of one gateway."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._frames = Frames()
        self._known = False
        self._transport: asyncio.Transport | None = None
        self._requests: dict[int, _Request] = {}
        self._beginning: deque[_Request] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._full = False
        self._unsent: list[bytes] = []

    @property
    def full(self) -> bool:
        """Whether the send buffer is full because the gateway reads too slowly."""
        return self._full

    def write(self, data: bytes) -> None:
        """Send a frame, in one write with those that follow in the same turn of the event loop."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(data)
        if len(self._unsent) >= TOGETHER:
            self._flush()

    def _flush(self) -> None:
        if self._unsent and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()

    def close(self) -> None:
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._listener.sessions.add(self)
        asyncio.get_running_loop().call_later(HELLO_S, lambda: None if self._known else self.abort())

    def data_received(self, data: bytes) -> None:
        for kind, number, payload in self._frames.feed(data):
            if not self._known:
                if kind != Kind.HELLO or not hmac.compare_digest(payload, self._listener.token):
                    self.abort()
                    return
                self._known = True
            elif kind == Kind.OPEN:
                self._open(number, payload)
            elif (request := self._requests.get(number)) is not None:
                request.on_frame(kind)
        if not self._known and self._frames.wanted > LONGEST_HELLO:
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._listener.sessions.discard(self)
        for request in self._requests.values():
            request.on_frame(Kind.CANCEL)

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        for request in self._requests.values():
            request.recheck()

    def _open(self, number: int, payload: bytes) -> None:
        request = self._requests[number] = _Request(self, number, payload)
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
    """One request: its ASGI scope and channels."""

    def __init__(self, session: _Session, number: int, payload: bytes) -> None:
        method, target, headers, body = unpack_request(payload)
        path, _, query = target.partition(b"?")
        self.number = number
        self.scope = request_scope(method, unquote_to_bytes(path).decode("utf-8", "replace"), headers, query)
        self.scope["raw_path"] = path
        self._session = session
        self._body: bytes | None = body
        self._head_only = method == "HEAD"
        self._gone = asyncio.Event()
        self._paused = False
        self._may_send = asyncio.Event()
        self._done = False

    @property
    def left(self) -> bool:
        """Whether the client has disconnected."""
        return self._gone.is_set()

    def on_frame(self, kind: int) -> None:
        """Handle a frame about this request: CANCEL, PAUSE or RESUME."""
        if kind == Kind.CANCEL:
            self._done = True
            self._gone.set()
        self._paused = kind == Kind.PAUSE
        self.recheck()

    def recheck(self) -> None:
        """Let a waiting `send` check again whether it may continue."""
        self._may_send.set()

    async def receive(self) -> Message:
        """ASGI: the body, then the disconnect, when the client disconnects or the response is complete."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """ASGI: send a part of the response; waits while the client or the connection is slow."""
        while (self._paused or self._session.full) and not self._done:
            self._may_send.clear()
            await self._may_send.wait()
        if self._done:
            return
        if message["type"] == "http.response.start":
            head = pack_head(b"%d" % message["status"], message.get("headers", ()))
            self._session.write(frame(Kind.ANSWER, self.number, head))
            return
        body = b"" if self._head_only else message.get("body", b"")
        data = frame(Kind.DATA, self.number, body) if body else b""
        if not message.get("more_body"):
            data += frame(Kind.END, self.number)
            self._done = True
            self._gone.set()
        if data:
            self._session.write(data)

    def finish(self) -> None:
        """The app has returned: report an incomplete response as failed."""
        if not self._done:
            self._done = True
            self._session.write(frame(Kind.FAILED, self.number))
