"""A request in the replica: assembled from frames, answered by an ASGI app."""

from __future__ import annotations

import asyncio
from urllib.parse import unquote_to_bytes

from starlette.types import Message, Scope

from quantserve.serve.asgi import request_scope
from quantserve.serve.transport.frames import DATA, MAX_PAYLOAD, Bytes, Kind, ProtocolError, frame
from quantserve.serve.transport.link import Link
from quantserve.serve.transport.payloads import MAX_WINDOW, RequestReader, pack_answer, pieces


class IncomingRequest:
    """One request: its ASGI scope and channels.

    Attributes:
        received: whether the request has arrived completely.
        scope: ASGI scope of a request that has arrived.
    """

    def __init__(self, session: Link, number: int, payload: bytes) -> None:
        self.number = number
        self.received = False
        self.scope: Scope = {}
        self._session = session
        self._reader: RequestReader | None = RequestReader(payload)
        self._window = self._reader.window
        self._body: bytes | None = None
        self._head_only = False
        self._answered = False
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
            RuntimeError: a second head, or a body without one; the gateway would close the connection for it.
        """
        if self._done:
            return
        begins = message["type"] == "http.response.start"
        if begins == self._answered:
            raise RuntimeError(f"{message['type']} out of order")
        if begins:
            head = pack_answer(message["status"], message.get("headers", ()))
            self._answered = True
            await self._send(Kind.ANSWER, head)
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
